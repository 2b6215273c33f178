//go:build long && unix

package worker_test

import (
	"context"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/carpool-go/carpool/internal/servers"
	"github.com/carpool-go/carpool/internal/testservers"
	"github.com/carpool-go/carpool/worker/internal/workertest"
)

// The long runs are the chaos test's jobs, under load, while one thing is done to the
// servers. None is parallel: each needs the whole machine, as its load must not be what
// another's fault is.

// newLoadRun prepares a run of the chaos test's jobs that are enqueued over some time. Its
// servers run, its workers don't yet.
func newLoadRun(t *testing.T, jobs int, over time.Duration, cfg servers.PostgresConfig) *chaos {
	t.Helper()
	c := &chaos{t: t, mode: protected, jobs: jobs, time: over}
	c.startServers(cfg)
	return c
}

// mustKeepThePromise fails the test unless each job that was enqueued had its effect once.
func (c *chaos) mustKeepThePromise(r *chaosReport) {
	c.t.Helper()
	c.t.Logf("%d enqueued, %d rolled back, %d effects: %d lost, %d doubled, %d of what was rolled back, %d archived, %d not done, %d on their way, %d crashes; "+
		"%d tries used up, %d postponed, longest time without an effect %s, took %s",
		r.enqueued, r.rolledBack, r.effects, r.lost, r.doubled, r.phantoms, r.archived, r.late, r.left, r.crashed,
		r.retries, r.postponed, r.stall.Round(time.Millisecond), r.took.Round(time.Second))
	if r.enqueued+r.rolledBack != c.jobs || r.enqueued == 0 {
		c.t.Errorf("%d jobs were enqueued and %d rolled back, of %d", r.enqueued, r.rolledBack, c.jobs)
	}
	if !r.right() {
		c.t.Error("the promise is broken")
		c.explain(r)
	}
}

// standby is the standby of a run's Postgres.
type standby struct {
	*servers.Postgres
	db       *pgxpool.Pool
	promoted time.Time
}

// withStandby gives a run a standby that has what the primary has confirmed, and the
// machines a URL of both, in which the path to the primary is a proxy.
func (c *chaos) withStandby(standbyFirst bool) *standby {
	c.t.Helper()
	server, err := c.postgres.StartStandby(c.t.Context())
	if err != nil {
		c.t.Fatal(err)
	}
	c.t.Cleanup(func() { _ = server.Stop() })
	db, err := pgxpool.New(c.t.Context(), server.URL())
	if err != nil {
		c.t.Fatal(err)
	}
	c.t.Cleanup(db.Close)
	c.cable = func() (string, *testservers.Proxy) {
		through, proxy := testservers.ThroughProxy(c.t, c.postgres.URL())
		u := testservers.ParseURL(c.t, through)
		other := testservers.ParseURL(c.t, server.URL()).Host
		if standbyFirst {
			u.Host = other + "," + u.Host
		} else {
			u.Host += "," + other
		}
		return testservers.WithParam(c.t, u.String(), "target_session_attrs", "read-write"), proxy
	}
	return &standby{Postgres: server, db: db}
}

// remoteApply has a commit be confirmed when it can be seen on the standby.
func remoteApply() servers.PostgresConfig {
	return servers.PostgresConfig{Settings: map[string]string{"synchronous_commit": "remote_apply", "max_connections": "200"}}
}

// failsOver looks at what a run has come to in the standby, which is the primary by now.
func (c *chaos) failsOver(s *standby, since time.Time, r *chaosReport) {
	c.t.Helper()
	c.mustKeepThePromise(r)
	var first time.Time
	if err := c.db.QueryRow(c.t.Context(), "SELECT min(at) FROM effects WHERE at > $1", s.promoted).Scan(&first); err != nil {
		c.t.Fatalf("no effect came after the promotion: %v", err)
	}
	c.t.Logf("%s after the primary had gone the standby was promoted, and %s later the first effect came",
		s.promoted.Sub(since).Round(time.Millisecond), first.Sub(s.promoted).Round(time.Millisecond))

	// The relays have followed, and what is enqueued there by SQL alone is run.
	conn, err := pgx.Connect(c.t.Context(), s.URL())
	if err != nil {
		c.t.Fatal(err)
	}
	defer conn.Close(context.Background())
	workertest.Eventually(c.t, "each worker listens to the new primary", func() bool {
		var listeners int
		err := conn.QueryRow(c.t.Context(), "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'carpool relay'").Scan(&listeners)
		return err == nil && listeners == len(c.workers)
	})
	const n = -1
	began := time.Now()
	if _, err := conn.Exec(c.t.Context(), "SELECT carpool.enqueue('chaos:effect', jsonb_build_object('n', $1::int))", n); err != nil {
		c.t.Fatal(err)
	}
	workertest.Eventually(c.t, "a job that was enqueued on the new primary has its effect", func() bool {
		var effects int
		err := conn.QueryRow(c.t.Context(), "SELECT count(*) FROM effects WHERE n = $1", n).Scan(&effects)
		return err == nil && effects == 1
	})
	c.t.Logf("a job that was enqueued on the new primary had its effect after %s", time.Since(began).Round(time.Millisecond))
}

func TestLong_ThePrimaryIsKilledAndAStandbyTakesOver(t *testing.T) {
	c := newLoadRun(t, 3000, 30*time.Second, remoteApply())
	s := c.withStandby(false)
	c.startWorkers()
	var since time.Time
	r := c.run(func(ctx context.Context) {
		sleepFor(ctx, c.time/3)
		since = time.Now()
		c.note("kill -9 of the primary", "all", 0)
		c.postgres.Kill()
		sleepFor(ctx, 2*time.Second) // in which somebody decides
		c.takeOver(s)
	})
	c.failsOver(s, since, r)
}

// takeOver promotes the standby, and has the effects looked for there.
func (c *chaos) takeOver(s *standby) {
	c.note("promotion of the standby", "all", 0)
	if err := s.Promote(c.t.Context()); err != nil {
		c.t.Error(err)
		return
	}
	s.promoted, c.db = time.Now(), s.db
}

func TestLong_ASwitchoverToAStandbyThatIsFirstInTheURL(t *testing.T) {
	c := newLoadRun(t, 3000, 30*time.Second, remoteApply())
	s := c.withStandby(true)
	c.startWorkers()
	var since time.Time
	r := c.run(func(ctx context.Context) {
		sleepFor(ctx, c.time/3)
		since = time.Now()
		c.note("fast shutdown of the primary", "all", 0)
		if err := c.postgres.Shutdown(c.t.Context(), "fast"); err != nil {
			t.Error(err)
		}
		c.takeOver(s)
	})
	c.failsOver(s, since, r)
}

// terminateBackends ends so many sessions, or fewer if there aren't so many, at random.
const terminateBackends = `SELECT count(pg_terminate_backend(pid)) FROM (SELECT pid FROM pg_stat_activity
	WHERE pid <> pg_backend_pid() AND backend_type = 'client backend' ORDER BY random() LIMIT $1) b`

// Split brain: the old primary, first in the URL, takes writes again, and has nobody to
// confirm them.
func TestLong_AFrozenPrimaryWakesWhenAStandbyHasTakenOver(t *testing.T) {
	c := newLoadRun(t, 3000, 45*time.Second, remoteApply())
	s := c.withStandby(false)
	c.startWorkers()
	var since time.Time
	r := c.run(func(ctx context.Context) {
		sleepFor(ctx, c.time/3)
		since = time.Now()
		c.note("SIGSTOP of the primary", "all", 0)
		if err := c.postgres.Pause(); err != nil {
			t.Error(err)
		}
		sleepFor(ctx, 2*time.Second)
		c.takeOver(s)
		sleepFor(ctx, c.time/3)
		// A producer who asks the old one what became of his commit may hear of one that
		// the old one alone has. Those here know better.
		c.producers.postgres.Refuse()
		c.producers.postgres.Reset()
		c.note("SIGCONT of the old primary", "all", 0)
		if err := c.postgres.Resume(); err != nil {
			t.Error(err)
		}
		// Connections come to their ends, and new ones lead to the old one, which is first.
		// There commits wait until their jobs' time is up.
		for awake := time.Now(); time.Since(awake) < (chaosEffect{}).Options().Timeout+15*time.Second; {
			sleepFor(c.t.Context(), time.Second)
			if _, err := c.db.Exec(c.t.Context(), terminateBackends, 10); err != nil {
				t.Error(err)
			}
		}
		c.note("kill -9 of the old primary", "all", 0)
		c.postgres.Kill()
	})
	c.failsOver(s, since, r)
}
