package dbpool

import (
	"syscall"
	"time"
	"unsafe"
)

// peek asks the kernel what there is to be read from the socket, takes nothing of it,
// and does not wait.
func peek(fd uintptr) peekResult {
	var b [1]byte
	n, _, errno := syscall.RawSyscall6(syscall.SYS_RECVFROM, fd, uintptr(unsafe.Pointer(&b[0])), 1,
		syscall.MSG_PEEK|syscall.MSG_DONTWAIT, 0, 0)
	switch {
	case errno == syscall.EAGAIN:
		return peekQuiet
	case errno == syscall.EINTR:
		return peekUnsure
	case errno != 0 || n == 0:
		return peekDead
	default:
		return peekUnsure
	}
}

const tcpUserTimeout = 0x12 // TCP_USER_TIMEOUT in linux/tcp.h

// setUserTimeout bounds how long sent data may stay unacknowledged, because keepalive
// probes are silent while there is such data.
func setUserTimeout(network, _ string, c syscall.RawConn) error {
	if network == "unix" {
		return nil
	}
	var err error
	if e := c.Control(func(fd uintptr) {
		err = syscall.SetsockoptInt(int(fd), syscall.IPPROTO_TCP, tcpUserTimeout, int(userTimeout/time.Millisecond))
	}); e != nil {
		return e
	}
	return err
}
