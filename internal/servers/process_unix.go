//go:build unix

package servers

import "syscall"

// signal sends s to the process itself. One that has ended already is no error.
func (p *process) signal(s syscall.Signal) {
	if !p.ended() {
		_ = p.cmd.Process.Signal(s)
	}
}

const (
	sigStop = syscall.SIGSTOP
	sigCont = syscall.SIGCONT
)

func kill(pid int, s syscall.Signal) error { return syscall.Kill(pid, s) }
