//go:build long && unix

package worker_test

import (
	"context"
	"testing"
	"time"

	"github.com/carpool-go/carpool/internal/servers"
)

func TestLong_BackendsAreKilledOverTLS(t *testing.T) {
	c := newLoadRun(t, 2400, 40*time.Second, servers.PostgresConfig{TLS: true, Settings: map[string]string{"max_connections": "200"}})
	c.startWorkers()
	killed := 0
	r := c.run(func(context.Context) {
		const times, each = 20, 10
		for i := range times {
			sleepFor(t.Context(), c.time/times)
			var plain, n int
			if err := c.db.QueryRow(t.Context(), `SELECT count(*) FROM pg_stat_ssl JOIN pg_stat_activity USING (pid)
				WHERE NOT ssl AND backend_type = 'client backend'`).Scan(&plain); err != nil || plain > 0 {
				t.Errorf("%d connections are without TLS, %v", plain, err)
			}
			if err := c.db.QueryRow(t.Context(), terminateBackends, each).Scan(&n); err != nil {
				t.Errorf("kill %d: %v", i, err)
			}
			killed += n
		}
	})
	c.mustKeepThePromise(r)
	t.Logf("%d backends were killed", killed)
	if killed < 150 { // of 200; there may be fewer than ten at a time
		t.Errorf("%d backends were killed", killed)
	}
}
