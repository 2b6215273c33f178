package dbpool

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"runtime"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
)

// ErrReleased is returned by a [Conn] that was released, whether by
// [Conn.Release] or by [Borrower.End].
var ErrReleased = errors.New("dbpool: the connection was given back")

// Conn is a connection on loan from [Pool.Acquire]. Like a pgx.Conn it is for one
// goroutine at a time. Its methods return [ErrReleased] once it was released.
type Conn struct {
	conn *conn
	loan uint64 // the number of the loan; conn.loan is another one when it has ended
}

// Release gives the connection back to the pool, at once and without an error. A
// connection that broke, or that has an open transaction or open rows, is closed
// and replaced. Releasing twice is safe.
func (c *Conn) Release() {
	if c.conn.loan.CompareAndSwap(c.loan, 0) {
		c.conn.pool.release(c.conn, closedUnfit)
	}
}

// Conn returns the pgx connection, for what this type has no method for. It is nil
// after Release, and must not be used after it, nor may what was hijacked from it.
func (c *Conn) Conn() *pgx.Conn {
	pgxConn, err := c.lent()
	if err != nil {
		return nil
	}
	return pgxConn
}

// lent returns the pgx connection, or ErrReleased.
func (c *Conn) lent() (*pgx.Conn, error) {
	if c.conn.loan.Load() != c.loan {
		return nil, ErrReleased
	}
	return c.conn.pgx, nil
}

// conn is one connection of the pool, from the attempt to open it until it is
// closed. Its fields belong to whoever brought it into its state, and to the pool
// under its lock while it is idle, unless they say otherwise.
type conn struct {
	pool  *Pool
	state state // changed by Pool.setState alone; guarded by the pool's lock

	// From connecting:
	pooled *pgxpool.Conn
	pgx    *pgx.Conn
	socket *socket
	raw    syscall.RawConn // to peek at the socket; nil if that can't be done

	// verified is the pool's generation in which the connection was last known to
	// live. answeredAt is when it was opened, or the server last answered.
	verified   uint64
	answeredAt time.Time
	recycleAt  time.Time // zero: never
	fresh      bool      // it was not released yet
	idleSince  time.Time
	validation uint64 // the last one that looked at it
	lost       bool   // it can't be pinged, or there is no time for that
	taken      bool   // by Pool.Close from whoever had it on loan

	// Of the present loan:
	acquiredAt time.Time
	borrower   *Borrower // nil for none
	stack      [stackDepth]uintptr
	depth      int  // of stack
	reported   bool // as a leak; guarded by the pool's lock
	queries    int
	tx         pgx.Tx // the last that was begun
	broken     bool
	wasClosed  bool // before the statement that is traced
	rowsOpen   atomic.Bool
	loan       atomic.Uint64 // its number; 0 for none

	// peekFD writes to peeked. Both are here because a closure made for each peek
	// would be an allocation for each loan.
	peekFD func(fd uintptr)
	peeked peekResult
}

// connKey is the key of the conn in the context that it is opened with.
type connKey struct{}

// customDataKey is the key of the conn in the CustomData of its pgx connection.
const customDataKey = "carpool/dbpool"

// connOf returns the pool's conn for a pgx connection, nil if it has none.
func connOf(pgxConn *pgx.Conn) *conn {
	c, _ := pgxConn.PgConn().CustomData()[customDataKey].(*conn)
	return c
}

const stackDepth = 8

// attach takes over a connection that pgxpool has opened.
func (c *conn) attach(pooled *pgxpool.Conn) {
	c.pooled, c.pgx = pooled, pooled.Conn()
	c.socket = socketOf(c.pgx.PgConn())
	if raw, err := c.socket.SyscallConn(); err == nil {
		c.raw = raw
	}
	c.peekFD = func(fd uintptr) { c.peeked = peek(fd) }
	if r := c.pool.cfg.Recycle; r > 0 {
		c.recycleAt = time.Now().Add(r - rand.N(r/10+1))
	}
	c.fresh, c.answeredAt = true, time.Now()
	if !c.isReadOnly() {
		c.pool.writes.Store(true)
	}
}

// isReadOnly reports whether the server is a standby or takes no writes. It costs
// no round trip, because from Postgres 14 on the server announces each change.
func (c *conn) isReadOnly() bool {
	pg := c.pgx.PgConn()
	return pg.ParameterStatus("in_hot_standby") == "on" || pg.ParameterStatus("default_transaction_read_only") == "on"
}

// announcesReadOnly reports whether isReadOnly can be relied on. Servers before
// Postgres 14, and some poolers, announce nothing.
func (c *conn) announcesReadOnly() bool {
	return c.pgx.PgConn().ParameterStatus("in_hot_standby") != ""
}

// demoted reports whether the connection takes no writes although the pool has had
// one that did: its server has lost its role in a failover. A fresh connection is
// exempt and is lent once, because there may be no better one.
func (c *conn) demoted() bool {
	return !c.fresh && c.pool.writes.Load() && c.isReadOnly()
}

// expired reports whether the connection's life is over.
func (c *conn) expired(now time.Time) bool {
	return !c.recycleAt.IsZero() && now.After(c.recycleAt)
}

// stale reports whether a fault was noticed since the connection was last verified.
func (c *conn) stale() bool { return c.verified < c.pool.generation.Load() }

// peekResult is what a look at the socket finds.
type peekResult int

const (
	peekQuiet  peekResult = iota // alive, as far as the kernel knows
	peekUnsure                   // there is something to be read, or the socket can't be peeked at
	peekDead                     // closed by the other end, or broken
)

// peek asks the kernel about the connection's socket.
func (c *conn) peek() peekResult {
	if c.raw == nil || c.pgx.PgConn().Frontend().ReadBufferLen() > 0 {
		return peekUnsure // pgx has read ahead what a peek would look for
	}
	if err := c.raw.Control(c.peekFD); err != nil {
		return peekDead
	}
	return c.peeked
}

// looksAlive reports whether the connection can be lent without a ping.
func (c *conn) looksAlive(now time.Time) bool {
	return !c.stale() && now.Sub(c.answeredAt) < c.pool.cfg.PingIdle && !c.demoted() && c.peek() == peekQuiet
}

// health is what a ping finds.
type health int

const (
	alive health = iota
	dead
	silent // no answer in time: the network or the whole server may be away
)

// ping asks the server for an answer, within PingTimeout. It verifies the
// connection if there is one, and begins a new generation if there is none.
func (c *conn) ping() health {
	generation := c.pool.generation.Load()
	if c.peek() == peekDead {
		c.lost = true
		c.pool.newGeneration()
		return dead
	}
	ctx, cancel := context.WithTimeout(context.Background(), c.pool.cfg.PingTimeout)
	defer cancel()
	if err := c.pgx.PgConn().Ping(ctx); err != nil {
		c.lost = true
		c.pool.newGeneration()
		if ctx.Err() != nil {
			return silent
		}
		return dead
	}
	if c.demoted() {
		c.pool.newGeneration()
		return dead
	}
	c.verified, c.answeredAt = generation, time.Now()
	return alive
}

// usable reports whether the connection, which is open, can be lent again: it has
// no open rows and no open transaction.
func (c *conn) usable() bool {
	pg := c.pgx.PgConn()
	return !pg.IsBusy() && pg.TxStatus() == 'I' && !c.demoted()
}

// markBroken notes that a connection on loan is of no more use.
func (c *conn) markBroken() {
	if !c.broken {
		c.broken = true
		c.borrower.addDeath()
	}
}

// rollbackTimeout is how long rolling back a forgotten transaction may take.
const rollbackTimeout = 5 * time.Second

// rollBack ends the open transaction. It goes through the pgx.Tx if it can, because
// that then reports to whoever still has it that it is closed.
func (c *conn) rollBack() {
	ctx, cancel := context.WithTimeout(context.Background(), rollbackTimeout)
	defer cancel()
	if c.tx != nil && c.tx.Rollback(ctx) == nil {
		return
	}
	_, _ = c.pgx.Exec(ctx, "ROLLBACK") // what comes of it shows in usable
}

// terminate is the message of Postgres' protocol that ends a session.
var terminate = []byte{'X', 0, 0, 0, 4}

// close closes the connection, and waits until the server has closed its end, because
// a successor that comes earlier would be one connection too many there. It has the
// server cancel what it is doing for the connection. How long that may take, the
// socket's end decides.
func (c *conn) close() {
	// Hijack takes the connection from pgxpool, because pgxpool's own closing may
	// take 15 s and keeps the place of the successor as long.
	c.pooled.Hijack()
	pg := c.pgx.PgConn()
	inUse := c.taken || pg.IsBusy()
	switch {
	case inUse:
		c.socket.end(true, closeTimeout)
	case c.lost:
		c.socket.end(false, lostTimeout)
	case pg.IsClosed():
		// pgx has closed it amid a statement. Mostly it is asking the server to cancel
		// that, once.
		select {
		case <-pg.CleanupDone():
		case <-time.After(cancelEvery):
		}
		c.socket.end(true, closeTimeout)
	default:
		_ = c.socket.SetDeadline(time.Now().Add(closeTimeout))
		_, _ = pg.Conn().Write(terminate)
		c.socket.end(false, closeTimeout)
	}
	<-c.socket.gone
	if !inUse { // else a goroutine that its job has forgotten may still use it
		_ = c.pgx.Close(context.Background())
	}
}

// holderAttrs returns a log's attributes that describe who holds the connection.
// The caller holds the pool's lock.
func (c *conn) holderAttrs(now time.Time) []any {
	var stack strings.Builder
	frames := runtime.CallersFrames(c.stack[:c.depth])
	for {
		f, more := frames.Next()
		if f.Function != "" {
			fmt.Fprintf(&stack, "%s\n\t%s:%d\n", f.Function, f.File, f.Line)
		}
		if !more {
			break
		}
	}
	attrs := []any{"held_by", c.borrower.String(), "held_for", now.Sub(c.acquiredAt).Round(time.Millisecond).String()}
	if c.rowsOpen.Load() {
		attrs = append(attrs, "rows", "left open")
	}
	return append(attrs, "acquired_at", stack.String())
}
