//go:build long && unix

package worker_test

import (
	"context"
	"fmt"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/carpool-go/carpool/internal/testservers"
	"github.com/carpool-go/carpool/tasks"
)

// Each step inserts its row and enqueues the next in one transaction, and the only worker is
// killed again and again.
func TestLong_ChainsOfTenThousandStepsThroughEightKills(t *testing.T) {
	const chains, steps, kills = 20, 500, 8
	l := installMigrated(t, testservers.Redis(t))
	// Nothing is unique: doubles must show.
	l.exec(t, "CREATE TABLE steps (chain int, step int, at timestamptz DEFAULT clock_timestamp())")
	worker := l.start(t, `"msg":"worker started"`, "run")
	client := tasks.NewClient(nil)
	err := pgx.BeginFunc(t.Context(), l.db, func(tx pgx.Tx) error {
		for chain := range chains {
			if _, err := client.EnqueueTx(t.Context(), tx, chainStep{Chain: chain, Step: 1, Steps: steps}, nil); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	done := func(ctx context.Context) (n int) {
		_ = l.db.QueryRow(ctx, "SELECT count(*) FROM steps").Scan(&n)
		return n
	}
	for kill := range kills {
		most := (kill + 1) * chains * steps / (kills + 1)
		longest(t, 3*time.Minute, fmt.Sprintf("%d steps are done", most), func(ctx context.Context) bool { return done(ctx) >= most })
		worker.kill()
		if n := done(t.Context()); n >= chains*steps {
			t.Fatalf("kill %d comes after the last step, so it shows nothing", kill+1)
		}
		worker = l.start(t, `"msg":"worker started"`, "run")
	}
	longest(t, 3*time.Minute, "all steps are done", func(ctx context.Context) bool { return done(ctx) >= chains*steps })
	longest(t, time.Minute, "the outbox is empty", func(ctx context.Context) bool {
		var n int
		return l.db.QueryRow(ctx, "SELECT count(*) FROM carpool.outbox").Scan(&n) == nil && n == 0
	})
	t.Logf("%d steps through %d kills in %v; the longest time without one was %d s", chains*steps, kills, time.Since(began).Round(time.Second),
		l.count(t, "SELECT extract(epoch FROM max(gap))::int FROM (SELECT at - lag(at) OVER (ORDER BY at) AS gap FROM steps) g"))
	if rows, distinct := l.count(t, "SELECT count(*) FROM steps"), l.count(t, "SELECT count(DISTINCT (chain, step)) FROM steps WHERE step BETWEEN 1 AND 500"); rows != chains*steps || distinct != rows {
		t.Errorf("there are %d rows of %d steps, want one of each of %d", rows, distinct, chains*steps)
	}
}
