//go:build darwin || freebsd || netbsd || openbsd

package dbpool

import "syscall"

// peek asks the kernel what there is to be read from the socket, takes nothing of it,
// and does not wait.
func peek(fd uintptr) peekResult {
	var b [1]byte
	n, _, err := syscall.Recvfrom(int(fd), b[:], syscall.MSG_PEEK|syscall.MSG_DONTWAIT)
	switch {
	case err == syscall.EAGAIN:
		return peekQuiet
	case err == syscall.EINTR || err == nil && n > 0:
		return peekUnsure
	default:
		return peekDead
	}
}

// setUserTimeout does nothing, because only Linux has TCP_USER_TIMEOUT.
func setUserTimeout(string, string, syscall.RawConn) error { return nil }
