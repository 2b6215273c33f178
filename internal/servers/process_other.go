//go:build !unix

package servers

import (
	"errors"
	"os/exec"
	"syscall"
)

// Signals that this system does not have; pausing says so.
const (
	sigStop = syscall.Signal(-1)
	sigCont = syscall.Signal(-2)
)

func detach(*exec.Cmd, syscall.Signal) {}

// signal ends the process: there is no gentler way here.
func (p *process) signal(syscall.Signal) {
	if !p.ended() {
		_ = p.cmd.Process.Kill()
	}
}

func kill(int, syscall.Signal) error {
	return errors.New("pausing a process is not possible on this system")
}

func children(int) ([]int, error) { return nil, nil }
