package bench

import (
	"context"
	"log/slog"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"

	"github.com/carpool-go/carpool/dbpool"
	"github.com/carpool-go/carpool/internal/schema"
	"github.com/carpool-go/carpool/internal/testservers"
	"github.com/carpool-go/carpool/tasks"
)

type insert struct{}

func (insert) Kind() string           { return "bench:insert" }
func (insert) Options() tasks.Options { return tasks.Options{} }
func (insert) Validate() error        { return nil }

// BenchmarkOnce shows what it costs that a job's effect happens once: the same
// insert in a transaction that the handler makes itself, and in the worker's, on a
// first delivery and on a later one; on this machine, and with a database that is a
// millisecond away.
func BenchmarkOnce(b *testing.B) {
	log := slog.New(slog.DiscardHandler)
	if err := schema.Migrate(b.Context(), databaseURL, log); err != nil {
		b.Fatal(err)
	}
	farURL, far := testservers.ThroughProxy(b, databaseURL)
	far.Delay(500 * time.Microsecond) // each way

	effect := func(ctx context.Context, tx pgx.Tx) error {
		_, err := tx.Exec(ctx, "INSERT INTO effects VALUES ($1)", 1)
		return err
	}
	var own, once tasks.Set
	tasks.Register(&own, func(ctx context.Context, job *tasks.Job, _ insert) (any, error) {
		return nil, pgx.BeginFunc(ctx, job.DB, func(tx pgx.Tx) error { return effect(ctx, tx) })
	})
	tasks.RegisterTx(&once, func(ctx context.Context, _ *tasks.Job, tx pgx.Tx, _ insert) (any, error) {
		return nil, effect(ctx, tx)
	})
	for _, c := range []struct {
		name, url string
		set       *tasks.Set
		delivery  int
	}{
		{"here/own", databaseURL, &own, 1},
		{"here/once", databaseURL, &once, 1},
		{"here/once-again", databaseURL, &once, 2},
		{"away/own", farURL, &own, 1},
		{"away/once", farURL, &once, 1},
		{"away/once-again", farURL, &once, 2},
	} {
		b.Run(c.name, func(b *testing.B) {
			cfg := dbpool.DefaultConfig(c.url)
			cfg.Logger = log
			db, err := dbpool.Open(b.Context(), cfg)
			if err != nil {
				b.Fatal(err)
			}
			defer db.Close()
			if _, err := db.Exec(b.Context(), "CREATE TABLE IF NOT EXISTS effects (n int)"); err != nil {
				b.Fatal(err)
			}
			task, err := c.set.Lookup("bench:insert")
			if err != nil {
				b.Fatal(err)
			}
			for b.Loop() {
				job := &tasks.Job{ID: uuid.Must(uuid.NewV7()).String(), Kind: task.Kind, Queue: "default", Delivery: c.delivery, DB: db, Log: log}
				if _, err := task.Run(b.Context(), job, insert{}); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
