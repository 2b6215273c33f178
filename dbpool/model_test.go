package dbpool_test

import (
	"context"
	"errors"
	"log/slog"
	"net/url"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"pgregory.net/rapid"

	"github.com/carpool-go/carpool/dbpool"
	"github.com/carpool-go/carpool/internal/testservers"
)

// model is a plain picture of what a pool must be: who holds a connection, and
// which of those connections were broken by a fault. Whatever is idle, the pool
// has to sort out itself.
type model struct {
	pool   *dbpool.Pool
	proxy  *testservers.Proxy
	direct *pgx.Conn // to the server, not through the proxy
	limit  int       // size and overflow
	held   []*loan
	// readOnly are the backends that a failover has left behind.
	readOnly map[uint32]bool
}

type loan struct {
	conn     *dbpool.Conn
	ctx      context.Context
	borrower *dbpool.Borrower // nil for some
	pid      uint32
	broken   bool
}

func TestPool_KeepsItsPromisesThroughAnyHistory(t *testing.T) {
	t.Parallel()
	databaseURL := testservers.Postgres(t)
	rapid.Check(t, func(rt *rapid.T) {
		m := newModel(t, rt, databaseURL)
		defer m.close(rt)
		rt.Repeat(map[string]func(*rapid.T){
			"":                  m.check,
			"acquire":           m.acquire,
			"acquire too late":  m.acquireWithAContextThatEnded,
			"release":           m.release,
			"query":             m.query,
			"forget":            m.forget,
			"kill one":          m.killOne,
			"kill all":          m.killAll,
			"reset all":         m.resetAll,
			"outage":            m.outage,
			"black hole":        m.blackHole,
			"failover":          m.failover,
			"validate":          m.validate,
			"queue up":          m.queueUp,
			"give up in a line": m.giveUp,
		})
	})
}

func newModel(t *testing.T, rt *rapid.T, databaseURL string) *model {
	u, err := url.Parse(databaseURL)
	if err != nil {
		rt.Fatal(err)
	}
	m := &model{proxy: testservers.NewProxy(t, u.Host), readOnly: map[uint32]bool{}}
	if m.direct, err = pgx.Connect(context.Background(), databaseURL); err != nil {
		rt.Fatal(err)
	}
	u.Host = m.proxy.Addr()
	cfg := dbpool.DefaultConfig(u.String())
	cfg.Size = rapid.IntRange(1, 3).Draw(rt, "size")
	cfg.MaxOverflow = rapid.IntRange(0, 2).Draw(rt, "overflow")
	cfg.OverflowIdle = 0
	cfg.PingTimeout, cfg.Timeout = 300*time.Millisecond, 20*time.Second
	cfg.Logger = slog.New(slog.DiscardHandler)
	m.limit = cfg.Size + cfg.MaxOverflow
	if m.pool, err = dbpool.Open(context.Background(), cfg); err != nil {
		rt.Fatal(err)
	}
	return m
}

func (m *model) close(rt *rapid.T) {
	for _, l := range m.held {
		if rapid.Bool().Draw(rt, "give back before the end") {
			l.conn.Release()
		}
	}
	m.pool.Close()
	if _, err := m.pool.Acquire(context.Background()); !errors.Is(err, dbpool.ErrClosed) {
		rt.Errorf("the closed pool says %v", err)
	}
	for _, l := range m.held {
		l.conn.Release() // harmless now
	}
	if s := m.pool.Stats(); s.CheckedIn+s.CheckedOut+s.Overflow+s.Waiting != 0 {
		rt.Errorf("the closed pool has %+v", s)
	}
	_ = m.direct.Close(context.Background())
}

// check holds after every step.
func (m *model) check(rt *rapid.T) {
	s := m.pool.Stats()
	if s.CheckedOut != len(m.held) || s.Waiting != 0 || s.CheckedIn+s.CheckedOut > m.limit || s.Overflow > m.limit-s.PoolSize {
		rt.Fatalf("%d are held of %d; the pool says %+v", len(m.held), m.limit, s)
	}
	// One that a fault has cut off takes the server a moment to notice.
	n := m.backends(rt)
	for giveUp := time.Now().Add(10 * time.Second); n > m.limit && time.Now().Before(giveUp); n = m.backends(rt) {
		time.Sleep(time.Millisecond)
	}
	if n > m.limit {
		rt.Fatalf("the server has %d connections of the pool's, more than %d", n, m.limit)
	}
}

func (m *model) backends(rt *rapid.T) (n int) {
	err := m.direct.QueryRow(context.Background(), `SELECT count(*) FROM pg_stat_activity
		WHERE datname = current_database() AND pid <> pg_backend_pid() AND backend_type = 'client backend'`).Scan(&n)
	if err != nil {
		rt.Fatal(err)
	}
	return n
}

func (m *model) acquire(rt *rapid.T) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	l := &loan{ctx: context.Background()}
	if rapid.Bool().Draw(rt, "tracked") {
		l.ctx, l.borrower = m.pool.Track(l.ctx, "somebody")
		ctx, cancel = context.WithTimeout(l.ctx, time.Minute)
		defer cancel()
	}
	if len(m.held) == m.limit {
		ctx, cancel = context.WithTimeout(ctx, 10*time.Millisecond)
		defer cancel()
		if _, err := m.pool.Acquire(ctx); !errors.Is(err, context.DeadlineExceeded) {
			rt.Fatalf("all are held, and another acquire says %v", err)
		}
		return
	}
	c, err := m.pool.Acquire(ctx)
	if err != nil {
		rt.Fatalf("%d are held of %d, and acquire says %v", len(m.held), m.limit, err)
	}
	l.conn, l.pid = c, pid(c)
	for _, other := range m.held {
		if other.pid == l.pid && !other.broken {
			rt.Fatalf("backend %d is lent twice", l.pid)
		}
	}
	if m.readOnly[l.pid] {
		rt.Fatalf("backend %d was left behind by a failover, and is lent", l.pid)
	}
	m.held = append(m.held, l)
	if _, err := c.Exec(ctx, "SELECT 1"); err != nil {
		rt.Fatalf("a dead connection was lent: %v", err)
	}
}

func (m *model) acquireWithAContextThatEnded(rt *rapid.T) {
	gone := errors.New("gone")
	ctx, cancel := context.WithCancelCause(context.Background())
	cancel(gone)
	if _, err := m.pool.Acquire(ctx); !errors.Is(err, gone) {
		rt.Fatalf("acquire says %v", err)
	}
}

// pick takes one of the loans, or skips the step if there is none.
func (m *model) pick(rt *rapid.T) (int, *loan) {
	if len(m.held) == 0 {
		rt.Skip("none is held")
	}
	i := rapid.IntRange(0, len(m.held)-1).Draw(rt, "which")
	return i, m.held[i]
}

func (m *model) drop(i int) { m.held = append(m.held[:i], m.held[i+1:]...) }

func (m *model) release(rt *rapid.T) {
	i, l := m.pick(rt)
	for range rapid.IntRange(1, 2).Draw(rt, "times") {
		l.conn.Release()
	}
	if _, err := l.conn.Exec(l.ctx, "SELECT 1"); !errors.Is(err, dbpool.ErrReleased) {
		rt.Fatalf("a connection that was given back says %v", err)
	}
	m.drop(i)
}

func (m *model) query(rt *rapid.T) {
	_, l := m.pick(rt)
	ctx, cancel := context.WithTimeout(l.ctx, time.Minute)
	defer cancel()
	_, err := l.conn.Exec(ctx, "SELECT 1")
	if (err != nil) != l.broken {
		rt.Fatalf("a query on a connection says %v; broken by a fault: %v", err, l.broken)
	}
}

// forget ends a borrower that holds a connection in some state.
func (m *model) forget(rt *rapid.T) {
	i, l := m.pick(rt)
	if l.borrower == nil {
		rt.Skip("not tracked")
	}
	if !l.broken {
		switch rapid.SampledFrom([]string{"idle", "transaction", "failed transaction", "rows"}).Draw(rt, "left") {
		case "transaction":
			_, _ = l.conn.Begin(l.ctx)
		case "failed transaction":
			_, _ = l.conn.Begin(l.ctx)
			_, _ = l.conn.Exec(l.ctx, "SELECT nonsense")
		case "rows":
			_, _ = l.conn.Query(l.ctx, "SELECT generate_series(1, 100000)")
		}
	}
	if u := l.borrower.End(); u.Leaked != 1 {
		rt.Fatalf("the borrower forgot one connection; its usage is %+v", u)
	}
	m.drop(i)
}

func (m *model) killOne(rt *rapid.T) {
	_, l := m.pick(rt)
	if l.broken {
		rt.Skip("broken already")
	}
	if _, err := m.direct.Exec(context.Background(), "SELECT pg_terminate_backend($1, 10000)", l.pid); err != nil {
		rt.Fatal(err)
	}
	l.broken = true
}

func (m *model) killAll(rt *rapid.T) {
	_, err := m.direct.Exec(context.Background(), `SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity
		WHERE datname = current_database() AND pid <> pg_backend_pid()`)
	if err != nil {
		rt.Fatal(err)
	}
	m.breakAll()
}

func (m *model) resetAll(*rapid.T) {
	m.proxy.Reset()
	m.breakAll()
}

func (m *model) breakAll() {
	for _, l := range m.held {
		l.broken = true
	}
}

// outage is a server that nobody can reach for a moment.
func (m *model) outage(rt *rapid.T) {
	m.proxy.Refuse()
	m.proxy.Reset()
	m.breakAll()
	if len(m.held) < m.limit {
		ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
		defer cancel()
		if c, err := m.pool.Acquire(ctx); err == nil {
			// It was on its way when the server went, and slipped through.
			if _, err := c.Exec(ctx, "SELECT 1"); err != nil {
				rt.Fatalf("a dead connection was lent: %v", err)
			}
			c.Release()
		}
	}
	m.proxy.Heal()
}

// blackHole is a network that loses everything for a moment, without a word.
func (m *model) blackHole(rt *rapid.T) {
	m.proxy.Blackhole()
	for _, l := range m.held {
		ctx, cancel := context.WithTimeout(l.ctx, 20*time.Millisecond)
		_, err := l.conn.Exec(ctx, "SELECT 1")
		cancel()
		if err == nil {
			rt.Fatal("an answer came out of a black hole")
		}
	}
	m.breakAll()
	m.proxy.Reset()
	m.proxy.Heal()
}

// failover leaves a connection behind: it answers, but takes no writes any more.
func (m *model) failover(rt *rapid.T) {
	_, l := m.pick(rt)
	if l.broken {
		rt.Skip("broken already")
	}
	if _, err := l.conn.Exec(l.ctx, "SET default_transaction_read_only = on"); err != nil {
		rt.Fatal(err)
	}
	m.readOnly[l.pid] = true
}

// validate refills the pool, at the second time at the latest: at the first a
// connection may be on its way that a fault cuts off.
func (m *model) validate(rt *rapid.T) {
	var s dbpool.Stats
	for giveUp := time.Now().Add(10 * time.Second); time.Now().Before(giveUp); time.Sleep(time.Millisecond) {
		if v, err := m.pool.Validate(context.Background()); err != nil || v.Errors != 0 {
			rt.Fatalf("validation says %+v, %v", v, err)
		}
		if s = m.pool.Stats(); s.CheckedIn+s.CheckedOut >= s.PoolSize {
			return
		}
	}
	rt.Fatalf("after validations the pool has %+v", s)
}

// queueUp lets more callers wait than there are connections; all are served when
// the connections come back.
func (m *model) queueUp(rt *rapid.T) {
	n := rapid.IntRange(1, 2*m.limit).Draw(rt, "callers")
	errs := make(chan error, n)
	var wg sync.WaitGroup
	for range n {
		wg.Go(func() { _, err := m.pool.Exec(context.Background(), "SELECT 1"); errs <- err })
	}
	for _, l := range m.held {
		l.conn.Release()
	}
	m.held = nil
	wg.Wait()
	close(errs)
	for err := range errs {
		if err != nil {
			rt.Fatalf("one who waited got %v", err)
		}
	}
}

// giveUp lets callers who wait give up in any order.
func (m *model) giveUp(rt *rapid.T) {
	if len(m.held) < m.limit {
		rt.Skip("nobody has to wait")
	}
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	for range rapid.IntRange(1, 4).Draw(rt, "callers") {
		wg.Go(func() {
			if c, err := m.pool.Acquire(ctx); err == nil {
				c.Release()
			}
		})
	}
	i, l := m.pick(rt)
	go cancel()
	l.conn.Release()
	m.drop(i)
	wg.Wait()
}
