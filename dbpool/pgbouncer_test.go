//go:build linux

package dbpool_test

import (
	"sync"
	"testing"

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
