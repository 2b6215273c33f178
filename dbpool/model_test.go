package dbpool_test

import (
	"context"
	"errors"
	"flag"
	"io"
	"log/slog"
	"maps"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"pgregory.net/rapid"

	"github.com/carpool-go/carpool/dbpool"
	"github.com/carpool-go/carpool/internal/testservers"
)

// model is a plain picture of what a pool must be: who holds a connection, who
// waits for one, and which connections a fault has broken. Whatever is idle, the
// pool has to sort out itself.
type model struct {
	pool   *dbpool.Pool
	proxy  *testservers.Proxy // nil: the pool reaches the server straight
	direct *pgx.Conn          // to the server, not through the proxy
	limit  int                // size and overflow
	held   []*loan
	// waiting are in line, the first come first; all connections are held then.
	waiting []*inLine
	// dead are the backends that were cut off; readOnly those that a failover has
	// left behind. None of them may be lent again.
	dead, readOnly map[uint32]bool
	acquired       int // how often a connection was lent
	// leaves has those who hold connections at the end never give them back.
	leaves bool
}

type loan struct {
	conn     *dbpool.Conn
	ctx      context.Context
	borrower *dbpool.Borrower // nil for some
	pid      uint32
	broken   bool
}

// inLine is a caller of Acquire that waits.
type inLine struct {
	loan   *loan
	cancel context.CancelCauseFunc
	done   chan error
}

// giveUp bounds what must come about; it is never reached unless it doesn't.
const giveUp = 30 * time.Second

func TestPool_KeepsItsPromisesThroughAnyHistory(t *testing.T) {
	if n := os.Getenv("CARPOOL_MODEL_CHECKS"); n != "" {
		if err := flag.Set("rapid.checks", n); err != nil {
			t.Fatalf("CARPOOL_MODEL_CHECKS, the number of histories: %v", err)
		}
	}
	t.Parallel()
	databaseURL := testservers.Postgres(t)
	// A COPY into slow ends after its first row: a server that the pool's word doesn't
	// reach is at work for less than giveUp.
	if _, err := connect(t, databaseURL).Exec(t.Context(), `
		CREATE FUNCTION too_late() RETURNS text LANGUAGE plpgsql AS $$
		BEGIN
			PERFORM pg_sleep(10);
			RAISE 'too late';
		END $$;
		CREATE TABLE slow (n int, late text DEFAULT too_late())`); err != nil {
		t.Fatal(err)
	}
	rapid.Check(t, func(rt *rapid.T) {
		m := newModel(t, rt, databaseURL)
		defer m.direct.Close(context.Background())
		defer m.pool.Close()
		steps := map[string]func(*rapid.T){
			"":                    m.check,
			"acquire":             m.acquire,
			"acquire too late":    m.acquireWithAContextThatEnded,
			"acquire in a hurry":  m.acquireInAHurry,
			"wait":                m.wait,
			"wait no longer":      m.waitNoLonger,
			"release":             m.release,
			"query":               m.query,
			"forget":              m.forget,
			"abandon":             m.abandon,
			"kill one in use":     m.killOneInUse,
			"failover":            m.failover,
			"validate":            m.validate,
			"queue up":            m.queueUp,
			"give up as it comes": m.giveUpAsItComes,
		}
		if m.proxy != nil {
			maps.Copy(steps, map[string]func(*rapid.T){
				"reset all": m.resetAll, "outage": m.outage, "black hole": m.blackHole,
			})
		} else {
			// Through the proxy a death is heard of a moment later; nobody could
			// know of it at once.
			maps.Copy(steps, map[string]func(*rapid.T){"kill an idle one": m.killIdle, "kill all": m.killAll})
		}
		rt.Repeat(steps)
		m.end(rt)
	})
}

func newModel(t *testing.T, rt *rapid.T, databaseURL string) *model {
	m := &model{dead: map[uint32]bool{}, readOnly: map[uint32]bool{}}
	url := databaseURL
	if rapid.Bool().Draw(rt, "through a proxy") {
		url, m.proxy = testservers.ThroughProxy(t, databaseURL)
	}
	cfg := dbpool.DefaultConfig(url)
	cfg.Size = rapid.IntRange(1, 3).Draw(rt, "size")
	cfg.MaxOverflow = rapid.IntRange(0, 2).Draw(rt, "overflow")
	cfg.OverflowIdle = 0
	cfg.Recycle = rapid.SampledFrom([]time.Duration{0, 100 * time.Millisecond}).Draw(rt, "recycle")
	cfg.PingIdle = rapid.SampledFrom([]time.Duration{time.Second, 0, 20 * time.Millisecond}).Draw(rt, "ping idle")
	cfg.PingTimeout, cfg.Timeout = 300*time.Millisecond, 2*giveUp
	cfg.Logger = slog.New(slog.DiscardHandler)
	m.limit = cfg.Size + cfg.MaxOverflow
	m.leaves = rapid.IntRange(0, 7).Draw(rt, "leaves connections out") == 7 // Close waits for them
	var err error
	if m.pool, err = dbpool.Open(context.Background(), cfg); err != nil {
		rt.Fatal(err)
	}
	if m.direct, err = pgx.Connect(context.Background(), databaseURL); err != nil {
		m.pool.Close()
		rt.Fatal(err)
	}
	return m
}

// end closes the pool. Before that, or thereby, each who waits is told.
func (m *model) end(rt *rapid.T) {
	for !m.leaves && len(m.held) > 0 {
		m.held[0].conn.Release()
		m.drop(rt, 0)
	}
	if !m.leaves {
		m.until(rt, "all connections that are open are idle", func() bool {
			s := m.pool.Stats()
			return stillOpen(s) == s.CheckedIn
		})
	}
	s := m.pool.Stats()
	if n := s.Counts.AcquiredDirect + s.Counts.AcquiredWaited; n != uint64(m.acquired) {
		rt.Errorf("%d acquires have succeeded; the pool says %+v", m.acquired, s)
	}
	m.pool.Close()
	for _, w := range m.waiting {
		if err := m.told(rt, w); !errors.Is(err, dbpool.ErrClosed) {
			rt.Errorf("who waited when the pool was closed got %v", err)
		}
	}
	if _, err := m.pool.Acquire(context.Background()); !errors.Is(err, dbpool.ErrClosed) {
		rt.Errorf("the closed pool says %v", err)
	}
	for _, l := range m.held {
		l.conn.Release() // harmless now
	}
	if s := m.pool.Stats(); s.CheckedIn+s.CheckedOut+s.Overflow+s.Waiting != 0 {
		rt.Errorf("the closed pool has %+v", s)
	}
	m.until(rt, "the server is rid of the pool's connections", func() bool { return len(m.backends(rt)) == 0 })
}

// stillOpen is how many connections were opened and not closed.
func stillOpen(s dbpool.Stats) int {
	c := s.Counts
	return int(c.Opened - c.ClosedBroken - c.ClosedRecycled - c.ClosedOverflow - c.ClosedLeaked)
}

// check holds after every step.
func (m *model) check(rt *rapid.T) {
	s := m.pool.Stats()
	if s.CheckedOut != len(m.held) || s.Waiting != len(m.waiting) {
		rt.Fatalf("%d are held of %d, %d wait; the pool says %+v", len(m.held), m.limit, len(m.waiting), s)
	}
	// Those that are being asked or closed are neither checked in nor out; those
	// under construction count for the overflow, but are not opened yet.
	n := stillOpen(s)
	if s.CheckedIn+s.CheckedOut > n || n > m.limit || s.Overflow < n-s.PoolSize || s.Overflow > m.limit-s.PoolSize || s.Invalid > s.CheckedIn {
		rt.Fatalf("the pool's figures for at most %d connections contradict each other: %+v", m.limit, s)
	}
	if n := len(m.backends(rt)); n > m.limit && m.proxy == nil {
		rt.Fatalf("the server has %d connections of a pool of %d", n, m.limit)
	}
	// One that the proxy has cut off takes the server a moment to notice.
	m.until(rt, "the server has no more connections of the pool's than it may", func() bool { return len(m.backends(rt)) <= m.limit })
}

// until waits for what nothing announces.
func (m *model) until(rt *rapid.T, what string, holds func() bool) {
	for end := time.Now().Add(giveUp); !holds(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			rt.Fatalf("it does not come about that %s: %+v", what, m.pool.Stats())
		}
	}
}

// backends are the server's processes behind the pool's connections.
func (m *model) backends(rt *rapid.T) []uint32 {
	rows, err := m.direct.Query(context.Background(), `SELECT pid FROM pg_stat_activity
		WHERE datname = current_database() AND application_name = 'carpool' ORDER BY pid`)
	if err != nil {
		rt.Fatal(err)
	}
	pids, err := pgx.CollectRows(rows, pgx.RowTo[uint32])
	if err != nil {
		rt.Fatal(err)
	}
	return pids
}

// newLoan is one that is not made yet.
func (m *model) newLoan(rt *rapid.T) *loan {
	l := &loan{ctx: context.Background()}
	if rapid.Bool().Draw(rt, "tracked") {
		l.ctx, l.borrower = m.pool.Track(l.ctx, "somebody")
	}
	return l
}

// lent checks a connection that the pool has just lent.
func (m *model) lent(rt *rapid.T, l *loan) {
	l.pid = pid(l.conn)
	m.acquired++
	for _, other := range m.held {
		if other.pid == l.pid && !other.broken {
			rt.Fatalf("backend %d is lent twice", l.pid)
		}
	}
	if m.dead[l.pid] {
		rt.Fatalf("backend %d was cut off, and is lent", l.pid)
	}
	if m.readOnly[l.pid] {
		rt.Fatalf("backend %d was left behind by a failover, and is lent", l.pid)
	}
	m.held = append(m.held, l)
	ctx, cancel := context.WithTimeout(l.ctx, giveUp)
	defer cancel()
	if _, err := l.conn.Exec(ctx, "SELECT 1"); err != nil {
		rt.Fatalf("a dead connection was lent: %v", err)
	}
}

func (m *model) acquire(rt *rapid.T) {
	l := m.newLoan(rt)
	if len(m.held) == m.limit {
		ctx, cancel := context.WithTimeout(l.ctx, 10*time.Millisecond)
		defer cancel()
		if _, err := m.pool.Acquire(ctx); !errors.Is(err, context.DeadlineExceeded) {
			rt.Fatalf("all are held, and another acquire says %v", err)
		}
		return
	}
	ctx, cancel := context.WithTimeout(l.ctx, giveUp)
	defer cancel()
	var err error
	if l.conn, err = m.pool.Acquire(ctx); err != nil {
		rt.Fatalf("%d are held of %d, and acquire says %v", len(m.held), m.limit, err)
	}
	m.lent(rt, l)
}

func (m *model) acquireWithAContextThatEnded(rt *rapid.T) {
	gone := errors.New("gone")
	ctx, cancel := context.WithCancelCause(context.Background())
	cancel(gone)
	if _, err := m.pool.Acquire(ctx); !errors.Is(err, gone) {
		rt.Fatalf("acquire says %v", err)
	}
}

// acquireInAHurry gives up at any point of acquiring, or just gets a connection.
func (m *model) acquireInAHurry(rt *rapid.T) {
	l := m.newLoan(rt)
	patience := time.Duration(rapid.IntRange(1, 5000).Draw(rt, "µs")) * time.Microsecond
	ctx, cancel := context.WithTimeout(l.ctx, patience)
	defer cancel()
	var err error
	if l.conn, err = m.pool.Acquire(ctx); err == nil {
		m.lent(rt, l)
	} else if !errors.Is(err, context.DeadlineExceeded) {
		rt.Fatalf("acquire in a hurry says %v", err)
	}
}

// wait puts a caller in line who stays there, through what comes next.
func (m *model) wait(rt *rapid.T) {
	if len(m.held) < m.limit {
		rt.Skip("nobody has to wait")
	}
	w := &inLine{loan: m.newLoan(rt), done: make(chan error, 1)}
	var ctx context.Context
	ctx, w.cancel = context.WithCancelCause(w.loan.ctx)
	go func() {
		var err error
		w.loan.conn, err = m.pool.Acquire(ctx)
		w.done <- err
	}()
	m.waiting = append(m.waiting, w)
	m.until(rt, "the caller waits", func() bool { return m.pool.Stats().Waiting == len(m.waiting) })
}

// waitNoLonger has one of those in line give up.
func (m *model) waitNoLonger(rt *rapid.T) {
	if len(m.waiting) == 0 {
		rt.Skip("nobody waits")
	}
	i := rapid.IntRange(0, len(m.waiting)-1).Draw(rt, "who")
	w := m.waiting[i]
	gone := errors.New("gone")
	w.cancel(gone)
	if err := m.told(rt, w); !errors.Is(err, gone) {
		rt.Fatalf("who waits no longer got %v", err)
	}
	m.waiting = slices.Delete(m.waiting, i, i+1)
}

// told is what one who waited got.
func (m *model) told(rt *rapid.T, w *inLine) error {
	select {
	case err := <-w.done:
		w.cancel(nil)
		return err
	case <-time.After(giveUp):
		rt.Fatalf("one who waits was forgotten: %+v", m.pool.Stats())
		return nil
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

// drop notes that a connection was given back. Who waited longest has one now.
func (m *model) drop(rt *rapid.T, i int) {
	m.held = slices.Delete(m.held, i, i+1)
	if len(m.waiting) == 0 {
		return
	}
	w := m.waiting[0]
	m.waiting = m.waiting[1:]
	if err := m.told(rt, w); err != nil {
		rt.Fatalf("who waited longest got %v when a connection was given back", err)
	}
	m.lent(rt, w.loan)
}

func (m *model) release(rt *rapid.T) {
	i, l := m.pick(rt)
	for range rapid.IntRange(1, 2).Draw(rt, "times") {
		l.conn.Release()
	}
	if _, err := l.conn.Exec(l.ctx, "SELECT 1"); !errors.Is(err, dbpool.ErrReleased) {
		rt.Fatalf("a connection that was given back says %v", err)
	}
	m.drop(rt, i)
}

func (m *model) query(rt *rapid.T) {
	_, l := m.pick(rt)
	if err := m.selectOne(l); (err != nil) != l.broken {
		rt.Fatalf("a query on a connection says %v; broken by a fault: %v", err, l.broken)
	}
}

func (m *model) selectOne(l *loan) error {
	ctx, cancel := context.WithTimeout(l.ctx, giveUp)
	defer cancel()
	_, err := l.conn.Exec(ctx, "SELECT 1")
	return err
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
	if u := l.borrower.End(); u.Leaked != 1 || u.Acquires != 1 {
		rt.Fatalf("the borrower forgot one connection; its usage is %+v", u)
	}
	m.drop(rt, i)
}

// abandon gives back a connection for which the server is at work. It would be for
// less than giveUp, because a fault that comes now may keep the pool's word from it.
func (m *model) abandon(rt *rapid.T) {
	i, l := m.pick(rt)
	if l.broken {
		rt.Skip("broken already")
	}
	ctx, cancel := context.WithTimeout(l.ctx, time.Duration(rapid.IntRange(0, 20).Draw(rt, "ms"))*time.Millisecond)
	defer cancel()
	const sleep = "SELECT pg_sleep(10)"
	pg := l.conn.Conn().PgConn()
	switch rapid.SampledFrom([]string{"statement", "copy in", "copy out", "rows", "close"}).Draw(rt, "way") {
	case "statement":
		_, _ = l.conn.Exec(ctx, sleep)
	case "copy in":
		_, _ = pg.CopyFrom(ctx, endless{}, "COPY slow (n) FROM STDIN")
	case "copy out":
		_, _ = pg.CopyTo(ctx, io.Discard, "COPY ("+sleep+") TO STDOUT")
	case "rows":
		pg.Exec(ctx, sleep)
	case "close":
		pg.Exec(ctx, sleep)
		_ = l.conn.Conn().Close(ctx)
	}
	l.conn.Release()
	m.drop(rt, i)
}

// kill ends backends and returns when they are gone.
func (m *model) kill(rt *rapid.T, pids ...uint32) {
	if _, err := m.direct.Exec(context.Background(), "SELECT pg_terminate_backend(pid, 10000) FROM unnest($1::int[]) AS pid", pids); err != nil {
		rt.Fatal(err)
	}
	m.cutOff(pids)
}

// cutOff notes that the connections of these backends are dead.
func (m *model) cutOff(pids []uint32) {
	for _, pid := range pids {
		m.dead[pid] = true
	}
	for _, l := range m.held {
		l.broken = l.broken || m.dead[l.pid]
	}
}

func (m *model) killOneInUse(rt *rapid.T) {
	_, l := m.pick(rt)
	if l.broken {
		rt.Skip("broken already")
	}
	m.kill(rt, l.pid)
	if m.proxy != nil { // so that the pool's end hears of it
		if err := m.selectOne(l); err == nil {
			rt.Fatal("a backend that was killed has answered")
		}
	}
}

func (m *model) killIdle(rt *rapid.T) {
	idle := slices.DeleteFunc(m.backends(rt), func(pid uint32) bool {
		return slices.ContainsFunc(m.held, func(l *loan) bool { return l.pid == pid })
	})
	if len(idle) == 0 {
		rt.Skip("none is idle")
	}
	m.kill(rt, idle[rapid.IntRange(0, 1000).Draw(rt, "which")%len(idle)])
}

func (m *model) killAll(rt *rapid.T) { m.kill(rt, m.backends(rt)...) }

func (m *model) resetAll(rt *rapid.T) {
	pids := m.backends(rt)
	m.proxy.Reset()
	m.cutOff(pids)
}

// outage is a server that takes no new connections for a moment, and perhaps
// loses those it has.
func (m *model) outage(rt *rapid.T) {
	m.proxy.Refuse()
	if rapid.Bool().Draw(rt, "cut") {
		m.resetAll(rt)
	}
	for _, l := range m.held {
		if err := m.selectOne(l); (err != nil) != l.broken {
			rt.Fatalf("in an outage a query says %v; broken by a fault: %v", err, l.broken)
		}
	}
	if len(m.held) < m.limit {
		l := m.newLoan(rt)
		ctx, cancel := context.WithTimeout(l.ctx, 50*time.Millisecond)
		defer cancel()
		var err error
		if l.conn, err = m.pool.Acquire(ctx); err == nil {
			m.lent(rt, l) // it was open before, or slipped through
		}
	}
	m.proxy.Heal()
}

// blackHole is a network that loses everything for a moment, without a word.
// Then it works again, for the connections that it had too, or has cut them.
func (m *model) blackHole(rt *rapid.T) {
	cut := rapid.Bool().Draw(rt, "cut")
	m.proxy.Blackhole()
	for _, l := range m.held {
		if !rapid.Bool().Draw(rt, "query") {
			continue
		}
		ctx, cancel := context.WithTimeout(l.ctx, 20*time.Millisecond)
		_, err := l.conn.Exec(ctx, "SELECT 1")
		cancel()
		if err == nil {
			rt.Fatal("an answer came out of a black hole")
		}
		l.broken = true
	}
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Millisecond)
	defer cancel()
	switch rapid.SampledFrom([]string{"nothing", "acquire", "validate"}).Draw(rt, "meanwhile") {
	case "acquire":
		if len(m.held) == m.limit || !cut && m.pool.Stats().CheckedIn == 0 {
			break // an attempt to connect would hang for long
		}
		if c, err := m.pool.Acquire(ctx); err == nil {
			m.acquired++
			if _, err := c.Exec(ctx, "SELECT 1"); err == nil {
				rt.Fatal("an answer came out of a black hole")
			}
			c.Release()
		}
	case "validate":
		// Silent connections are closed, whether or not its caller still waits.
		if _, err := m.pool.Validate(ctx); err != nil && !errors.Is(err, context.DeadlineExceeded) {
			rt.Fatalf("validation says %v", err)
		}
	}
	if cut {
		m.resetAll(rt)
	}
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
	m.until(rt, "validation fills the pool", func() bool {
		if v, err := m.pool.Validate(context.Background()); err != nil || v.Errors != 0 {
			rt.Fatalf("validation says %+v, %v", v, err)
		}
		s := m.pool.Stats()
		return s.CheckedIn+s.CheckedOut >= s.PoolSize
	})
}

// queueUp lets more callers wait than there are connections; all are served when
// the connections come back.
func (m *model) queueUp(rt *rapid.T) {
	if len(m.waiting) > 0 {
		rt.Skip("others wait, who would keep the connections")
	}
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
	m.acquired += n
	close(errs)
	for err := range errs {
		if err != nil {
			rt.Fatalf("one who waited got %v", err)
		}
	}
}

// giveUpAsItComes lets callers give up just when a connection is given back.
func (m *model) giveUpAsItComes(rt *rapid.T) {
	if len(m.held) < m.limit || len(m.waiting) > 0 {
		rt.Skip("nobody has to wait, or others do")
	}
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	var served atomic.Int64
	for range rapid.IntRange(1, 4).Draw(rt, "callers") {
		wg.Go(func() {
			if c, err := m.pool.Acquire(ctx); err == nil {
				served.Add(1)
				c.Release()
			}
		})
	}
	i, l := m.pick(rt)
	go cancel()
	l.conn.Release()
	m.drop(rt, i)
	wg.Wait()
	m.acquired += int(served.Load())
}
