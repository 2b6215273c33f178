package dbpool_test

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net/url"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/carpool-go/carpool/dbpool"
	"github.com/carpool-go/carpool/internal/servers"
	"github.com/carpool-go/carpool/internal/testservers"
)

// locked is a database in which somebody holds a lock on the table t, so that every
// statement on it waits for as long as the test lasts.
type locked struct {
	url    string
	holder *pgx.Conn
	eye    *pgx.Conn
}

func lock(t *testing.T, url string) *locked {
	t.Helper()
	l := &locked{url, connect(t, url), connect(t, url)}
	for _, sql := range []string{
		"CREATE TABLE t (n int)",
		"CREATE TABLE u (n int)",
		"CREATE FUNCTION wait() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN LOCK TABLE t; RETURN NULL; END'",
		"CREATE CONSTRAINT TRIGGER wait AFTER INSERT ON u INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION wait()",
		"BEGIN",
		"LOCK TABLE t, pg_largeobject_metadata",
	} {
		if _, err := l.holder.Exec(t.Context(), sql); err != nil {
			t.Fatalf("%s: %v", sql, err)
		}
	}
	return l
}

func connect(t *testing.T, url string) *pgx.Conn {
	t.Helper()
	conn, err := pgx.Connect(t.Context(), url)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close(context.Background()) })
	return conn
}

// connections counts the pool's connections at the server for which a condition holds.
func (l *locked) connections(t *testing.T, condition string) (n int) {
	t.Helper()
	err := l.eye.QueryRow(context.Background(), `SELECT count(*) FROM pg_stat_activity
		WHERE datname = current_database() AND application_name = 'carpool' AND `+condition).Scan(&n)
	if err != nil {
		t.Error(err)
	}
	return n
}

// while runs do, and returns the most connections that the server had meanwhile.
func (l *locked) while(t *testing.T, do func()) (most int) {
	t.Helper()
	done := make(chan struct{})
	go func() { defer close(done); do() }()
	for {
		most = max(most, l.connections(t, "true"))
		select {
		case <-done:
			return most
		case <-time.After(5 * time.Millisecond):
		}
	}
}

const atWork = "state <> 'idle'"

// within fails unless it comes about soon; the lock is held all the time.
func within(t *testing.T, limit time.Duration, what string, holds func() bool) {
	t.Helper()
	for began := time.Now(); !holds(); time.Sleep(5 * time.Millisecond) {
		if time.Since(began) > limit {
			t.Errorf("it does not come about within %s that %s", limit, what)
			return
		}
	}
}

// gone is the limit for a server to be rid of a statement. Postgres takes
// milliseconds; the rest is for a busy machine. It is less than the kernel takes to give up
// a connection.
const gone = 10 * time.Second

const sleep = "SELECT pg_sleep(600)"

// stubborn is a statement that goes on when it is cancelled, so many times.
func stubborn(times string) string {
	return `DO $$ BEGIN FOR i IN 1..` + times + ` LOOP
		BEGIN PERFORM pg_sleep(600); EXCEPTION WHEN query_canceled THEN NULL; END;
	END LOOP; END $$`
}

// endless is a source of rows that has no end.
type endless struct{}

func (endless) Read(b []byte) (int, error) { return copy(b, "1\n"), nil }

func aRow() pgx.CopyFromSource { return pgx.CopyFromRows([][]any{{1}}) }

// longCopy is the way in which pgx closes the socket and cancels nothing.
const longCopy = "CopyFrom with more than the network holds"

// abandoned are the ways to give up what the server is doing for a connection, or to
// leave it behind. Each is given a context that ends soon.
var abandoned = map[string]func(context.Context, *dbpool.Pool, *dbpool.Conn) error{
	"CopyFrom": func(ctx context.Context, _ *dbpool.Pool, c *dbpool.Conn) error {
		_, err := c.CopyFrom(ctx, pgx.Identifier{"t"}, []string{"n"}, aRow())
		return err
	},
	"CopyFrom in a transaction": func(ctx context.Context, _ *dbpool.Pool, c *dbpool.Conn) error {
		return pgx.BeginFunc(ctx, c, func(tx pgx.Tx) error {
			_, err := tx.CopyFrom(ctx, pgx.Identifier{"t"}, []string{"n"}, aRow())
			return err
		})
	},
	longCopy: func(ctx context.Context, _ *dbpool.Pool, c *dbpool.Conn) error {
		_, err := c.Conn().PgConn().CopyFrom(ctx, endless{}, "COPY t FROM STDIN")
		return err
	},
	"CopyFrom from a source that hangs": func(ctx context.Context, _ *dbpool.Pool, c *dbpool.Conn) error {
		source, end := io.Pipe()
		context.AfterFunc(ctx, func() { time.AfterFunc(500*time.Millisecond, func() { _ = end.Close() }) })
		_, err := c.Conn().PgConn().CopyFrom(ctx, source, "COPY u FROM STDIN")
		return err
	},
	"CopyTo": func(ctx context.Context, _ *dbpool.Pool, c *dbpool.Conn) error {
		_, err := c.Conn().PgConn().CopyTo(ctx, io.Discard, "COPY t TO STDOUT")
		return err
	},
	"Exec": func(ctx context.Context, _ *dbpool.Pool, c *dbpool.Conn) error {
		_, err := c.Exec(ctx, "DELETE FROM t", pgx.QueryExecModeSimpleProtocol)
		return err
	},
	"Exec that goes on when it is cancelled": func(ctx context.Context, _ *dbpool.Pool, c *dbpool.Conn) error {
		_, err := c.Exec(ctx, stubborn("2"))
		return err
	},
	"QueryRow": func(ctx context.Context, _ *dbpool.Pool, c *dbpool.Conn) error {
		var n int
		return c.QueryRow(ctx, "SELECT n FROM t").Scan(&n)
	},
	"rows left open": func(ctx context.Context, _ *dbpool.Pool, c *dbpool.Conn) error {
		rows, err := c.Query(ctx, "SELECT repeat('x', 1000) FROM generate_series(1, 100000000)")
		if err != nil {
			return err
		}
		rows.Next()
		return context.DeadlineExceeded
	},
	"a batch left open": func(ctx context.Context, _ *dbpool.Pool, c *dbpool.Conn) error {
		b := new(pgx.Batch)
		b.Queue(sleep)
		c.SendBatch(ctx, b)
		return context.DeadlineExceeded
	},
	"a batch that is waited for": func(ctx context.Context, _ *dbpool.Pool, c *dbpool.Conn) error {
		b := new(pgx.Batch)
		b.Queue(sleep)
		return c.SendBatch(ctx, b).Close()
	},
	"Prepare": func(ctx context.Context, _ *dbpool.Pool, c *dbpool.Conn) error {
		_, err := c.Conn().Prepare(ctx, "p", "SELECT n FROM t")
		return err
	},
	"Begin": func(ctx context.Context, _ *dbpool.Pool, c *dbpool.Conn) error {
		_, err := c.BeginTx(ctx, pgx.TxOptions{BeginQuery: "BEGIN; LOCK TABLE t"})
		return err
	},
	"Commit": func(ctx context.Context, _ *dbpool.Pool, c *dbpool.Conn) error {
		return pgx.BeginFunc(ctx, c, func(tx pgx.Tx) error {
			_, err := tx.Exec(ctx, "INSERT INTO u VALUES (1)")
			return err
		})
	},
	"a large object": func(ctx context.Context, _ *dbpool.Pool, c *dbpool.Conn) error {
		return pgx.BeginFunc(ctx, c, func(tx pgx.Tx) error {
			objects := tx.LargeObjects()
			_, err := objects.Create(ctx, 0)
			return err
		})
	},
	"a pipeline": func(ctx context.Context, _ *dbpool.Pool, c *dbpool.Conn) error {
		p := c.Conn().PgConn().StartPipeline(ctx)
		p.SendQueryParams(sleep, nil, nil, nil, nil)
		if err := p.Sync(); err != nil {
			return err
		}
		return context.DeadlineExceeded
	},
	"a pipeline that is waited for": func(ctx context.Context, _ *dbpool.Pool, c *dbpool.Conn) error {
		p := c.Conn().PgConn().StartPipeline(ctx)
		p.SendQueryParams(sleep, nil, nil, nil, nil)
		return errors.Join(p.Sync(), p.Close())
	},
	"PgConn's own Exec": func(ctx context.Context, _ *dbpool.Pool, c *dbpool.Conn) error {
		c.Conn().PgConn().Exec(ctx, sleep)
		return context.DeadlineExceeded
	},
	"Conn's own Close": func(ctx context.Context, _ *dbpool.Pool, c *dbpool.Conn) error {
		c.Conn().PgConn().Exec(ctx, sleep)
		return errors.Join(c.Conn().Close(ctx), context.DeadlineExceeded)
	},
	"Hijack": func(ctx context.Context, _ *dbpool.Pool, c *dbpool.Conn) error {
		if _, err := c.Conn().PgConn().Hijack(); err != nil {
			return err
		}
		return context.DeadlineExceeded
	},
	"forgotten by its borrower": func(ctx context.Context, p *dbpool.Pool, c *dbpool.Conn) error {
		c.Release()
		ctx, b := p.Track(ctx, "job")
		defer b.End()
		if c, err := p.Acquire(ctx); err == nil {
			c.Conn().PgConn().Exec(ctx, sleep)
		}
		return context.DeadlineExceeded
	},
}

func TestPool_KeepsItsSizeAtTheServerHoweverAStatementIsAbandoned(t *testing.T) {
	t.Parallel()
	for way, abandon := range abandoned {
		t.Run(way, func(t *testing.T) {
			t.Parallel()
			keepsItsSize(t, lock(t, testservers.Postgres(t)), 2, 10, abandon)
		})
	}
	t.Run("24 times", func(t *testing.T) {
		t.Parallel()
		keepsItsSize(t, lock(t, testservers.Postgres(t)), 5, 24, abandoned[longCopy])
	})
	t.Run("TLS", func(t *testing.T) {
		t.Parallel()
		keepsItsSize(t, lock(t, startServer(t, servers.PostgresConfig{TLS: true}).URL()), 2, 10, abandoned[longCopy])
	})
}

// keepsItsSize has a pool of so many connections, and as many more under load, abandon
// so many statements.
func keepsItsSize(t *testing.T, l *locked, size, statements int, abandon func(context.Context, *dbpool.Pool, *dbpool.Conn) error) {
	p := openOn(t, l.url, func(c *dbpool.Config) { c.Size, c.MaxOverflow = size, size })
	most := l.while(t, func() {
		var jobs sync.WaitGroup
		for range statements {
			jobs.Go(func() {
				c, err := p.Acquire(t.Context())
				if err != nil {
					t.Error(err)
					return
				}
				defer c.Release()
				// Long enough for the statement to be at work mostly, too short at times.
				ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
				defer cancel()
				if err := abandon(ctx, p, c); err == nil {
					t.Error("what can't succeed has no error")
				}
			})
		}
		jobs.Wait()
	})
	if most > 2*size {
		t.Errorf("the server had %d connections of a pool of %d + %d", most, size, size)
	}
	within(t, gone, "no statement is at work", func() bool { return l.connections(t, atWork) == 0 })
	mustWork(t, p, "statements were abandoned")
}

func TestPool_KeepsItsSizeWhenConnectionsAreAbandonedBeforeTheyAreLent(t *testing.T) {
	t.Parallel()
	l := lock(t, testservers.Postgres(t))
	p := openOn(t, l.url, func(c *dbpool.Config) {
		c.Size, c.MaxOverflow = 1, 1
		c.AfterConnect = func(ctx context.Context, conn *pgx.Conn) error {
			ctx, cancel := context.WithTimeout(ctx, 50*time.Millisecond)
			defer cancel()
			_, err := conn.PgConn().CopyFrom(ctx, endless{}, "COPY t FROM STDIN")
			return err
		}
	})
	most := l.while(t, func() {
		for range 12 {
			if _, err := p.Acquire(t.Context()); err == nil {
				t.Error("a connection is lent that AfterConnect has not finished")
			}
		}
	})
	if most > 2 {
		t.Errorf("the server had %d connections of a pool of 1 + 1", most)
	}
	within(t, gone, "no statement is at work", func() bool { return l.connections(t, atWork) == 0 })
}

func TestPool_KeepsItsSizeWhenTheServerTakesLongToLetItIn(t *testing.T) {
	t.Parallel()
	url := startServer(t, servers.PostgresConfig{}).URL()
	holder := connect(t, url)
	p := openOn(t, url, func(c *dbpool.Config) { c.Size, c.MaxOverflow, c.Timeout = 1, 0, 300*time.Millisecond })
	// It keeps all who log in waiting.
	if _, err := holder.Exec(t.Context(), "BEGIN; LOCK TABLE pg_authid"); err != nil {
		t.Fatal(err)
	}
	for began := time.Now(); time.Since(began) < 700*time.Millisecond; {
		if _, err := p.Acquire(t.Context()); err == nil {
			t.Fatal("the lock doesn't keep anybody waiting")
		}
		var n int
		if err := holder.QueryRow(t.Context(), "SELECT count(DISTINCT pid) FROM pg_locks WHERE NOT granted").Scan(&n); err != nil {
			t.Fatal(err)
		}
		if n > 1 && time.Since(began) < time.Second { // for so long it waits for the server
			t.Fatalf("%d of a pool of 1 are being let in", n)
		}
	}
	if _, err := holder.Exec(t.Context(), "ROLLBACK"); err != nil {
		t.Fatal(err)
	}
	testservers.Eventually(t, "it is let in", func() bool { return p.Ping(t.Context()) == nil })
}

func TestPool_CloseLeavesNothingAtWork(t *testing.T) {
	t.Parallel()
	l := lock(t, testservers.Postgres(t))
	p := openOn(t, l.url, nil)
	var jobs sync.WaitGroup
	// One that has given up, and two that don't.
	ctx, cancel := context.WithCancel(t.Context())
	copyIn := func(ctx context.Context) {
		c, err := p.Acquire(ctx)
		if err != nil {
			t.Error(err)
			return
		}
		defer c.Release()
		_ = abandoned[longCopy](ctx, p, c)
	}
	jobs.Go(func() { copyIn(ctx) })
	jobs.Go(func() { copyIn(context.Background()) })
	jobs.Go(func() { _, _ = p.Exec(context.Background(), sleep) })
	testservers.Eventually(t, "all are at work", func() bool { return l.connections(t, atWork) == 3 })
	cancel()
	p.Close()
	if n := l.connections(t, "true"); n != 0 {
		t.Errorf("after Close the server has %d connections", n)
	}
	jobs.Wait()
	if n := p.Stats().Counts.ClosedLeaked; n != 2 {
		t.Errorf("%d were counted as leaked", n)
	}
}

func TestPool_WaitsForAServerThatDoesNotEndAStatementNoLongerThanItSays(t *testing.T) {
	t.Parallel()
	var log testservers.Log
	l := lock(t, testservers.Postgres(t))
	p := openOn(t, l.url, func(c *dbpool.Config) {
		c.Size, c.MaxOverflow = 1, 0
		c.Logger = slog.New(slog.NewTextHandler(&log, nil))
	})
	ctx, cancel := context.WithCancel(t.Context())
	var job sync.WaitGroup
	job.Go(func() { _, _ = p.Exec(ctx, stubborn("1000")) })
	testservers.Eventually(t, "it is at work", func() bool { return l.connections(t, atWork) == 1 })
	cancel()
	began := time.Now()
	job.Wait()
	c := acquire(t, p)
	defer c.Release()
	if took := time.Since(began); took < 5*time.Second || took > 7*time.Second {
		t.Errorf("its place was given to another after %s", took)
	}
	if !strings.Contains(log.String(), "the server did not end in time what it was asked to") {
		t.Errorf("nothing of it is in the log: %s", log.String())
	}
}

// throughProxy opens a pool that reaches the database through a proxy, and has it do
// something that waits for the lock, in each of some ways, until ctx ends.
func (l *locked) throughProxy(ctx context.Context, t *testing.T, ways ...string) (*dbpool.Pool, *testservers.Proxy, *sync.WaitGroup) {
	t.Helper()
	u, err := url.Parse(l.url)
	if err != nil {
		t.Fatal(err)
	}
	proxy := testservers.NewProxy(t, u.Host)
	u.Host = proxy.Addr()
	p := openOn(t, u.String(), func(c *dbpool.Config) { c.Size, c.MaxOverflow, c.Timeout = len(ways), 0, 6*time.Second })
	var jobs sync.WaitGroup
	for _, way := range ways {
		c := acquire(t, p)
		jobs.Go(func() {
			defer c.Release()
			if err := abandoned[way](ctx, p, c); err == nil {
				t.Errorf("%s, which can't succeed, has no error", way)
			}
		})
	}
	testservers.Eventually(t, "all are at work", func() bool { return l.connections(t, atWork) == len(ways) })
	return p, proxy, &jobs
}

func TestPool_CancelsStatementsWhoseLineBreaks(t *testing.T) {
	t.Parallel()
	l := lock(t, testservers.Postgres(t))
	_, proxy, jobs := l.throughProxy(t.Context(), t, longCopy, "Exec")
	proxy.Reset()
	jobs.Wait()
	within(t, gone, "no statement is at work", func() bool { return l.connections(t, atWork) == 0 })
}

func TestPool_AbandonedStatementsOfAServerThatIsAwayKeepTheirPlacesForASecond(t *testing.T) {
	t.Parallel()
	l := lock(t, testservers.Postgres(t))
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	p, proxy, jobs := l.throughProxy(ctx, t, longCopy, "Exec")
	proxy.Blackhole()
	cancel()
	jobs.Wait()
	// In the place of one of them an attempt to connect is made, for 2 s.
	if err := p.Ping(t.Context()); !dbpool.IsAway(err) || errors.As(err, new(*dbpool.TimeoutError)) {
		t.Errorf("within 6 s nobody tries to connect anew: %v", err)
	}
	began := time.Now()
	p.Close()
	if took := time.Since(began); took > 3*time.Second {
		t.Errorf("closing took %s", took)
	}
}
