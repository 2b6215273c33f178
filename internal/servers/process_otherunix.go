//go:build unix && !linux

package servers

import (
	"bufio"
	"bytes"
	"fmt"
	"os/exec"
	"syscall"
)

// detach puts cmd into a process group of its own. This kernel has no death signal: the watchdog alone ends the server
// when we are killed.
func detach(cmd *exec.Cmd, _ syscall.Signal) {
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{}
	}
	cmd.SysProcAttr.Setpgid = true
}

// children lists the processes whose parent is pid.
func children(pid int) ([]int, error) {
	out, err := exec.Command("ps", "-A", "-o", "pid=,ppid=").Output()
	if err != nil {
		return nil, fmt.Errorf("list processes: %w", err)
	}
	var found []int
	lines := bufio.NewScanner(bytes.NewReader(out))
	for lines.Scan() {
		var child, parent int
		if _, err := fmt.Sscan(lines.Text(), &child, &parent); err == nil && parent == pid {
			found = append(found, child)
		}
	}
	return found, nil
}
