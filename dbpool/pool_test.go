package dbpool_test

import (
	"context"
	"errors"
	"flag"
	"log"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/carpool-go/carpool/dbpool"
	"github.com/carpool-go/carpool/internal/testservers"
)

func TestMain(m *testing.M) {
	// Rapid's hundred histories take a minute; -rapid.checks asks for more than
	// these.
	if f := flag.Lookup("rapid.checks"); f != nil {
		_ = f.Value.Set("12")
	}
	testservers.Main(m)
}

// open makes a pool on a database of its own, with the default settings as
// changed by change.
func open(t *testing.T, change func(*dbpool.Config)) *dbpool.Pool {
	t.Helper()
	cfg := dbpool.DefaultConfig(testservers.Postgres(t))
	cfg.Logger = slog.New(slog.DiscardHandler)
	if change != nil {
		change(&cfg)
	}
	p, err := dbpool.Open(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.Close)
	return p
}

// databaseURL leads to a database for an example.
func databaseURL() string { return testservers.Postgres(testservers.Example{}) }

// openPool makes a pool for an example.
func openPool() *dbpool.Pool {
	cfg := dbpool.DefaultConfig(databaseURL())
	cfg.Logger = slog.New(slog.DiscardHandler)
	p, err := dbpool.Open(context.Background(), cfg)
	if err != nil {
		log.Fatal(err)
	}
	return p
}

func acquire(t *testing.T, p *dbpool.Pool) *dbpool.Conn {
	t.Helper()
	c, err := p.Acquire(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// fill opens n connections and leaves them idle.
func fill(t *testing.T, p *dbpool.Pool, n int) {
	t.Helper()
	var cs []*dbpool.Conn
	for range n {
		cs = append(cs, acquire(t, p))
	}
	for _, c := range cs {
		c.Release()
	}
}

// pid is the server's process behind a connection.
func pid(c *dbpool.Conn) uint32 { return c.Conn().PgConn().PID() }

// killAll kills every backend of the pool's database and returns when they are
// gone.
func killAll(t *testing.T, p *dbpool.Pool) {
	t.Helper()
	cfg, err := pgx.ParseConfig(p.Config().URL)
	if err != nil {
		t.Fatal(err)
	}
	conn, err := pgx.ConnectConfig(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(context.Background())
	killOthers(t, conn)
}

// killOthers kills the backends of all other connections to conn's database.
func killOthers(t *testing.T, conn *pgx.Conn) {
	t.Helper()
	if _, err := conn.Exec(t.Context(), `SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity
		WHERE datname = current_database() AND pid <> pg_backend_pid()`); err != nil {
		t.Fatal(err)
	}
}

func TestPool_TheConnectionUsedLastIsLentFirst(t *testing.T) {
	t.Parallel()
	p := open(t, nil)
	a, b := acquire(t, p), acquire(t, p)
	last := pid(a)
	b.Release()
	a.Release()
	for range 3 {
		c := acquire(t, p)
		if pid(c) != last {
			t.Errorf("lent backend %d, want %d, which was given back last", pid(c), last)
		}
		c.Release()
	}
}

func TestPool_NeverOpensMoreThanSizeAndOverflow(t *testing.T) {
	t.Parallel()
	p := open(t, func(c *dbpool.Config) { c.Size, c.MaxOverflow = 2, 1 })
	var inside, most atomic.Int64
	var wg sync.WaitGroup
	for range 30 {
		wg.Go(func() {
			c, err := p.Acquire(t.Context())
			if err != nil {
				t.Error(err)
				return
			}
			defer c.Release()
			most.Store(max(most.Load(), inside.Add(1)))
			defer inside.Add(-1)
			if _, err := c.Exec(t.Context(), "SELECT 1"); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if most.Load() > 3 {
		t.Errorf("%d connections were lent at once, of 2 + 1", most.Load())
	}
	testservers.Eventually(t, "all connections are idle", func() bool { return p.Stats().CheckedIn == 3 })
	if s := p.Stats(); s.CheckedOut != 0 || s.Waiting != 0 || s.Counts.Opened != 3 || s.Overflow != 1 {
		t.Errorf("afterwards the pool stands so: %+v", s)
	}
}

func TestPool_OverflowIsClosedAfterBeingIdleAndTheSizeIsKept(t *testing.T) {
	t.Parallel()
	p := open(t, func(c *dbpool.Config) { c.Size, c.MaxOverflow, c.OverflowIdle = 2, 3, 0 })
	fill(t, p, 5)
	testservers.Eventually(t, "the overflow is closed", func() bool { return p.Stats().Overflow == 0 })
	if s := p.Stats(); s.CheckedIn != 2 || s.Counts.ClosedOverflow != 3 {
		t.Errorf("afterwards the pool stands so: %+v", s)
	}
}

func TestPool_WaitersAreServedInTheirOrder(t *testing.T) {
	t.Parallel()
	p := open(t, func(c *dbpool.Config) { c.Size, c.MaxOverflow = 1, 0 })
	held := acquire(t, p)
	var mu sync.Mutex
	var order []int
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			c, err := p.Acquire(t.Context())
			if err != nil {
				t.Error(err)
				return
			}
			mu.Lock()
			order = append(order, i)
			mu.Unlock()
			c.Release()
		})
		testservers.Eventually(t, "the caller waits", func() bool { return p.Stats().Waiting == i+1 })
	}
	held.Release()
	wg.Wait()
	if !slices.IsSorted(order) {
		t.Errorf("served in the order %v", order)
	}
}

func TestPool_TimeoutNamesTheLimitsAndTheHolders(t *testing.T) {
	t.Parallel()
	p := open(t, func(c *dbpool.Config) { c.Size, c.MaxOverflow, c.Timeout = 1, 1, 2*time.Second })
	ctx, b := p.Track(t.Context(), "csv:import 17")
	for range 2 {
		c, err := p.Acquire(ctx)
		if err != nil {
			t.Fatal(err)
		}
		defer b.End()
		defer c.Release()
	}
	_, err := p.Acquire(t.Context())
	e, ok := errors.AsType[*dbpool.TimeoutError](err)
	if !ok {
		t.Fatalf("error %v, want a TimeoutError", err)
	}
	if want := "dbpool: no connection within 2s: size 1 + overflow 1 all checked out, 1 waiting; held by csv:import 17 for "; !strings.HasPrefix(err.Error(), want) {
		t.Errorf("error %q, want it to begin with %q", err, want)
	}
	if len(e.Holders) != 2 || e.Holders[0].Name != "csv:import 17" || e.CheckedOut != 2 || e.Waiting != 1 {
		t.Errorf("%+v", e)
	}
	if s := p.Stats(); s.Waiting != 0 || s.Counts.TimedOut != 1 {
		t.Errorf("afterwards the pool stands so: %+v", s)
	}
}

func TestPool_TimeoutOfWhoHoldsAConnectionSaysSo(t *testing.T) {
	t.Parallel()
	p := open(t, func(c *dbpool.Config) { c.Size, c.MaxOverflow, c.Timeout = 1, 0, time.Second })
	ctx, b := p.Track(t.Context(), "csv:import 17")
	defer b.End()
	tx, err := p.Begin(ctx)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = tx.Rollback(ctx) }()
	_, err = p.Exec(ctx, "SELECT 1") // not by way of tx
	e, ok := errors.AsType[*dbpool.TimeoutError](err)
	if !ok || e.Own != 1 || !strings.Contains(err.Error(), "acquire one connection at a time") {
		t.Errorf("error %v", err)
	}
}

func TestPool_CallerThatGivesUpLeavesItsPlaceToTheNext(t *testing.T) {
	t.Parallel()
	p := open(t, func(c *dbpool.Config) { c.Size, c.MaxOverflow = 1, 0 })
	held := acquire(t, p)
	gone := errors.New("gone")
	ctx, cancel := context.WithCancelCause(t.Context())
	first := make(chan error, 1)
	go func() {
		_, err := p.Acquire(ctx)
		first <- err
	}()
	testservers.Eventually(t, "the first waits", func() bool { return p.Stats().Waiting == 1 })
	second := make(chan error, 1)
	go func() {
		c, err := p.Acquire(t.Context())
		if err == nil {
			c.Release()
		}
		second <- err
	}()
	testservers.Eventually(t, "the second waits", func() bool { return p.Stats().Waiting == 2 })
	cancel(gone)
	if err := <-first; !errors.Is(err, gone) {
		t.Errorf("the first got %v", err)
	}
	held.Release()
	if err := <-second; err != nil {
		t.Errorf("the second got %v", err)
	}
}

func TestPool_DeadSiblingsAreReplacedBeforeTheyAreLent(t *testing.T) {
	t.Parallel()
	p := open(t, nil)
	for round := range 3 {
		fill(t, p, 10)
		killAll(t, p)
		for range 20 {
			if _, err := p.Exec(t.Context(), "SELECT 1"); err != nil {
				t.Errorf("round %d: %v", round, err)
			}
		}
	}
}

func TestPool_WithoutPrePingADeadConnectionIsLentOnce(t *testing.T) {
	t.Parallel()
	p := open(t, func(c *dbpool.Config) { c.PrePing, c.MaxOverflow = false, 0 })
	fill(t, p, 1)
	killAll(t, p)
	if _, err := p.Exec(t.Context(), "SELECT 1"); err == nil {
		t.Error("the dead connection was not lent; the tests of pre-ping prove nothing")
	}
	if _, err := p.Exec(t.Context(), "SELECT 1"); err != nil {
		t.Errorf("it was lent twice: %v", err)
	}
}

func TestPool_FailedQueryMakesTheOthersStale(t *testing.T) {
	t.Parallel()
	p := open(t, func(c *dbpool.Config) { c.Size = 4 })
	fill(t, p, 4)
	_, err := p.Exec(t.Context(), "SELECT pg_terminate_backend(pg_backend_pid())")
	if err == nil {
		t.Fatal("the backend survived its own end")
	}
	if s := p.Stats(); s.Invalid != 3 || s.Counts.ClosedBroken != 1 {
		t.Errorf("afterwards the pool stands so: %+v", s)
	}
	fill(t, p, 3)
	if s := p.Stats(); s.Invalid != 0 || s.Counts.ClosedBroken != 1 {
		t.Errorf("stale connections that live are closed or stay stale: %+v", s)
	}
}

// proxied makes a pool that reaches its database through a proxy.
func proxied(t *testing.T, change func(*dbpool.Config)) (*dbpool.Pool, *testservers.Proxy) {
	t.Helper()
	var proxy *testservers.Proxy
	p := open(t, func(c *dbpool.Config) {
		c.URL, proxy = testservers.ThroughProxy(t, c.URL)
		if change != nil {
			change(c)
		}
	})
	return p, proxy
}

func TestPool_ResetConnectionsAreReplacedBeforeTheyAreLent(t *testing.T) {
	t.Parallel()
	p, proxy := proxied(t, nil)
	fill(t, p, 10)
	proxy.Reset()
	for range 20 {
		if _, err := p.Exec(t.Context(), "SELECT 1"); err != nil {
			t.Error(err)
		}
	}
}

func TestPool_HalfOpenConnectionsCostOnePingForAllOfThem(t *testing.T) {
	t.Parallel()
	p, proxy := proxied(t, func(c *dbpool.Config) { c.PingTimeout, c.Timeout = 200*time.Millisecond, 3*time.Second })
	fill(t, p, 3)
	proxy.Blackhole()
	v, err := p.Validate(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if v.Checked != 3 || v.Errors != 1 {
		t.Errorf("%+v, want all asked, and one error from opening a new one", v)
	}
	proxy.Heal()
	if _, err := p.Exec(t.Context(), "SELECT 1"); err != nil {
		t.Error(err)
	}
	if s := p.Stats(); s.Counts.ClosedBroken != 3 {
		t.Errorf("afterwards the pool stands so: %+v", s)
	}
}

// losePing runs a statement for which the connection's check gets lost on the way,
// and what comes after it does not.
func losePing(t *testing.T, p *dbpool.Pool, proxy *testservers.Proxy) {
	t.Helper()
	proxy.Blackhole()
	done := make(chan error, 1)
	go func() { _, err := p.Exec(t.Context(), "SELECT 1"); done <- err }()
	testservers.Eventually(t, "a connection is checked", func() bool { return p.Stats().CheckedOut == 1 })
	time.Sleep(20 * time.Millisecond) // for the ping to be sent; it is waited for much longer
	proxy.Heal()
	if err := <-done; err != nil {
		t.Errorf("whose connection's check got lost: %v", err)
	}
}

func TestPool_HalfOpenConnectionsAreNotLentAfterARest(t *testing.T) {
	t.Parallel()
	p, proxy := proxied(t, func(c *dbpool.Config) {
		c.PingIdle, c.PingTimeout = 10*time.Millisecond, 500*time.Millisecond
	})
	fill(t, p, 10)
	time.Sleep(20 * time.Millisecond) // longer than PingIdle
	losePing(t, p, proxy)
}

func TestPool_ConnectionHeldWithoutAStatementCountsAsIdle(t *testing.T) {
	t.Parallel()
	p, proxy := proxied(t, func(c *dbpool.Config) {
		c.Size, c.MaxOverflow = 1, 0
		c.PingIdle, c.PingTimeout = 10*time.Millisecond, 500*time.Millisecond
	})
	c := acquire(t, p)
	time.Sleep(20 * time.Millisecond) // as a job that calls somebody over the network
	c.Release()
	losePing(t, p, proxy)
}

func TestPool_ConnectionGivenBackInABadStateIsReplaced(t *testing.T) {
	t.Parallel()
	p := open(t, func(c *dbpool.Config) { c.Size, c.MaxOverflow = 1, 0 })
	for state, leave := range map[string]func(*dbpool.Conn) error{
		"an open transaction": func(c *dbpool.Conn) error { _, err := c.Begin(t.Context()); return err },
		"open rows": func(c *dbpool.Conn) error {
			_, err := c.Query(t.Context(), "SELECT generate_series(1, 100000)")
			return err
		},
		"an open row": func(c *dbpool.Conn) error { c.QueryRow(t.Context(), "SELECT 1"); return nil },
		"an open batch": func(c *dbpool.Conn) error {
			b := &pgx.Batch{}
			b.Queue("SELECT 1")
			c.SendBatch(t.Context(), b)
			return nil
		},
	} {
		c := acquire(t, p)
		before := pid(c)
		if err := leave(c); err != nil {
			t.Fatal(err)
		}
		c.Release()
		c = acquire(t, p)
		if pid(c) == before {
			t.Errorf("a connection with %s was lent again", state)
		}
		// The first is gone from the server before the second comes.
		var n int
		if err := c.QueryRow(t.Context(), "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()").Scan(&n); err != nil || n != 1 {
			t.Errorf("after %s: %d connections at the server, %v", state, n, err)
		}
		c.Release()
	}
}

func TestPool_ConnectionsAtTheEndOfTheirLifeAreReplaced(t *testing.T) {
	t.Parallel()
	p := open(t, func(c *dbpool.Config) { c.Size, c.MaxOverflow, c.Recycle = 1, 0, time.Millisecond })
	c := acquire(t, p)
	old := pid(c)
	time.Sleep(2 * time.Millisecond) // its whole life
	c.Release()
	c = acquire(t, p)
	defer c.Release()
	if pid(c) == old {
		t.Error("the connection outlives its Recycle")
	}
	if n := p.Stats().Counts.ClosedRecycled; n == 0 {
		t.Error("no connection was counted as recycled")
	}
}

func TestPool_ValidationFindsTheDeadAndRefills(t *testing.T) {
	t.Parallel()
	p := open(t, nil)
	if v, err := p.Validate(t.Context()); err != nil || v.Checked != 0 || p.Stats().CheckedIn != 5 {
		t.Errorf("on an empty pool: %+v, %v; %+v", v, err, p.Stats())
	}
	if v, err := p.Validate(t.Context()); err != nil || v.Checked != 5 || v.Replaced != 0 {
		t.Errorf("on a sound pool: %+v, %v", v, err)
	}
	killAll(t, p)
	if v, err := p.Validate(t.Context()); err != nil || v.Checked != 5 || v.Replaced != 5 || v.Errors != 0 {
		t.Errorf("after all backends were killed: %+v, %v", v, err)
	}
	if s := p.Stats(); s.CheckedIn != 5 || s.Counts.ClosedBroken != 5 {
		t.Errorf("afterwards the pool stands so: %+v", s)
	}
}

func TestPool_ValidationLeavesAllOtherConnectionsToJobs(t *testing.T) {
	t.Parallel()
	p, proxy := proxied(t, func(c *dbpool.Config) { c.Size, c.MaxOverflow = 3, 0 })
	fill(t, p, 3)
	proxy.Delay(100 * time.Millisecond) // each ping takes that long
	done := make(chan error, 1)
	go func() {
		_, err := p.Validate(t.Context())
		done <- err
	}()
	for range 3 {
		testservers.Eventually(t, "a connection is being validated", func() bool { return p.Stats().CheckedIn < 3 })
		a, b := acquire(t, p), acquire(t, p)
		a.Release()
		b.Release()
	}
	if err := <-done; err != nil {
		t.Error(err)
	}
	if s := p.Stats(); s.Counts.AcquiredWaited > 3 { // those of fill
		t.Errorf("jobs waited for the validation: %+v", s)
	}
}

func TestPool_LeakIsReportedOnceWithItsHolderAndStack(t *testing.T) {
	t.Parallel()
	var log testservers.Log
	p := open(t, func(c *dbpool.Config) {
		c.LeakAfter = time.Millisecond
		c.Logger = slog.New(slog.NewTextHandler(&log, nil))
	})
	ctx, b := p.Track(t.Context(), "csv:import 17")
	rows, err := p.Query(ctx, "SELECT 1")
	if err != nil {
		t.Fatal(err)
	}
	testservers.Eventually(t, "the leak is reported", func() bool { return strings.Contains(log.String(), "is held for long") })
	for _, want := range []string{`held_by="csv:import 17"`, "TestPool_LeakIsReportedOnceWithItsHolderAndStack", `rows="left open"`} {
		if !strings.Contains(log.String(), want) {
			t.Errorf("the report lacks %s:\n%s", want, log.String())
		}
	}
	rows.Close()
	b.End()
	if n := strings.Count(log.String(), "is held for long"); n != 1 {
		t.Errorf("%d reports", n)
	}
}

func TestBorrower_EndTakesBackWhatWasForgotten(t *testing.T) {
	t.Parallel()
	p := open(t, func(c *dbpool.Config) { c.Size, c.MaxOverflow = 2, 0 })
	if _, err := p.Exec(t.Context(), "CREATE TABLE t (n int)"); err != nil {
		t.Fatal(err)
	}
	ctx, b := p.Track(t.Context(), "job")
	tx, err := p.Begin(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := tx.Exec(ctx, "INSERT INTO t VALUES (1)"); err != nil {
		t.Fatal(err)
	}
	if _, err := p.Query(ctx, "SELECT generate_series(1, 100000)"); err != nil {
		t.Fatal(err)
	}
	u := b.End()
	if u.Leaked != 2 || u.Acquires != 2 || u.Queries != 3 || u.Held <= 0 {
		t.Errorf("%+v", u)
	}
	if s := p.Stats(); s.CheckedOut != 0 {
		t.Errorf("afterwards the pool stands so: %+v", s)
	}
	var n int
	if err := p.QueryRow(t.Context(), "SELECT count(*) FROM t").Scan(&n); err != nil || n != 0 {
		t.Errorf("the forgotten transaction has left %d rows, %v", n, err)
	}
	if _, err := tx.Exec(ctx, "SELECT 1"); err == nil {
		t.Error("the transaction can still be used")
	}
}

func TestPool_CloseDoesNotHangOnALeak(t *testing.T) {
	t.Parallel()
	p := open(t, nil)
	c := acquire(t, p)
	p.Close()
	p.Close() // twice is safe
	if _, err := c.Exec(t.Context(), "SELECT 1"); !errors.Is(err, dbpool.ErrReleased) {
		t.Errorf("the connection that was taken away says %v", err)
	}
	c.Release()
	if _, err := p.Acquire(t.Context()); !errors.Is(err, dbpool.ErrClosed) {
		t.Errorf("a closed pool says %v", err)
	}
	if s := p.Stats(); s.Counts.ClosedLeaked != 1 {
		t.Errorf("%+v", s)
	}
}

func TestPool_EchoShowsStatementsWithoutTheirArguments(t *testing.T) {
	t.Parallel()
	var log testservers.Log
	p := open(t, func(c *dbpool.Config) {
		c.Echo = true
		c.Logger = slog.New(slog.NewTextHandler(&log, nil))
	})
	if _, err := p.Exec(t.Context(), "SELECT $1::text", "s3cr3t"); err != nil {
		t.Fatal(err)
	}
	if got := log.String(); !strings.Contains(got, "SELECT $1::text") || strings.Contains(got, "s3cr3t") {
		t.Errorf("echo: %s", got)
	}
}

func TestPool_NewConnectionsArePreparedAndTraced(t *testing.T) {
	t.Parallel()
	var traced sqlTracer
	p := open(t, func(c *dbpool.Config) {
		c.Tracer = &traced
		c.AfterConnect = func(ctx context.Context, conn *pgx.Conn) error {
			_, err := conn.Exec(ctx, "SET application_name = 'prepared'")
			return err
		}
	})
	ctx, b := p.Track(t.Context(), "job")
	var name string
	if err := p.QueryRow(ctx, "SHOW application_name").Scan(&name); err != nil || name != "prepared" {
		t.Errorf("application_name is %q, %v", name, err)
	}
	if u := b.End(); u.Queries != 1 {
		t.Errorf("what AfterConnect did is charged to the job: %+v", u)
	}
	if got, want := traced.String(), "SET application_name = 'prepared'\nSHOW application_name\n"; got != want {
		t.Errorf("traced: %q, want %q", got, want)
	}

	refused := errors.New("refused")
	p = open(t, func(c *dbpool.Config) { c.AfterConnect = func(context.Context, *pgx.Conn) error { return refused } })
	if _, err := p.Acquire(t.Context()); !errors.Is(err, refused) {
		t.Errorf("error %v", err)
	}
}

// sqlTracer notes the statements it sees.
type sqlTracer struct{ testservers.Log }

func (s *sqlTracer) TraceQueryStart(ctx context.Context, _ *pgx.Conn, data pgx.TraceQueryStartData) context.Context {
	_, _ = s.Write([]byte(data.SQL + "\n"))
	return ctx
}

func (s *sqlTracer) TraceQueryEnd(context.Context, *pgx.Conn, pgx.TraceQueryEndData) {}

func TestOpen_NamesEveryFaultAndNoPassword(t *testing.T) {
	t.Parallel()
	_, err := dbpool.Open(t.Context(), dbpool.Config{URL: "postgres://u:hu%sh@localhost/x", MaxOverflow: -1, Recycle: -1})
	if err == nil {
		t.Fatal("no error")
	}
	for _, want := range []string{"the URL can't be read", "Size is 0", "MaxOverflow is -1", "Timeout is 0s", "Recycle is -1ns"} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("%q is not in: %v", want, err)
		}
	}
	if strings.Contains(err.Error(), "hu%sh") {
		t.Errorf("the error shows the password: %v", err)
	}
}

func TestOpen_ShowsNothingOfAURLsQuery(t *testing.T) {
	t.Parallel()
	for query, want := range map[string]string{
		"s3cret":                         "a parameter behind the ? is not name=value",
		"sslmode=disable&s3cret":         "a parameter behind the ? is not name=value",
		"pool_max_conns=s3cret%22":       "cannot parse pool_max_conns",
		"target_session_attrs=s3%63ret":  "unknown target_session_attrs value",
		"connect_timeout=s3cret":         "invalid connect_timeout",
		"min_protocol_version=s3cret":    "invalid min_protocol_version",
		"default_query_exec_mode=s3cret": "invalid default_query_exec_mode",
		"sslrootcert=/s3cret":            "failed to configure TLS; sslmode is unknown, or a file that an ssl parameter names can't be used",
		"sslmode=s3cret":                 "failed to configure TLS; sslmode is unknown, or a file that an ssl parameter names can't be used",
		"service=s&servicefile=/s3cret":  "failed to read service",
		"a=1;s3cret=2":                   "failed to parse as URL",
		"%zzs3cret=1":                    "failed to parse as URL",
	} {
		cfg := dbpool.DefaultConfig("postgres://u:hush@localhost/x?" + query)
		_, err := dbpool.Open(t.Context(), cfg)
		if err == nil || !strings.HasSuffix(err.Error(), "dbpool: the URL has a wrong setting: "+want) {
			t.Errorf("%s: %v", query, err)
		}
		if err := cfg.Validate(); err == nil || strings.Contains(err.Error(), "s3cret") || strings.Contains(err.Error(), "hush") {
			t.Errorf("%s: Validate: %v", query, err)
		}
	}
	cfg := dbpool.DefaultConfig("postgres://u:hush@localhost:port/x")
	if err := cfg.Validate(); err == nil || !strings.Contains(err.Error(), "invalid port") {
		t.Errorf("a wrong port: %v", err)
	}
}

func TestPool_ServerThatIsDownIsAnErrorAtOnce(t *testing.T) {
	t.Parallel()
	p, proxy := proxied(t, nil)
	proxy.Refuse()
	for range 15 {
		if _, err := p.Exec(t.Context(), "SELECT 1"); err == nil || !strings.Contains(err.Error(), "connection refused") {
			t.Fatalf("error %v", err)
		}
	}
	proxy.Heal()
	if _, err := p.Exec(t.Context(), "SELECT 1"); err != nil {
		t.Error(err)
	}
}

func TestPool_TextIsUTF8WhateverTheDatabasesEncodingOfClients(t *testing.T) {
	t.Parallel()
	url := testservers.Postgres(t)
	first := openAt(t, url)
	if _, err := first.Exec(t.Context(), "DO $$ BEGIN EXECUTE format('ALTER DATABASE %I SET client_encoding = latin1', current_database()); END $$"); err != nil {
		t.Fatal(err)
	}
	p := openAt(t, url)
	var length int
	if err := p.QueryRow(t.Context(), "SELECT char_length($1)", "café").Scan(&length); err != nil || length != 4 {
		t.Errorf("café has %d characters, error %v", length, err)
	}
}

func openAt(t *testing.T, url string) *dbpool.Pool {
	t.Helper()
	cfg := dbpool.DefaultConfig(url)
	cfg.Logger = slog.New(slog.DiscardHandler)
	p, err := dbpool.Open(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.Close)
	return p
}
