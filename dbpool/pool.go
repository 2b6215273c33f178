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
	cfg         Config
	px          *pgxpool.Pool
	log         *slog.Logger
	ctx         context.Context // ends when the pool is closed
	cancel      context.CancelFunc
	maintenance sync.WaitGroup

	sockets sockets

	// deaths counts what told that connections may be dead. It only grows; a
	// connection proven before the last one is a suspect.
	deaths atomic.Uint64
	loans  atomic.Uint64
	// writes is true once a connection was open that takes writes.
	writes atomic.Bool
	waits  [6]atomic.Uint64 // see Counts.Waits
	waited atomic.Uint64    // acquires that waited in line

	mu          sync.Mutex // guards what follows
	idle        []*member  // the longest idle first
	out         map[*member]struct{}
	opening     int       // connections under construction
	aside       int       // connections being validated or closed
	waiters     list.List // of *waiter, the first come first
	validations uint64
	recycledAt  time.Time // when a connection was last closed for its age
	connectErr  error     // of the last attempt, nil if it succeeded
	holdOff     bool      // after it failed, while others may be given back
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
	p.maintenance.Go(p.maintain)
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
	a := acquirer{pool: p, ctx: ctx, borrower: borrower, began: began, now: began}
	m, err := a.run()
	if a.giveUp != nil {
		a.giveUp.Stop()
	}
	if err == nil {
		p.lend(m, c, a.now.Sub(began), a.waited)
		return nil
	}
	if borrower != nil {
		borrower.waitedInVain(time.Since(began))
	}
	if _, ok := errors.AsType[*TimeoutError](err); ok {
		return fmt.Errorf("dbpool: %w", err) // it says the rest itself
	}
	return fmt.Errorf("dbpool: acquire: %w", err)
}

// acquirer is one call of Acquire.
type acquirer struct {
	pool     *Pool
	ctx      context.Context
	borrower *Borrower
	began    time.Time
	now      time.Time // not asked for while nothing takes time: it costs as much as the rest
	giveUp   *time.Timer
	waited   bool
	again    bool // it had a connection that could not be lent
}

// run returns a connection that is out and can be lent.
func (a *acquirer) run() (*member, error) {
	p := a.pool
	recycled := false
	for ; ; a.again = true {
		m, err := a.take()
		if err != nil {
			return nil, err
		}
		switch {
		case p.ctx.Err() != nil:
			p.discard(m, closedOthers)
			return nil, ErrClosed
		case m.expired(a.now) && !recycled && p.mayRecycle(a.now):
			recycled = true // one for each caller, or a very short life would have no end
			p.discardSoon(m, closedRecycled)
			continue
		case !p.cfg.PrePing || m.looksAlive(a.now):
			return m, nil
		}
		h, err := a.ping(m)
		if err != nil {
			return nil, err
		}
		switch h {
		case alive:
			return m, nil
		case silent:
			p.discard(m, closedBroken)
			suspects := p.setSuspectsAside()
			go p.ask(suspects)
		default:
			p.discard(m, closedBroken)
		}
	}
}

// ping asks the server about a connection, for no longer than the caller's
// context. If that ends first, the connection goes on without the caller.
func (a *acquirer) ping(m *member) (health, error) {
	defer func() { a.now = time.Now() }()
	p := a.pool
	if a.ctx.Done() == nil {
		return m.ping(), nil
	}
	answer := make(chan health, 1)
	go func() { answer <- m.ping() }()
	select {
	case h := <-answer:
		return h, nil
	case <-a.ctx.Done():
		p.setOutAside(m)
		go func() {
			switch <-answer {
			case alive:
				p.bringBack(m)
			case silent:
				p.dispose(m, closedBroken)
				p.ask(p.setSuspectsAside())
			default:
				p.dispose(m, closedBroken)
			}
		}()
		return dead, context.Cause(a.ctx)
	}
}

// take returns the connection that was used last; if there is none, or others
// wait for one, it waits in line, at its head if it was served before.
func (a *acquirer) take() (*member, error) {
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
		m := p.idle[last]
		p.idle[last] = nil
		p.idle = p.idle[:last]
		p.takeOut(m, a.borrower, a.now)
		p.mu.Unlock()
		return m, nil
	}
	a.waited = true
	w := &waiter{ch: make(chan handover, 1), borrower: a.borrower, since: time.Now()}
	var place *list.Element
	if a.again {
		place = p.waiters.PushFront(w)
	} else {
		place = p.waiters.PushBack(w)
	}
	p.openForWaiters()
	p.mu.Unlock()

	if a.giveUp == nil {
		a.giveUp = time.NewTimer(p.cfg.Timeout)
	}
	defer func() { a.now = time.Now() }()
	var reason error
	select {
	case h := <-w.ch:
		return h.member, h.err
	case <-a.ctx.Done():
		reason = context.Cause(a.ctx)
	case <-a.giveUp.C:
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	select {
	case h := <-w.ch: // at the last moment
		if reason == nil {
			return h.member, h.err
		}
		if h.member != nil {
			delete(p.out, h.member)
			if !p.give(h.member) {
				go p.dispose(h.member, closedOthers)
			}
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

// setSuspectsAside takes the idle suspects out of reach, to be asked.
func (p *Pool) setSuspectsAside() []*member {
	deaths := p.deaths.Load()
	var suspects []*member
	p.mu.Lock()
	defer p.mu.Unlock()
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
	return suspects
}

// ask asks connections that are aside for an answer, all at once: one of them was
// silent for a whole PingTimeout, and to ask the others in turn would take as
// long each. If they take up all places, one is closed unasked, so that a new
// connection can be tried meanwhile. It returns how many were closed.
func (p *Pool) ask(suspects []*member) int {
	p.mu.Lock()
	full := p.open() >= p.cfg.Size+p.cfg.MaxOverflow
	p.mu.Unlock()

	var closed atomic.Int64
	var asked sync.WaitGroup
	for i, m := range suspects {
		asked.Go(func() {
			if full && i == 0 || m.ping() != alive {
				closed.Add(1)
				p.dispose(m, closedBroken)
			} else {
				p.bringBack(m)
			}
		})
	}
	asked.Wait()
	return int(closed.Load())
}

// takeOut marks a connection as out. The caller holds the lock.
func (p *Pool) takeOut(m *member, b *Borrower, now time.Time) {
	m.lent, m.borrower, m.reported = now, b, false
	p.out[m] = struct{}{}
}

// lend begins the loan of a connection that is out and was checked.
func (p *Pool) lend(m *member, c *Conn, wait time.Duration, waited bool) {
	m.queries, m.broken, m.wasShut, m.tx = 0, false, false, nil
	if p.cfg.LeakAfter > 0 {
		m.depth = runtime.Callers(3, m.stack[:])
	}
	c.member, c.loan = m, p.loans.Add(1)
	m.loan.Store(c.loan)
	if m.borrower != nil {
		m.borrower.took(m, wait)
	}
	p.observeWait(wait)
	if waited {
		p.waited.Add(1)
	}
}

// giveBack ends a loan. A connection that lives, but can't be lent again, is
// closed for the reason given.
func (p *Pool) giveBack(m *member, reason closedFor) {
	now := time.Now()
	if b := m.borrower; b != nil {
		b.gave(m, now.Sub(m.lent))
	}
	m.fresh = false
	switch {
	case m.broken:
		p.discard(m, closedBroken)
	case m.conn.IsClosed() || !m.usable():
		p.discardSoon(m, reason)
	case m.expired(now) && p.mayRecycle(now):
		p.discardSoon(m, closedRecycled)
	default:
		m.idleSince = now
		p.putBack(m)
	}
}

// putBack takes back a connection that is out.
func (p *Pool) putBack(m *member) {
	p.mu.Lock()
	delete(p.out, m)
	kept := p.give(m)
	p.mu.Unlock()
	if !kept {
		p.dispose(m, closedOthers)
	}
}

// bringBack takes back a connection that is aside.
func (p *Pool) bringBack(m *member) {
	p.mu.Lock()
	p.aside--
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
	closedBroken                    // it is dead
	closedUnfit                     // it was given back in a bad state
	closedRecycled                  // its life is over
	closedOverflow                  // it is idle and beyond the size
	closedLeaked                    // it was not given back, and was left in a bad state
)

// discard closes a connection that is out.
func (p *Pool) discard(m *member, reason closedFor) {
	p.setOutAside(m)
	p.dispose(m, reason)
}

// discardSoon does so without letting the caller wait for the server.
func (p *Pool) discardSoon(m *member, reason closedFor) {
	p.setOutAside(m)
	go p.dispose(m, reason)
}

func (p *Pool) setOutAside(m *member) {
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.out, m)
	p.aside++
}

// dispose closes a connection that is aside, and lets another one have its
// place.
func (p *Pool) dispose(m *member, reason closedFor) {
	m.close(reason == closedBroken)
	p.mu.Lock()
	defer p.mu.Unlock()
	p.aside--
	switch reason {
	case closedBroken, closedUnfit:
		p.counts.ClosedBroken++
	case closedRecycled:
		p.counts.ClosedRecycled++
	case closedOverflow:
		p.counts.ClosedOverflow++
	case closedLeaked:
		p.counts.ClosedLeaked++
	}
	p.openForWaiters()
}

// open is the number of connections on the server, those on the way included.
// The caller holds the lock.
func (p *Pool) open() int { return len(p.idle) + len(p.out) + p.opening + p.aside }

// openForWaiters opens a connection for each who waits, as far as the limits go.
// The caller holds the lock.
func (p *Pool) openForWaiters() {
	for !p.closed && !p.holdOff && p.opening < p.waiters.Len() && p.open() < p.cfg.Size+p.cfg.MaxOverflow {
		p.opening++
		go func() { _ = p.openOne() }()
	}
}

// openAgainAfter is the pause after an attempt to connect that failed while
// other connections are open.
const openAgainAfter = 250 * time.Millisecond

// openOne opens the connection that p.opening was counted up for, and gives it to
// who waits first. It isn't bound to that caller's context: when the caller gives
// up, the next one has the use of it.
//
// A failure is told to who waits first, if no connection is open that he could
// get in its stead, and if he was waiting when the attempt began: for one who
// came later another is made.
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
	if err == nil {
		p.counts.Opened++
		m.idleSince = m.provenAt
		if !p.give(m) {
			go p.dispose(m, closedOthers)
			return ErrClosed
		}
		return nil
	}
	p.counts.ConnectErrors++
	if len(p.idle)+len(p.out)+p.aside > 0 {
		if !p.holdOff {
			p.holdOff = true
			time.AfterFunc(openAgainAfter, p.endHoldOff)
		}
		return err
	}
	if e := p.waiters.Front(); e != nil && e.Value.(*waiter).since.Before(began) {
		p.nextWaiter().ch <- handover{err: err}
	}
	p.openForWaiters()
	return err
}

func (p *Pool) endHoldOff() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.holdOff = false
	p.openForWaiters()
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
	first := !p.closed
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
		go p.dispose(m, closedOthers)
	}
	for giveUp := time.Now().Add(closeGrace); !p.allClosed(time.Now().After(giveUp)); {
		time.Sleep(5 * time.Millisecond)
	}
	p.maintenance.Wait()
	if first {
		p.px.Close()
	}
	p.sockets.closeAll()
}

// allClosed reports whether no connection is open. With force it closes those
// that are lent; what then is still open is on its way back.
func (p *Pool) allClosed(force bool) bool {
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
		m.px.Hijack()
	}
	return p.open() == 0
}
