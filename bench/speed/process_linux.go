package main

import (
	"os"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/carpool-go/carpool/internal/servers"
)

// usage is what this process has used of the CPU, and has in memory.
func usage() (cpu time.Duration, rss int64) {
	var r syscall.Rusage
	if syscall.Getrusage(syscall.RUSAGE_SELF, &r) == nil {
		cpu = time.Duration(r.Utime.Nano() + r.Stime.Nano())
	}
	if statm, err := os.ReadFile("/proc/self/statm"); err == nil {
		if fields := strings.Fields(string(statm)); len(fields) > 1 {
			pages, _ := strconv.ParseInt(fields[1], 10, 64)
			rss = pages * int64(os.Getpagesize())
		}
	}
	return cpu, rss
}

// usageOfGroup is what the processes of a group that live have used of the CPU, in steps of
// 10 ms each, and have in memory, where what they share counts for each.
func usageOfGroup(pgid int) (cpu time.Duration, rss int64) {
	for _, fields := range servers.ProcessStats() {
		if len(fields) < 22 || string(fields[2]) != strconv.Itoa(pgid) {
			continue
		}
		for _, ticks := range fields[11:13] { // utime, stime
			n, _ := strconv.ParseInt(string(ticks), 10, 64)
			cpu += time.Duration(n) * 10 * time.Millisecond
		}
		pages, _ := strconv.ParseInt(string(fields[21]), 10, 64)
		rss += pages * int64(os.Getpagesize())
	}
	return cpu, rss
}

// sleep sleeps in the kernel.
func sleep(d time.Duration) {
	rest := syscall.NsecToTimespec(d.Nanoseconds())
	for syscall.Nanosleep(&rest, &rest) == syscall.EINTR {
	}
}
