package dbpool

import (
	"container/list"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"
)

// ErrClosed is wrapped by the errors of a pool that was closed.
var ErrClosed = errors.New("the pool is closed")

// Pool lends connections. It is safe for concurrent use.
//
// pgxpool opens the connections. The pool keeps those that are idle itself, so
// that one lock decides who gets which: the one used last is lent first, waiters
// are served in their order, and the one idle longest is validated or closed.
type Pool struct {
	cfg    Config
	px     *pgxpool.Pool
	log    *slog.Logger
	ctx    context.Context // ends when the pool is closed
	cancel context.CancelFunc
	work   sync.WaitGroup // the pool's own goroutines

	// deaths counts what told that connections may be dead. It only grows; a
	// connection proven before the last one is a suspect.
	deaths atomic.Uint64
	loans  atomic.Uint64
	waits  [6]atomic.Uint64 // see Counts.Waits

	mu          sync.Mutex // guards what follows
	idle        []*member  // the longest idle first
	out         map[*member]struct{}
	opening     int       // connections under construction
	aside       int       // connections being validated or closed
	waiters     list.List // of *waiter, the first come first
	validations uint64
	connectErr  error // of the last attempt, nil if it succeeded
	closed      bool
	counts      Counts
}

// waiter waits for a connection, or for the reason why there is none.
type waiter struct {
	ch       chan handover // of one place, so that nobody waits for the waiter
	borrower *Borrower
	since    time.Time
}

type handover struct {
	member *member
	err    error
}

// Open makes a pool. It connects to nothing yet; [Pool.Ping] does. The error
// names every fault of the configuration.
func Open(_ context.Context, cfg Config) (*Pool, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	p := &Pool{cfg: cfg, log: cfg.Logger, out: make(map[*member]struct{})}
	if p.log == nil {
		p.log = slog.Default()
	}
	pgxCfg, err := p.pgxConfig()
	if err != nil {
		return nil, fmt.Errorf("dbpool: %w", err)
	}
	p.ctx, p.cancel = context.WithCancel(context.Background())
	if p.px, err = pgxpool.NewWithConfig(p.ctx, pgxCfg); err != nil {
		p.cancel()
		return nil, fmt.Errorf("dbpool: %w", err)
	}
	p.work.Go(p.maintain)
	return p, nil
}

// Config returns what the pool was made with.
func (p *Pool) Config() Config { return p.cfg }

// Acquire lends a connection until [Conn.Release]. It waits for at most
// Config.Timeout and no longer than ctx; then the error is a [*TimeoutError], or
// wraps the cause of ctx's end. It wraps [ErrClosed] once the pool is closed, and
// is what connecting failed with if that is why there is no connection.
func (p *Pool) Acquire(ctx context.Context) (*Conn, error) {
	c := new(Conn)
	if err := p.acquire(ctx, c); err != nil {
		return nil, err
	}
	return c, nil
}

func (p *Pool) acquire(ctx context.Context, c *Conn) error {
	began := time.Now()
	borrower, _ := ctx.Value(borrowerKey{}).(*Borrower)
	var giveUp *time.Timer
	now := began // as long as nothing took time: the clock costs as much as the rest
	for first := true; ; first = false {
		m, err := p.takeIdle(ctx, borrower, began, first)
		if m == nil && err == nil {
			if giveUp == nil {
				giveUp = time.NewTimer(p.cfg.Timeout)
				defer giveUp.Stop()
			}
			m, err = p.await(ctx, borrower, giveUp.C, !first)
			now = time.Now()
		}
		if err != nil {
			if _, ok := errors.AsType[*TimeoutError](err); ok {
				return fmt.Errorf("dbpool: %w", err) // it says the rest itself
			}
			return fmt.Errorf("dbpool: acquire: %w", err)
		}
		switch {
		case p.ctx.Err() != nil:
			p.discard(m, closedOthers)
			return fmt.Errorf("dbpool: acquire: %w", ErrClosed)
		case m.expired(now):
			p.discard(m, closedRecycled)
			continue
		}
		health := alive
		if p.cfg.PrePing && !m.looksAlive(now) {
			health = m.ping(ctx)
			now = time.Now()
		}
		switch health {
		case alive:
			p.lend(m, c, now.Sub(began))
			return nil
		case silent:
			p.closeSuspects()
		}
		p.discard(m, closedBroken)
	}
}

// closeSuspects closes the idle connections that are suspects, because one of
// them did not answer in time. To ask each of them would take a whole
// PingTimeout again, and a new connection is a better question to a server that
// may be away. It returns how many it closed.
func (p *Pool) closeSuspects() int {
	deaths := p.deaths.Load()
	var suspects []*member
	p.mu.Lock()
	kept := p.idle[:0]
	for _, m := range p.idle {
		if m.proven < deaths {
			suspects = append(suspects, m)
		} else {
			kept = append(kept, m)
		}
	}
	clear(p.idle[len(kept):])
	p.idle = kept
	p.aside += len(suspects)
	p.mu.Unlock()
	for _, m := range suspects {
		p.dispose(m, closedBroken)
	}
	return len(suspects)
}

// takeIdle returns the connection that was used last, or nil if there is none
// that this caller may have before others.
func (p *Pool) takeIdle(ctx context.Context, b *Borrower, now time.Time, first bool) (*member, error) {
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return nil, ErrClosed
	}
	if len(p.idle) == 0 || first && p.waiters.Len() > 0 {
		return nil, nil
	}
	m := p.idle[len(p.idle)-1]
	p.idle[len(p.idle)-1] = nil
	p.idle = p.idle[:len(p.idle)-1]
	p.takeOut(m, b, now)
	if first {
		p.counts.AcquiredDirect++
	}
	return m, nil
}

// await waits in line, at its head if it was there before, and has a connection
// opened if there may be one more.
func (p *Pool) await(ctx context.Context, b *Borrower, timeout <-chan time.Time, again bool) (*member, error) {
	w := &waiter{ch: make(chan handover, 1), borrower: b, since: time.Now()}
	p.mu.Lock()
	if p.closed {
		p.mu.Unlock()
		return nil, ErrClosed
	}
	var place *list.Element
	if again {
		place = p.waiters.PushFront(w)
	} else {
		place = p.waiters.PushBack(w)
	}
	p.openForWaiters()
	p.mu.Unlock()

	var reason error
	select {
	case h := <-w.ch:
		return p.waited(h, again)
	case <-ctx.Done():
		reason = context.Cause(ctx)
	case <-timeout:
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	select {
	case h := <-w.ch: // at the last moment
		p.mu.Unlock()
		defer p.mu.Lock()
		return p.waited(h, again)
	default:
	}
	if reason == nil {
		p.counts.TimedOut++
		reason = p.timeoutError()
	}
	p.waiters.Remove(place)
	return nil, reason
}

func (p *Pool) waited(h handover, again bool) (*member, error) {
	if h.err == nil && !again {
		p.mu.Lock()
		p.counts.AcquiredWaited++
		p.mu.Unlock()
	}
	return h.member, h.err
}

// takeOut marks a connection as out. The caller holds the lock.
func (p *Pool) takeOut(m *member, b *Borrower, now time.Time) {
	m.lent, m.borrower, m.reported = now, b, false
	p.out[m] = struct{}{}
}

// lend begins the loan of a connection that is out and was checked.
func (p *Pool) lend(m *member, c *Conn, wait time.Duration) {
	m.queries, m.broken, m.tx = 0, false, nil
	if p.cfg.LeakAfter > 0 {
		clear(m.stack[:])
		runtime.Callers(3, m.stack[:])
	}
	c.member, c.loan = m, p.loans.Add(1)
	m.loan.Store(c.loan)
	if m.borrower != nil {
		m.borrower.took(m, wait)
	}
	p.observeWait(wait)
}

// giveBack ends a loan.
func (p *Pool) giveBack(m *member) {
	usable := m.usable()
	now := time.Now()
	if b := m.borrower; b != nil {
		b.gave(m, now.Sub(m.lent))
	}
	if !usable {
		p.discard(m, closedBroken)
		return
	}
	if m.expired(now) {
		p.discard(m, closedRecycled)
		return
	}
	p.mu.Lock()
	delete(p.out, m)
	m.idleSince = now
	kept := p.give(m)
	p.mu.Unlock()
	if !kept {
		p.dispose(m, closedOthers)
	}
}

// give hands a connection to the first who waits, or keeps it idle. If the pool
// is closed it does neither: the caller must dispose of it. The caller holds the
// lock, and the connection is neither idle nor out nor aside.
func (p *Pool) give(m *member) (kept bool) {
	if p.closed {
		p.aside++
		return false
	}
	if w := p.nextWaiter(); w != nil {
		p.takeOut(m, w.borrower, time.Now())
		w.ch <- handover{member: m}
		return true
	}
	// Mostly at the end, but a connection that was validated keeps its place.
	i := len(p.idle)
	for i > 0 && p.idle[i-1].idleSince.After(m.idleSince) {
		i--
	}
	p.idle = slices.Insert(p.idle, i, m)
	return true
}

func (p *Pool) nextWaiter() *waiter {
	e := p.waiters.Front()
	if e == nil {
		return nil
	}
	return p.waiters.Remove(e).(*waiter)
}

// closedFor is why a connection is closed.
type closedFor int

const (
	closedOthers   closedFor = iota // the pool is closed
	closedBroken                    // it is dead, or in a bad state
	closedRecycled                  // its life is over
	closedOverflow                  // it is idle and beyond the size
)

// discard closes a connection that is out.
func (p *Pool) discard(m *member, reason closedFor) {
	p.mu.Lock()
	delete(p.out, m)
	p.aside++
	p.mu.Unlock()
	p.dispose(m, reason)
}

// dispose closes a connection that is aside, and lets another one have its
// place.
func (p *Pool) dispose(m *member, reason closedFor) {
	m.close(reason == closedBroken)
	p.mu.Lock()
	defer p.mu.Unlock()
	p.aside--
	switch reason {
	case closedBroken:
		p.counts.ClosedBroken++
	case closedRecycled:
		p.counts.ClosedRecycled++
	case closedOverflow:
		p.counts.ClosedOverflow++
	}
	p.openForWaiters()
}

// open is the number of connections on the server, those on the way included.
// The caller holds the lock.
func (p *Pool) open() int { return len(p.idle) + len(p.out) + p.opening + p.aside }

// openForWaiters opens a connection for each who waits, as far as the limits go.
// The caller holds the lock.
func (p *Pool) openForWaiters() {
	for !p.closed && p.opening < p.waiters.Len() && p.open() < p.cfg.Size+p.cfg.MaxOverflow {
		p.opening++
		p.work.Go(func() { _ = p.openOne() })
	}
}

// openOne opens the connection that p.opening was counted up for, and gives it,
// or the error, to who waits first. It isn't bound to that caller's context: when
// the caller gives up, the next one has the use of it. But one who came later
// isn't told of a failure that may be over: an attempt of his own is made.
func (p *Pool) openOne() error {
	began := time.Now()
	c, err := p.px.Acquire(p.ctx)
	var m *member
	if err == nil {
		m = memberOf(c.Conn())
		m.attach(c)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.opening--
	p.connectErr = err
	if err != nil {
		p.counts.ConnectErrors++
		if e := p.waiters.Front(); e != nil && e.Value.(*waiter).since.Before(began) {
			p.nextWaiter().ch <- handover{err: err}
		}
		p.openForWaiters()
		return err
	}
	p.counts.Opened++
	m.idleSince = time.Now()
	if !p.give(m) {
		p.work.Go(func() { p.dispose(m, closedOthers) })
		return ErrClosed
	}
	return nil
}

// died makes every connection a suspect: each is asked before it is lent next.
func (p *Pool) died() { p.deaths.Add(1) }

// closeGrace is how long Close waits for connections that are out.
const closeGrace = 2 * time.Second

// Close closes all connections. It waits a short while for those that are out,
// logs who holds them, and then closes them too: it never hangs on a leak.
// Closing twice is safe.
func (p *Pool) Close() {
	p.mu.Lock()
	if p.closed {
		p.mu.Unlock()
		p.work.Wait()
		return
	}
	p.closed = true
	for w := p.nextWaiter(); w != nil; w = p.nextWaiter() {
		w.ch <- handover{err: ErrClosed}
	}
	idle := p.idle
	p.idle = nil
	p.aside += len(idle)
	p.mu.Unlock()
	p.cancel()
	for _, m := range idle {
		p.work.Go(func() { p.dispose(m, closedOthers) })
	}
	for giveUp := time.Now().Add(closeGrace); !p.allBack(time.Now().After(giveUp)); {
		time.Sleep(10 * time.Millisecond)
	}
	p.work.Wait()
	p.px.Close()
}

// allBack reports whether no connection is out. With force it closes those that
// are lent; what then is still out is being checked, and on its way back.
func (p *Pool) allBack(force bool) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	for m := range p.out {
		if loan := m.loan.Load(); !force || loan == 0 || !m.loan.CompareAndSwap(loan, 0) {
			continue
		}
		p.log.Warn("a connection was not given back before the pool was closed", m.holder(time.Now())...)
		p.counts.ClosedLeaked++
		delete(p.out, m)
		// Whoever still uses it gets an error from the socket.
		_ = m.net.Close()
		m.conn.Hijack()
	}
	return len(p.out) == 0
}
