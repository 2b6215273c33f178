package dbpool

import (
	"context"
	"errors"
	"net"
	"sync"
	"syscall"
)

// sockets keeps every open socket that was dialled for the pool, so that closing the
// pool can close them all. It has to, because pgx keeps the socket of a connection
// that it has closed itself for up to 15 s, to have the statement cancelled.
type sockets struct {
	dialer net.Dialer

	mu     sync.Mutex // guards what follows
	open   map[*socket]struct{}
	closed bool
}

// socket is one of them. It takes itself off the list when it is closed.
type socket struct {
	net.Conn
	list *sockets
}

func (s *socket) Close() error {
	s.list.mu.Lock()
	delete(s.list.open, s)
	s.list.mu.Unlock()
	return s.Conn.Close()
}

// SyscallConn returns the raw socket, for the pool to peek at.
func (s *socket) SyscallConn() (syscall.RawConn, error) {
	c, ok := s.Conn.(syscall.Conn)
	if !ok {
		return nil, errors.ErrUnsupported
	}
	return c.SyscallConn()
}

// dial opens a socket, as pgx's DialFunc.
func (s *sockets) dial(ctx context.Context, network, address string) (net.Conn, error) {
	conn, err := s.dialer.DialContext(ctx, network, address)
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		_ = conn.Close()
		return nil, ErrClosed
	}
	if s.open == nil {
		s.open = make(map[*socket]struct{})
	}
	dialled := &socket{conn, s}
	s.open[dialled] = struct{}{}
	return dialled, nil
}

// closeAll closes all sockets, and has dial refuse to open more.
func (s *sockets) closeAll() {
	s.mu.Lock()
	open := s.open
	s.open, s.closed = nil, true
	s.mu.Unlock()
	for socket := range open {
		_ = socket.Conn.Close()
	}
}
