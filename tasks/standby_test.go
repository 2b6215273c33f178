//go:build unix

package tasks_test

import (
	"context"
	"errors"
	"log/slog"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"

	"github.com/carpool-go/carpool/internal/once"
	"github.com/carpool-go/carpool/internal/schema"
	"github.com/carpool-go/carpool/internal/servers"
	"github.com/carpool-go/carpool/internal/testservers"
	"github.com/carpool-go/carpool/tasks"
)

// A commit that waits for a synchronous standby, and whose session is ended, can be seen on
// the primary all the same. The standby doesn't have it when it takes over.
func TestRegisterTx_ARecordThatNoStandbyHasIsNotTheJobsEnd(t *testing.T) {
	t.Parallel()
	tx := func(ctx context.Context, _ *tasks.Job, tx pgx.Tx, p credit) (int, error) {
		return add(ctx, tx, p.Amount)
	}
	for name, register := range map[string]func(*tasks.Set){
		"RegisterTx": func(s *tasks.Set) { tasks.RegisterTx(s, tx) },
		"RegisterOnce": func(s *tasks.Set) {
			tasks.RegisterOnce(s, func(ctx context.Context, job *tasks.Job, p credit) (int, error) {
				return tasks.Once(ctx, job, func(dbTx pgx.Tx) (int, error) { return tx(ctx, job, dbTx, p) })
			})
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			primary, err := servers.StartPostgres(t.Context(), servers.PostgresConfig{})
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = primary.Stop() })
			if err := schema.Migrate(t.Context(), primary.URL(), slog.New(slog.DiscardHandler)); err != nil {
				t.Fatal(err)
			}
			a := openAccount(t, register)
			db := openPool(t, primary.URL())
			if _, err := db.Exec(t.Context(), "CREATE TABLE account AS SELECT 0 AS balance"); err != nil {
				t.Fatal(err)
			}
			standby, err := primary.StartStandby(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = standby.Stop() })
			if err := standby.Shutdown(t.Context(), "fast"); err != nil {
				t.Fatal(err)
			}

			id := uuid.NewString()
			first := make(chan error, 1)
			go func() {
				_, err := a.deliver(t.Context(), db, id)
				first <- err
			}()
			testservers.Eventually(t, "the commit waits for the standby, and its session is ended", func() bool {
				var ended int
				err := db.QueryRow(t.Context(), "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE wait_event = 'SyncRep'").Scan(&ended)
				return err == nil && ended > 0
			})
			if err := <-first; !errors.Is(err, once.ErrNoAnswer) {
				t.Errorf("the first delivery: error %v", err)
			}
			var balance int
			if err := db.QueryRow(t.Context(), "SELECT balance FROM account").Scan(&balance); err != nil || balance != 5 {
				t.Fatalf("the primary has not kept what was committed: the balance is %d, %v", balance, err)
			}
			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			defer cancel()
			if result, err := a.deliver(ctx, db, id); !errors.Is(err, once.ErrNotBegun) {
				t.Errorf("the second delivery, while the primary alone has the record: result %s, error %v", result, err)
			}

			primary.Kill()
			if err := standby.Restart(t.Context(), "fast"); err != nil {
				t.Fatal(err)
			}
			if err := standby.Promote(t.Context()); err != nil {
				t.Fatal(err)
			}
			db = openPool(t, standby.URL())
			for range 2 {
				if result, err := a.deliver(t.Context(), db, id); result != "5" || err != nil {
					t.Errorf("after the failover: result %s, error %v", result, err)
				}
			}
		})
	}
}
