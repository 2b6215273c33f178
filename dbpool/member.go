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
	"github.com/jackc/pgx/v5/pgproto3"
	"github.com/jackc/pgx/v5/pgxpool"
)

// memberKey is where a member stands in its connection's CustomData.
const memberKey = "carpool/dbpool"

// member is one open connection of the pool. Its fields belong to whoever holds
// it, the pool under its lock while it is idle, unless they say otherwise.
type member struct {
	pool *Pool
	conn *pgxpool.Conn
	net  net.Conn
	raw  syscall.RawConn // nil: can't be peeked at

	// proven is the number of deaths the pool had seen when the connection was
	// last known to live: a later death makes it a suspect.
	proven    uint64
	recycleAt time.Time // zero: never
	readOnly  bool      // it was when it was opened
	idleSince time.Time
	validated uint64 // the validation that looked at it last

	// Of the present loan:
	lent     time.Time
	borrower *Borrower
	stack    [stackDepth]uintptr
	reported bool // guarded by the pool's lock
	queries  int
	tx       pgx.Tx // the last that was begun
	broken   bool
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
	m.conn = c
	m.net = c.Conn().PgConn().Conn()
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
	m.readOnly = m.isReadOnly()
}

// isReadOnly reports whether the server is a standby or takes no writes. It says
// so by itself when that changes, from Postgres 14 on, so this costs nothing.
func (m *member) isReadOnly() bool {
	pg := m.conn.Conn().PgConn()
	return pg.ParameterStatus("in_hot_standby") == "on" || pg.ParameterStatus("default_transaction_read_only") == "on"
}

func (m *member) expired(now time.Time) bool {
	return !m.recycleAt.IsZero() && now.After(m.recycleAt)
}

// pingIdle is how long a connection may be idle before a quiet socket is no
// longer proof enough: something between here and there may have forgotten it.
const pingIdle = 30 * time.Second

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
	return m.proven == m.pool.deaths.Load() && now.Sub(m.idleSince) < pingIdle && m.peek() == peekQuiet
}

func (m *member) peek() peeked {
	if m.raw == nil {
		return peekUnsure
	}
	if err := m.raw.Control(m.look); err != nil {
		return peekDead
	}
	return m.looked
}

// ping asks the server, within PingTimeout. A connection that has become
// read-only is as good as dead: a failover has left it behind.
func (m *member) ping(ctx context.Context) health {
	deaths := m.pool.deaths.Load()
	if m.peek() == peekDead {
		m.pool.died()
		return dead
	}
	// Not the caller's context: that it gives up would break the connection.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), m.pool.cfg.PingTimeout)
	defer cancel()
	if err := m.conn.Conn().PgConn().Ping(ctx); err != nil {
		m.pool.died()
		if ctx.Err() != nil {
			return silent
		}
		return dead
	}
	if m.isReadOnly() && !m.readOnly {
		m.pool.died()
		return dead
	}
	m.proven = deaths
	return alive
}

// usable reports whether the connection is in a state to be lent again.
func (m *member) usable() bool {
	pg := m.conn.Conn().PgConn()
	return !m.broken && !pg.IsClosed() && !pg.IsBusy() && pg.TxStatus() == 'I'
}

// closeBound is how long closing a connection may take that is not known to be
// broken.
const closeBound = time.Second

// close closes the connection. A broken one has its socket closed first, so that
// nothing waits for a server that doesn't answer. Of a sound one the server's end
// is awaited, so that its successor doesn't make one too many there.
func (m *member) close(broken bool) {
	// Out of pgxpool before it is closed: its own closing may take 15 s, and
	// holds the place of the connection's successor.
	conn := m.conn.Hijack()
	if broken || conn.IsClosed() {
		_ = m.net.Close()
	} else {
		_ = m.net.SetDeadline(time.Now().Add(closeBound))
		conn.PgConn().Frontend().Send(&pgproto3.Terminate{})
		if conn.PgConn().Frontend().Flush() == nil {
			_, _ = io.Copy(io.Discard, m.net)
		}
	}
	ctx, cancel := context.WithTimeout(context.Background(), closeBound)
	defer cancel()
	_ = conn.Close(ctx)
}
