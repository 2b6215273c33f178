//go:build linux

package dbpool_test

import (
	"context"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/carpool-go/carpool/dbpool"
	"github.com/carpool-go/carpool/internal/testservers"
)

func TestPool_WorksThroughPgBouncerInTransactionMode(t *testing.T) {
	t.Parallel()
	p := open(t, func(c *dbpool.Config) {
		c.URL = testservers.PgBouncer(t, c.URL)
		c.ThroughPooler = true
	})
	if _, err := p.Exec(t.Context(), "CREATE TABLE t (n int)"); err != nil {
		t.Fatal(err)
	}
	// More of our connections than the pooler has of its own, so that the
	// transactions of one of ours run on different ones of its.
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			for j := range 25 {
				var sum int
				if err := p.QueryRow(t.Context(), "SELECT $1::int + $2::int", i, j).Scan(&sum); err != nil || sum != i+j {
					t.Errorf("%d + %d is %d, %v", i, j, sum, err)
					return
				}
				err := pgx.BeginFunc(t.Context(), p, func(tx pgx.Tx) error {
					_, err := tx.Exec(t.Context(), "INSERT INTO t VALUES ($1)", j)
					return err
				})
				if err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
	var n int
	if err := p.QueryRow(t.Context(), "SELECT count(*) FROM t WHERE n >= $1", 0).Scan(&n); err != nil || n != 8*25 {
		t.Errorf("%d rows, %v", n, err)
	}
}

func TestPool_CancelsAbandonedStatementsThroughPgBouncer(t *testing.T) {
	t.Parallel()
	l := lock(t, testservers.Postgres(t))
	p := openOn(t, testservers.PgBouncer(t, l.url), func(c *dbpool.Config) { c.ThroughPooler = true })
	var jobs sync.WaitGroup
	for range 2 { // as many as the pooler has connections of its own
		jobs.Go(func() {
			c := acquire(t, p)
			defer c.Release()
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			time.AfterFunc(100*time.Millisecond, cancel)
			_ = abandoned[longCopy](ctx, p, c)
		})
	}
	jobs.Wait()
	within(t, gone, "no statement is at work", func() bool { return l.connections(t, atWork) == 0 })
	mustWork(t, p, "statements were abandoned")
}
