package servers

import (
	"bytes"
	"iter"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"syscall"
)

// detach puts cmd into a process group of its own and has the kernel send it s when we die.
func detach(cmd *exec.Cmd, s syscall.Signal) {
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{}
	}
	cmd.SysProcAttr.Setpgid = true
	cmd.SysProcAttr.Pdeathsig = s
}

// children lists the processes whose parent is pid.
func children(pid int) ([]int, error) {
	var found []int
	for child, fields := range ProcessStats() {
		if len(fields) >= 2 && string(fields[1]) == strconv.Itoa(pid) {
			found = append(found, child)
		}
	}
	return found, nil
}

// ProcessStats are the processes of this machine by their ids, each with the fields that its stat in /proc has from the
// state on: state, ppid, pgrp and so on. See proc_pid_stat(5).
func ProcessStats() iter.Seq2[int, [][]byte] {
	return func(yield func(int, [][]byte) bool) {
		stats, _ := filepath.Glob("/proc/[0-9]*/stat") // only a wrong pattern is an error
		for _, stat := range stats {
			line, err := os.ReadFile(stat)
			if err != nil {
				continue // it has just ended
			}
			pid, err := strconv.Atoi(filepath.Base(filepath.Dir(stat)))
			if err != nil {
				continue
			}
			// pid (name) state …: the name may hold spaces and brackets.
			if !yield(pid, bytes.Fields(line[bytes.LastIndexByte(line, ')')+1:])) {
				return
			}
		}
	}
}
