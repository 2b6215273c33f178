//go:build !(linux || darwin || freebsd || netbsd || openbsd)

package dbpool

import "syscall"

// peek is always unsure, because there is no portable way to look at a socket. The
// check then pings.
func peek(uintptr) peekResult { return peekUnsure }

// setUserTimeout does nothing, because only Linux has TCP_USER_TIMEOUT.
func setUserTimeout(string, string, syscall.RawConn) error { return nil }
