package tasks_test

import (
	"context"
	"strconv"
	"sync"
	"testing"

	"github.com/jackc/pgx/v5"

	"github.com/carpool-go/carpool/dbpool"
	"github.com/carpool-go/carpool/internal/testservers"
	"github.com/carpool-go/carpool/tasks"
)

func TestRegisterTx_EffectsHappenOnceThroughPgBouncer(t *testing.T) {
	t.Parallel()
	a := openAccount(t, func(s *tasks.Set) {
		tasks.RegisterTx(s, func(ctx context.Context, _ *tasks.Job, tx pgx.Tx, p credit) (int, error) {
			return add(ctx, tx, p.Amount)
		})
	})
	cfg := dbpool.DefaultConfig(testservers.PgBouncer(t, a.DatabaseURL))
	cfg.ThroughPooler = true
	db, err := dbpool.Open(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	const jobs, deliveries = 10, 4
	var wg sync.WaitGroup
	for range deliveries {
		for i := range jobs {
			wg.Go(func() {
				if _, err := a.deliver(t.Context(), db, strconv.Itoa(i)); err != nil {
					t.Error(err)
				}
			})
		}
	}
	wg.Wait()
	if balance := a.balance(t); balance != 5*jobs {
		t.Errorf("the balance is %d, want %d", balance, 5*jobs)
	}
}

func TestFirstDelivery_EachFirstStatementHasItsEffectOnceThroughPgBouncer(t *testing.T) {
	t.Parallel()
	testFirstStatements(t, func(url string) *dbpool.Pool {
		cfg := dbpool.DefaultConfig(testservers.PgBouncer(t, url))
		cfg.ThroughPooler = true
		db, err := dbpool.Open(t.Context(), cfg)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(db.Close)
		return db
	})
}
