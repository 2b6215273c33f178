package dbpool

import (
	"context"
	"crypto/tls"
	"io"
	"math/rand/v2"
	"net"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
)

// memberKey is where a member stands in its connection's CustomData.
const memberKey = "carpool/dbpool"

// member is one open connection of the pool. Its fields belong to whoever holds
// it, the pool under its lock while it is idle, unless they say otherwise.
type member struct {
	pool *Pool
	px   *pgxpool.Conn
	conn *pgx.Conn
	net  net.Conn
	raw  syscall.RawConn // nil: can't be peeked at

	// proven is the number of deaths the pool had seen when the connection was
	// last known to live, at provenAt: a later death makes it a suspect.
	proven    uint64
	provenAt  time.Time // a sign of life: an answer, or the end of connecting
	recycleAt time.Time // zero: never
	fresh     bool      // it was not lent yet
	idleSince time.Time
	validated uint64 // the last validation that looked at it

	// Of the present loan:
	lent     time.Time
	borrower *Borrower
	stack    [stackDepth]uintptr
	depth    int  // of stack
	reported bool // guarded by the pool's lock
	queries  int
	tx       pgx.Tx // the last that was begun
	broken   bool
	wasShut  bool // before the statement that is traced
	rowsOpen atomic.Bool
	loan     atomic.Uint64 // its number; a Conn of another loan is stale

	// Of the present peek, so that it needs no memory.
	look   func(uintptr)
	looked peeked
}

const stackDepth = 8

type peeked int

const (
	peekQuiet  peeked = iota // alive, as far as the kernel knows
	peekUnsure               // something is there to be read, or it can't be told
	peekDead                 // closed by the other end, or broken
)

func (m *member) attach(c *pgxpool.Conn) {
	m.px, m.conn = c, c.Conn()
	m.net = m.conn.PgConn().Conn()
	socket := m.net
	if t, ok := socket.(*tls.Conn); ok {
		socket = t.NetConn() // a tls.Conn is no syscall.Conn
	}
	if s, ok := socket.(syscall.Conn); ok {
		if raw, err := s.SyscallConn(); err == nil {
			m.raw = raw
		}
	}
	m.look = func(fd uintptr) { m.looked = peek(fd) }
	if r := m.pool.cfg.Recycle; r > 0 {
		m.recycleAt = time.Now().Add(r - rand.N(r/10+1))
	}
	m.fresh, m.provenAt = true, time.Now()
	if !m.isReadOnly() {
		m.pool.writes.Store(true)
	}
}

// isReadOnly reports whether the server is a standby or takes no writes. It says
// so by itself when that changes, from Postgres 14 on, so this costs nothing.
func (m *member) isReadOnly() bool {
	pg := m.conn.PgConn()
	return pg.ParameterStatus("in_hot_standby") == "on" || pg.ParameterStatus("default_transaction_read_only") == "on"
}

// tellsReadOnly reports whether isReadOnly can be relied on: servers before
// Postgres 14, and some poolers, don't say.
func (m *member) tellsReadOnly() bool {
	return m.conn.PgConn().ParameterStatus("in_hot_standby") != ""
}

// leftBehind reports whether the connection takes no writes although others of
// the pool did: a failover has left it behind. One that was just opened so is
// lent once, since there may be no better one.
func (m *member) leftBehind() bool {
	return !m.fresh && m.pool.writes.Load() && m.isReadOnly()
}

func (m *member) expired(now time.Time) bool {
	return !m.recycleAt.IsZero() && now.After(m.recycleAt)
}

// health is what a check finds.
type health int

const (
	alive health = iota
	dead
	silent // no answer in time: the network or the whole server may be away
)

// looksAlive reports whether a look at the socket is enough to lend the
// connection.
func (m *member) looksAlive(now time.Time) bool {
	return m.proven == m.pool.deaths.Load() && now.Sub(m.provenAt) < m.pool.cfg.PingIdle && !m.leftBehind() && m.peek() == peekQuiet
}

func (m *member) peek() peeked {
	if m.raw == nil || m.conn.PgConn().Frontend().ReadBufferLen() > 0 {
		return peekUnsure // it can't be looked at, or pgx has read ahead
	}
	if err := m.raw.Control(m.look); err != nil {
		return peekDead
	}
	return m.looked
}

// ping asks the server, within PingTimeout.
func (m *member) ping() health {
	deaths := m.pool.deaths.Load()
	if m.peek() == peekDead {
		m.pool.died()
		return dead
	}
	ctx, cancel := context.WithTimeout(context.Background(), m.pool.cfg.PingTimeout)
	defer cancel()
	if err := m.conn.PgConn().Ping(ctx); err != nil {
		m.pool.died()
		if ctx.Err() != nil {
			return silent
		}
		return dead
	}
	if m.leftBehind() {
		m.pool.died()
		return dead
	}
	m.proven, m.provenAt = deaths, time.Now()
	return alive
}

// usable reports whether the connection, which is open, is in a state to be lent
// again: no rows and no transaction were left open.
func (m *member) usable() bool {
	pg := m.conn.PgConn()
	return !pg.IsBusy() && pg.TxStatus() == 'I' && !m.leftBehind()
}

// closeBound is how long closing a connection may take that is not known to be
// broken.
const closeBound = time.Second

// terminate is Postgres' message that the client leaves.
var terminate = []byte{'X', 0, 0, 0, 4}

// close closes the connection. A broken one has its socket closed at once, so
// that nothing waits for a server that doesn't answer. Of others the server's end
// is awaited, so that a successor doesn't make one too many there.
func (m *member) close(broken bool) {
	// Out of pgxpool before it is closed: its own closing may take 15 s, and
	// holds the place of the connection's successor.
	m.px.Hijack()
	ctx, cancel := context.WithTimeout(context.Background(), closeBound)
	defer cancel()
	pg := m.conn.PgConn()
	busy := pg.IsBusy()
	switch {
	case broken:
	case pg.IsClosed():
		// pgx has closed it amid a statement, which it now asks the server to
		// cancel.
		select {
		case <-pg.CleanupDone():
		case <-ctx.Done():
		}
	default:
		if busy {
			_ = pg.CancelRequest(ctx)
		}
		_ = m.net.SetDeadline(time.Now().Add(closeBound))
		if _, err := m.net.Write(terminate); err == nil {
			_, _ = io.Copy(io.Discard, m.net)
		}
	}
	_ = m.net.Close()
	if !busy { // or it may still be in the hands of a goroutine that its job has forgotten
		_ = m.conn.Close(ctx)
	}
}
