//go:build darwin || freebsd || netbsd || openbsd

package dbpool

import "syscall"

// peek looks at the socket without taking anything from it and without waiting.
func peek(fd uintptr) peeked {
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

// setUserTimeout does nothing: TCP_USER_TIMEOUT is Linux's own.
func setUserTimeout(string, string, syscall.RawConn) error { return nil }
