// Package dbpool is a pool of Postgres connections that checks a connection
// before it lends it, bounds every wait, and knows who holds what.
//
// It is for any Go program that uses Postgres through pgx and has to go on
// working when its server restarts or its network fails. A carpool task gets the
// worker's pool with its job; any other program opens one with [Open]. [Pool] and
// [Conn] have pgx's methods (Exec, Query, QueryRow, SendBatch, CopyFrom, Begin), so
// code written for a pgxpool.Pool or a pgx.Conn works on them.
//
// Connections are opened by pgx's pgxpool. The pool adds to it:
//
//   - a check before each loan that costs no round trip in most cases
//     ([Config].PrePing);
//   - a check of all others once one connection is found dead, so that the next
//     caller gets none that died with it;
//   - waiters that are served in order, and a [TimeoutError] that names those who
//     hold the connections;
//   - accounts for each user of the pool, whose forgotten connections it takes
//     back ([Pool.Track]);
//   - a regular check of what is idle ([Pool.Validate]) and a consistent snapshot
//     of the figures ([Pool.Stats]).
//
// Its settings are those of SQLAlchemy's QueuePool: a size that is kept, an
// overflow for load, a bounded wait, recycling, and the check before each loan.
package dbpool

import (
	"container/list"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"
)

// ErrClosed is wrapped by the errors of a pool that was closed, those of callers
// that were waiting for a connection included.
var ErrClosed = errors.New("the pool is closed")

// Pool lends connections to Postgres. It is made by [Open], must be closed, and is
// safe for concurrent use; its zero value is of no use.
//
// The connection used last is lent first, so that the others can go idle and the
// overflow can be closed. Callers that have to wait are served in order.
//
// The methods that run a statement acquire a connection for it, as [Pool.Acquire]
// does and with its errors, and release it afterwards.
type Pool struct {
	cfg         Config
	px          *pgxpool.Pool // opens connections; which of them is lent is decided here
	log         *slog.Logger
	ctx         context.Context // ends when the pool is closed
	cancel      context.CancelFunc
	maintenance sync.WaitGroup

	sockets *sockets

	// generation grows with each fault that other connections may have suffered
	// too. A connection that was verified in an earlier generation is stale.
	generation atomic.Uint64
	loans      atomic.Uint64
	// writes is true once a connection was opened that takes writes.
	writes atomic.Bool
	waits  [6]atomic.Uint64 // see Counts.Waits
	waited atomic.Uint64    // acquires that waited in line

	mu sync.Mutex // guards what follows
	// conns are all connections that are not closed, idle those in stateIdle, the
	// longest idle first. count has the number of conns in each state but
	// stateClosed. Only setState changes the three.
	conns       map[*conn]struct{}
	idle        []*conn
	count       [numStates]int
	waiters     list.List // of *waiter, the first come first
	validations uint64
	recycledAt  time.Time // when a connection was last closed for its age
	connectErr  error     // of the last attempt, nil if it succeeded
	backingOff  bool      // from connecting, because the last attempt failed
	closed      bool
	counts      Counts
}

// waiter is a caller of Acquire that waits for a connection.
type waiter struct {
	ch       chan handover // has room for one, so that the sender goes on at once
	borrower *Borrower
	since    time.Time
}

// handover is what a waiter gets: a connection, or the reason why there is none.
type handover struct {
	conn *conn
	err  error
}

// Open makes a pool. It connects to nothing and does not use ctx; the first
// connection is opened by [Pool.Ping] or by whatever else needs one. The error
// names every fault of the configuration, as [Config.Validate] does.
func Open(_ context.Context, cfg Config) (*Pool, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	p := &Pool{cfg: cfg, log: cfg.Logger, conns: make(map[*conn]struct{})}
	if p.log == nil {
		p.log = slog.Default()
	}
	p.sockets = newSockets(p.log)
	pgxCfg, err := p.pgxConfig()
	if err != nil {
		return nil, fmt.Errorf("dbpool: %w", err)
	}
	p.ctx, p.cancel = context.WithCancel(context.Background())
	if p.px, err = pgxpool.NewWithConfig(p.ctx, pgxCfg); err != nil {
		p.cancel()
		return nil, fmt.Errorf("dbpool: %w", err)
	}
	p.maintenance.Go(p.maintain)
	return p, nil
}

// Config returns what the pool was made with. Its URL may hold a password.
func (p *Pool) Config() Config { return p.cfg }

// Acquire lends a connection until [Conn.Release] is called. It waits for one for at
// most [Config].Timeout, the opening of a new one included; each ping of one that it
// gets adds at most PingTimeout. It never waits longer than ctx. The error is
//
//   - a [*TimeoutError] if no connection came free in time;
//   - the cause of ctx's end, wrapped, if ctx ended first;
//   - what connecting failed with, wrapped, if no connection is open and none can
//     be opened: a [github.com/jackc/pgx/v5/pgconn.ConnectError], mostly;
//   - [ErrClosed], wrapped, once the pool is closed.
func (p *Pool) Acquire(ctx context.Context) (*Conn, error) {
	c := new(Conn)
	if err := p.acquire(ctx, c); err != nil {
		return nil, err
	}
	return c, nil
}

func (p *Pool) acquire(ctx context.Context, handle *Conn) error {
	began := time.Now()
	borrower, _ := ctx.Value(borrowerKey{}).(*Borrower)
	a := acquirer{pool: p, ctx: ctx, borrower: borrower, began: began, now: began}
	c, err := a.run()
	if a.giveUp != nil {
		a.giveUp.Stop()
	}
	if err == nil {
		p.lend(c, handle, a.now.Sub(began), a.waited)
		return nil
	}
	if borrower != nil {
		borrower.addWait(time.Since(began))
	}
	if _, ok := errors.AsType[*TimeoutError](err); ok {
		return fmt.Errorf("dbpool: %w", err) // its text says what was tried
	}
	return fmt.Errorf("dbpool: acquire: %w", err)
}

// acquirer is one call of Acquire.
type acquirer struct {
	pool     *Pool
	ctx      context.Context
	borrower *Borrower
	began    time.Time
	// now is read anew only after something that takes time, because reading the
	// clock costs as much as the rest of acquiring an idle connection.
	now    time.Time
	giveUp *time.Timer
	waited bool
	again  bool // it was served before, with a connection that could not be lent
}

// run returns an acquired connection that can be lent. It takes one after
// another until it has such a one.
func (a *acquirer) run() (*conn, error) {
	p := a.pool
	recycled := false
	for ; ; a.again = true {
		c, err := a.take()
		if err != nil {
			return nil, err
		}
		switch {
		case p.ctx.Err() != nil:
			p.destroy(c, closedWithPool)
			return nil, ErrClosed
		case c.expired(a.now) && !recycled && p.mayRecycle(a.now):
			recycled = true // once for each caller, because a very short Recycle would keep it here for ever
			p.destroyLater(c, closedRecycled)
			continue
		case !p.cfg.PrePing || c.looksAlive(a.now):
			return c, nil
		}
		health, err := a.ping(c)
		if err != nil {
			return nil, err
		}
		if health == alive {
			return c, nil
		}
		p.destroy(c, closedBroken)
		if health == silent {
			stale := p.detachStale()
			go p.pingAll(stale)
		}
	}
}

// ping pings an acquired connection, for no longer than the caller's context. If
// that ends first, the ping goes on without the caller, because its result is of
// use to the next one.
func (a *acquirer) ping(c *conn) (health, error) {
	defer func() { a.now = time.Now() }()
	p := a.pool
	if a.ctx.Done() == nil {
		return c.ping(), nil
	}
	pinged := make(chan health, 1)
	go func() { pinged <- c.ping() }()
	select {
	case h := <-pinged:
		return h, nil
	case <-a.ctx.Done():
		p.detach(c)
		go func() {
			h := <-pinged
			if h == alive {
				p.putBack(c)
				return
			}
			p.destroy(c, closedBroken)
			if h == silent {
				p.pingAll(p.detachStale())
			}
		}()
		return dead, context.Cause(a.ctx)
	}
}

// take acquires the idle connection that was used last. If none is idle, or if
// others wait already, it joins the line of waiters: at its head if it was served
// before, because its turn had come then, else at its end.
func (a *acquirer) take() (*conn, error) {
	if a.ctx.Err() != nil {
		return nil, context.Cause(a.ctx)
	}
	p := a.pool
	p.mu.Lock()
	if p.closed {
		p.mu.Unlock()
		return nil, ErrClosed
	}
	if last := len(p.idle) - 1; last >= 0 && (a.again || p.waiters.Len() == 0) {
		c := p.idle[last]
		p.acquireLocked(c, a.borrower, a.now)
		p.mu.Unlock()
		return c, nil
	}
	a.waited = true
	w := &waiter{ch: make(chan handover, 1), borrower: a.borrower, since: time.Now()}
	var place *list.Element
	if a.again {
		place = p.waiters.PushFront(w)
	} else {
		place = p.waiters.PushBack(w)
	}
	p.connectForWaiters()
	p.mu.Unlock()

	if a.giveUp == nil {
		a.giveUp = time.NewTimer(p.cfg.Timeout)
	}
	defer func() { a.now = time.Now() }()
	var reason error
	select {
	case h := <-w.ch:
		return h.conn, h.err
	case <-a.ctx.Done():
		reason = context.Cause(a.ctx)
	case <-a.giveUp.C:
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	select {
	case h := <-w.ch: // at the last moment
		if reason == nil {
			return h.conn, h.err
		}
		if h.conn != nil && !p.putBackLocked(h.conn) {
			go p.destroy(h.conn, closedWithPool)
		}
		return nil, reason
	default:
	}
	if reason == nil {
		p.counts.TimedOut++
		reason = p.timeoutError(a.borrower)
	}
	p.waiters.Remove(place)
	return nil, reason
}

// lend begins the loan of an acquired connection, which was checked.
func (p *Pool) lend(c *conn, handle *Conn, wait time.Duration, waited bool) {
	c.queries, c.broken, c.wasClosed, c.tx = 0, false, false, nil
	if p.cfg.LeakAfter > 0 {
		c.depth = runtime.Callers(3, c.stack[:])
	}
	handle.conn, handle.loan = c, p.loans.Add(1)
	c.loan.Store(handle.loan)
	if c.borrower != nil {
		c.borrower.addLoan(c, wait)
	}
	p.observeWait(wait)
	if waited {
		p.waited.Add(1)
	}
}

// release ends the loan of an acquired connection, and puts it back if it can be
// lent again. If it lives but is left in a state in which it can't, it is closed
// for the reason given.
func (p *Pool) release(c *conn, reason closeReason) {
	now := time.Now()
	if b := c.borrower; b != nil {
		b.endLoan(c, now.Sub(c.acquiredAt))
	}
	c.fresh = false
	switch {
	case c.broken:
		p.destroyLater(c, closedBroken)
	case c.pgx.IsClosed() || !c.usable():
		p.destroyLater(c, reason)
	case c.expired(now) && p.mayRecycle(now):
		p.destroyLater(c, closedRecycled)
	default:
		c.idleSince = now
		p.putBack(c)
	}
}

// newGeneration makes all connections stale, so that each is pinged before it is
// lent next.
func (p *Pool) newGeneration() { p.generation.Add(1) }

// detachStale takes the stale ones from the idle connections, to be pinged.
func (p *Pool) detachStale() []*conn {
	p.mu.Lock()
	defer p.mu.Unlock()
	var stale []*conn
	for _, c := range p.idle {
		if c.stale() {
			stale = append(stale, c)
		}
	}
	for _, c := range stale {
		p.setState(c, stateDetached)
	}
	return stale
}

// pingAll pings detached connections, all at once because each that is silent
// takes a whole PingTimeout, as another one just did. It puts back those that
// answer, closes the others, and returns how many it closed. If the pool is full,
// it closes one of them without a ping, because a new connection, which may
// succeed meanwhile, needs its place.
func (p *Pool) pingAll(conns []*conn) int {
	p.mu.Lock()
	full := len(p.conns) >= p.cfg.Size+p.cfg.MaxOverflow
	p.mu.Unlock()

	var closed atomic.Int64
	var pings sync.WaitGroup
	for i, c := range conns {
		pings.Go(func() {
			c.lost = full && i == 0
			if c.lost || c.ping() != alive {
				closed.Add(1)
				p.destroy(c, closedBroken)
			} else {
				p.putBack(c)
			}
		})
	}
	pings.Wait()
	return int(closed.Load())
}

// nextWaiter takes the first waiter from the line; it is nil if nobody waits. The
// caller holds the lock.
func (p *Pool) nextWaiter() *waiter {
	e := p.waiters.Front()
	if e == nil {
		return nil
	}
	return p.waiters.Remove(e).(*waiter)
}

// connectForWaiters opens a connection for each waiter, as far as the limits go.
// The caller holds the lock.
func (p *Pool) connectForWaiters() {
	for !p.closed && !p.backingOff && p.count[stateConnecting] < p.waiters.Len() && len(p.conns) < p.cfg.Size+p.cfg.MaxOverflow {
		c := p.newConn()
		go func() { _ = p.connect(c) }()
	}
}

// newConn returns a connection in stateConnecting, for connect to open. The caller
// holds the lock.
func (p *Pool) newConn() *conn {
	c := &conn{pool: p}
	p.setState(c, stateConnecting)
	return c
}

// connectBackoff is the pause after an attempt to connect that failed while
// other connections are open.
const connectBackoff = 250 * time.Millisecond

// connect opens a connection and puts it into the pool. It is bound to the pool's
// context alone, because the connection is of use to the next waiter when the one
// it was opened for gives up.
//
// If it fails, the first waiter gets the error, provided that no other connection
// is open that may come free for him, and that he was waiting when the attempt
// began; for one who came later another attempt is made. The attempt's place stays
// taken until the server has given up on it too.
func (p *Pool) connect(c *conn) error {
	began := time.Now()
	c.verified = p.generation.Load()
	pooled, err := p.px.Acquire(context.WithValue(p.ctx, connKey{}, c))
	if err == nil {
		c.attach(pooled)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.connectErr = err
	if err == nil {
		p.counts.Opened++
		c.idleSince = c.answeredAt
		if !p.putBackLocked(c) {
			go p.destroy(c, closedWithPool)
			return ErrClosed
		}
		return nil
	}
	p.abandonAttempt(c)
	p.counts.ConnectErrors++
	if len(p.conns) > p.count[stateConnecting]+p.count[stateClosing] {
		if !p.backingOff {
			p.backingOff = true
			time.AfterFunc(connectBackoff, p.endBackoff)
		}
		return err
	}
	if e := p.waiters.Front(); e != nil && e.Value.(*waiter).since.Before(began) {
		p.nextWaiter().ch <- handover{err: err}
	}
	p.connectForWaiters()
	return err
}

// abandonAttempt ends what a failed attempt to connect has left at the server. The
// caller holds the lock.
func (p *Pool) abandonAttempt(c *conn) {
	left := p.sockets.of(c)
	if len(left) == 0 {
		p.setState(c, stateClosed)
		return
	}
	p.setState(c, stateClosing)
	for _, s := range left {
		s.end(true, closeTimeout) // AfterConnect may have left something
	}
	go func() {
		for _, s := range left {
			<-s.gone
		}
		p.vacate(c)
	}()
}

func (p *Pool) endBackoff() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.backingOff = false
	p.connectForWaiters()
}

// closeGrace is how long Close waits for connections that are lent, and then as long
// again for the server to end what it does for them.
const closeGrace = 2 * time.Second

// Close closes all connections, and ends the wait of those who wait for one with
// [ErrClosed]. Connections that are lent have 2 s to be released; then Close logs
// who holds them and closes them too, so that a leak can't keep a program from
// ending. What the server still does for any of them is cancelled, and its end is
// waited for: that takes milliseconds, and 2 s more at most. Closing twice is safe.
func (p *Pool) Close() {
	p.mu.Lock()
	first := !p.closed
	p.closed = true
	for w := p.nextWaiter(); w != nil; w = p.nextWaiter() {
		w.ch <- handover{err: ErrClosed}
	}
	for len(p.idle) > 0 {
		c := p.idle[0]
		p.setState(c, stateDetached)
		go p.destroy(c, closedWithPool)
	}
	p.mu.Unlock()
	p.cancel()
	for began := time.Now(); !p.allClosed(time.Since(began) > closeGrace); time.Sleep(5 * time.Millisecond) {
		if time.Since(began) > 2*closeGrace {
			p.sockets.closeAll()
		}
	}
	p.maintenance.Wait()
	if first {
		p.px.Close()
	}
	p.sockets.closeAll()
}

// allClosed reports whether all connections are closed. With force it closes those
// that are lent; the others are about to be closed by whoever opens or checks them.
func (p *Pool) allClosed(force bool) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	for c := range p.conns {
		if !force || c.state != stateAcquired {
			continue
		}
		if loan := c.loan.Load(); loan == 0 || !c.loan.CompareAndSwap(loan, 0) {
			continue // it is being checked, or was released just now
		}
		p.log.Warn("a connection was not given back before the pool was closed", c.holderAttrs(time.Now())...)
		c.taken = true // whoever still uses it gets an error from the socket
		p.beginClosing(c, closedLeaked)
		go p.finishClosing(c)
	}
	return len(p.conns) == 0
}
