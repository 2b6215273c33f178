//go:build !(linux || darwin || freebsd || netbsd || openbsd)

package dbpool

import "syscall"

// peek has no portable form: the check falls back to a ping.
func peek(uintptr) peeked { return peekUnsure }

func setUserTimeout(string, string, syscall.RawConn) error { return nil }
