//go:build long && linux

package worker_test

import (
	"context"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/carpool-go/carpool/internal/servers"
	"github.com/carpool-go/carpool/internal/testservers"
)

func TestLong_AnOperatorWorksOnPgBouncer(t *testing.T) {
	c := newLoadRun(t, 1800, 45*time.Second, servers.PostgresConfig{})
	bouncer := testservers.PgBouncer(t, c.postgres.URL())
	c.cable = func() (string, *testservers.Proxy) {
		through, proxy := testservers.ThroughProxy(t, bouncer)
		// For the producers, whose pool is pgx's own.
		return testservers.WithParam(t, through, "default_query_exec_mode", "exec"), proxy
	}
	c.env = []string{"DB_POOLER=true"}
	c.startWorkers()

	u := testservers.ParseURL(t, bouncer)
	u.Path = "/pgbouncer"
	console, err := pgconn.Connect(t.Context(), u.String())
	if err != nil {
		t.Fatal(err)
	}
	defer console.Close(context.Background())
	admin := func(command string) {
		c.note(command, "PgBouncer", 0)
		if _, err := console.Exec(t.Context(), command).ReadAll(); err != nil {
			t.Errorf("%s: %v", command, err)
		}
	}
	r := c.run(func(context.Context) {
		const rounds, steps = 3, 5
		pause := func() { sleepFor(t.Context(), c.time/(rounds*steps)) }
		for range rounds {
			pause()
			admin("PAUSE postgres")
			pause()
			admin("RESUME postgres")
			pause()
			admin("RECONNECT postgres")
			pause()
			admin("KILL postgres")
			pause()
			admin("RESUME postgres")
		}
	})
	c.mustKeepThePromise(r)
}
