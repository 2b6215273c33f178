package dbpool_test

import (
	"crypto/tls"
	"syscall"
	"testing"

	"github.com/carpool-go/carpool/dbpool"
)

func TestPool_SocketsGiveUpOnAVanishedNetworkWithinSeconds(t *testing.T) {
	t.Parallel()
	const tcpUserTimeout = 0x12 // linux/tcp.h
	c := acquire(t, open(t, func(*dbpool.Config) {}))
	defer c.Release()
	socket := c.Conn().PgConn().Conn()
	if t, ok := socket.(*tls.Conn); ok {
		socket = t.NetConn()
	}
	raw, err := socket.(syscall.Conn).SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	for _, option := range []struct {
		name            string
		level, id, want int
	}{
		{"SO_KEEPALIVE", syscall.SOL_SOCKET, syscall.SO_KEEPALIVE, 1},
		{"TCP_KEEPIDLE", syscall.IPPROTO_TCP, syscall.TCP_KEEPIDLE, 15},
		{"TCP_KEEPINTVL", syscall.IPPROTO_TCP, syscall.TCP_KEEPINTVL, 5},
		{"TCP_KEEPCNT", syscall.IPPROTO_TCP, syscall.TCP_KEEPCNT, 3},
		{"TCP_USER_TIMEOUT", syscall.IPPROTO_TCP, tcpUserTimeout, 20_000},
	} {
		var got int
		controlErr := raw.Control(func(fd uintptr) {
			got, err = syscall.GetsockoptInt(int(fd), option.level, option.id)
		})
		if controlErr != nil || err != nil || got != option.want {
			t.Errorf("%s is %d, want %d; %v, %v", option.name, got, option.want, controlErr, err)
		}
	}
}
