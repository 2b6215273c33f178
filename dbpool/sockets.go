package dbpool

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"log/slog"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/jackc/pgx/v5/pgconn"
)

// sockets keeps every open socket that was dialled for the pool, so that closing the
// pool can close them all.
type sockets struct {
	log    *slog.Logger
	dialer net.Dialer
	ctx    context.Context // ends with closeAll
	cancel context.CancelFunc
	ending sync.WaitGroup // the goroutines that socket.end has started

	mu     sync.Mutex // guards what follows
	open   map[*socket]struct{}
	closed bool
}

func newSockets(log *slog.Logger) *sockets {
	s := &sockets{log: log, open: make(map[*socket]struct{})}
	s.dialer = net.Dialer{
		KeepAliveConfig: net.KeepAliveConfig{Enable: true, Idle: keepAliveIdle, Interval: keepAliveInterval, Count: keepAliveCount},
		Control:         setUserTimeout,
	}
	s.ctx, s.cancel = context.WithCancel(context.Background())
	return s
}

// dial opens a socket, as pgx's DialFunc.
func (s *sockets) dial(ctx context.Context, network, address string) (net.Conn, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(s.ctx, cancel)() // because pgx gives the request to cancel a statement 15 s
	raw, err := s.dialer.DialContext(ctx, network, address)
	if err != nil {
		return nil, err
	}
	dialled := &socket{Conn: raw, list: s, gone: make(chan struct{})}
	dialled.conn, _ = ctx.Value(connKey{}).(*conn)
	if r, ok := ctx.Value(requestKey{}).(*request); ok {
		r.socket = dialled
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		_ = raw.Close()
		return nil, ErrClosed
	}
	s.open[dialled] = struct{}{}
	return dialled, nil
}

// of returns the open sockets that were dialled for a connection.
func (s *sockets) of(c *conn) []*socket {
	s.mu.Lock()
	defer s.mu.Unlock()
	var dialled []*socket
	for socket := range s.open {
		if socket.conn == c {
			dialled = append(dialled, socket)
		}
	}
	return dialled
}

// closeAll closes all sockets without a word to the server, has dial refuse to open
// more, and ends the waiting for servers. It may be called twice.
func (s *sockets) closeAll() {
	s.mu.Lock()
	s.closed = true
	for socket := range s.open {
		_ = socket.Conn.Close()
	}
	s.mu.Unlock()
	s.cancel()
	s.ending.Wait()
}

// socket is one of them. Its Close does not close it: pgx closes the socket of a
// connection that it gives up, at times while the server is at work for it, and a
// server at work doesn't notice. So Close hands the socket to end, which closes it
// when the server has ended its side.
type socket struct {
	net.Conn
	list *sockets
	conn *conn         // that it was dialled for; nil if it is for a request to cancel
	gone chan struct{} // closed when the socket is
	// cutOff becomes true with an error that tells of a broken line, because the kernel
	// tells of it once and calls it the server's close from then on.
	cutOff atomic.Bool

	// givenUp is true from end on. Nobody but end can use the socket then.
	givenUp atomic.Bool

	mu sync.Mutex // guards what follows, and the deadlines until the socket is given up
	// pg is nil until the server has said how its work can be cancelled.
	pg *pgconn.PgConn
}

// socketOf returns the socket of a connection that pgx has opened, which is below
// TLS if there is TLS.
func socketOf(pg *pgconn.PgConn) *socket {
	raw := pg.Conn()
	if t, ok := raw.(*tls.Conn); ok {
		raw = t.NetConn()
	}
	return raw.(*socket)
}

// opened notes whose socket this is, so that end can have its work cancelled.
func (s *socket) opened(pg *pgconn.PgConn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.pg = pg
}

func (s *socket) Read(b []byte) (int, error) {
	if s.givenUp.Load() {
		return 0, net.ErrClosed
	}
	n, err := s.Conn.Read(b)
	if err == nil && s.givenUp.Load() {
		return 0, net.ErrClosed
	}
	return n, s.note(err)
}

func (s *socket) Write(b []byte) (int, error) {
	if s.givenUp.Load() {
		return 0, net.ErrClosed
	}
	n, err := s.Conn.Write(b)
	return n, s.note(err)
}

// note keeps cutOff true, and returns err.
func (s *socket) note(err error) error {
	if err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, os.ErrDeadlineExceeded) {
		s.cutOff.Store(true)
	}
	return err
}

func (s *socket) SetDeadline(t time.Time) error     { return s.setDeadline(s.Conn.SetDeadline, t) }
func (s *socket) SetReadDeadline(t time.Time) error { return s.setDeadline(s.Conn.SetReadDeadline, t) }

func (s *socket) SetWriteDeadline(t time.Time) error {
	return s.setDeadline(s.Conn.SetWriteDeadline, t)
}

func (s *socket) setDeadline(set func(time.Time) error, t time.Time) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.givenUp.Load() {
		return net.ErrClosed
	}
	return set(t)
}

// SyscallConn returns the raw socket, for the pool to peek at.
func (s *socket) SyscallConn() (syscall.RawConn, error) {
	c, ok := s.Conn.(syscall.Conn)
	if !ok {
		return nil, errors.ErrUnsupported
	}
	return c.SyscallConn()
}

// Close ends what the server may be doing for the socket, and then closes it. It
// returns at once; gone tells when that is done.
func (s *socket) Close() error {
	if s.conn == nil {
		s.closeNow()
	} else {
		s.end(true, closeTimeout)
	}
	return nil
}

func (s *socket) closeNow() {
	s.list.mu.Lock()
	defer s.list.mu.Unlock()
	if _, open := s.list.open[s]; open {
		delete(s.list.open, s)
		_ = s.Conn.Close()
		close(s.gone)
	}
}

// These bound the end of a socket, and with it how long its connection keeps its
// place in the pool.
const (
	// closeTimeout is how long the server has to close its end, from the last sign
	// of its that it can be reached.
	closeTimeout = time.Second
	// lostTimeout takes its place for a connection that seems to be dead.
	lostTimeout = 100 * time.Millisecond
	// cancelTimeout is how long the server has if it takes requests to cancel its
	// work. They are sent every cancelEvery, because one that comes before its
	// statement does nothing, and the first after cancelGrace, in which a server
	// that has nothing to do closes its end.
	cancelTimeout = 5 * time.Second
	cancelEvery   = 250 * time.Millisecond
	cancelGrace   = 5 * time.Millisecond
)

// end gives the socket up in the background; whoever still uses it gets an error. It
// tells the server that nothing more comes, waits up to patience until the server has
// closed its end, and closes the socket. If the server may be at work, it has that
// cancelled. Only the first call counts.
func (s *socket) end(atWork bool, patience time.Duration) {
	s.mu.Lock()
	if s.givenUp.Swap(true) {
		s.mu.Unlock()
		return
	}
	// Whoever reads or writes now returns.
	_ = s.Conn.SetDeadline(time.Unix(1, 0))
	pg := s.pg
	s.mu.Unlock()
	if !atWork {
		pg = nil
	}

	s.list.mu.Lock()
	closed := s.list.closed
	if !closed {
		s.list.ending.Go(func() { s.awaitServer(pg, patience) })
	}
	s.list.mu.Unlock()
	if closed {
		s.closeNow()
	}
}

// awaitServer is the part of end that takes time. pg is nil if there is nothing to
// cancel.
func (s *socket) awaitServer(pg *pgconn.PgConn, patience time.Duration) {
	ctx, cancel := context.WithCancel(s.list.ctx)
	var draining sync.WaitGroup
	defer draining.Wait()
	defer s.closeNow()
	drained := make(chan struct{})
	draining.Go(func() {
		if s.drain() {
			cancel()
		}
		close(drained)
	})
	pause := cancelGrace
	if pg == nil {
		s.closeWrite()
		pause = patience
	}
	began, requests, broken := time.Now(), 0, false
	for {
		select {
		case <-drained:
			// Its server may be at work all the same.
			drained, broken = nil, true
		case <-time.After(pause):
		case <-ctx.Done():
		}
		switch {
		case ctx.Err() != nil, pg == nil, broken && requests > 0:
			return
		case time.Since(began) >= patience:
			if requests > 0 {
				s.list.log.Warn("the server did not end in time what it was asked to; it may have one connection more than the pool counts",
					"backend", pg.PID(), "asked", requests, "waited", time.Since(began).Round(time.Millisecond).String())
			}
			return
		}
		if requestCancel(ctx, pg) {
			requests++
			patience = min(time.Since(began)+closeTimeout, cancelTimeout)
			if broken {
				return
			}
		}
		// After the request, because a pooler forgets whose statement it was when its
		// client leaves.
		s.closeWrite()
		pause = min(cancelEvery, patience-time.Since(began))
	}
}

// requestCancel asks the server to cancel what it does for a connection, and reports
// whether the server has taken the request: it closes the connection then, which
// CancelRequest doesn't tell from its end by a fault. Whether the request had an
// effect can't be known.
func requestCancel(ctx context.Context, pg *pgconn.PgConn) bool {
	ctx, cancel := context.WithTimeout(ctx, closeTimeout)
	defer cancel()
	var r request
	return pg.CancelRequest(context.WithValue(ctx, requestKey{}, &r)) == nil && ctx.Err() == nil && !r.socket.cutOff.Load()
}

// request is a request to cancel; dial notes its socket there.
type request struct{ socket *socket }

// requestKey is the key of the request in the context that it is dialled with.
type requestKey struct{}

// drain reads until the server has closed its end, or the line is broken. It reports
// whether it was the server.
func (s *socket) drain() bool {
	// This read ends at once, by the deadline that end has set, and only after that of
	// whoever else was reading has ended by it.
	_, _ = s.Conn.Read(make([]byte, 1))
	_ = s.Conn.SetReadDeadline(time.Time{})
	_, err := io.Copy(io.Discard, s.Conn)
	return s.note(err) == nil && !s.cutOff.Load()
}

// closeWrite tells the server that nothing more comes, which ends a session that waits
// for its client.
func (s *socket) closeWrite() {
	if c, ok := s.Conn.(interface{ CloseWrite() error }); ok {
		_ = c.CloseWrite()
	}
}
