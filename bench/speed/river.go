package main

import (
	"context"
	"log/slog"
	"strconv"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/riverqueue/river"
	"github.com/riverqueue/river/riverdriver/riverpgxv5"
	"github.com/riverqueue/river/rivermigrate"
)

const (
	// riverSlots is how many jobs River has at least at once, because it fetches as many at
	// a time.
	riverSlots = 100
	// riverConnections is what River has beyond the jobs' connections, for fetching,
	// completing and listening.
	riverConnections = 5
)

// riverJob is a job of any of the three kinds.
type riverJob struct {
	At  int64  `json:"at"`
	Job string `json:"job"`
}

func (riverJob) Kind() string { return "bench" }

// riverWorker does what a job says.
type riverWorker struct {
	river.WorkerDefaults[riverJob]
	rec  *recorder
	pool *pgxpool.Pool
}

// Work does the job.
func (w *riverWorker) Work(ctx context.Context, job *river.Job[riverJob]) error {
	return w.rec.job(job.Args.At, func() error {
		id := strconv.FormatInt(job.ID, 10)
		switch job.Args.Job {
		case insertJob:
			_, err := w.pool.Exec(ctx, insert, id)
			return err
		case onceJob:
			return pgx.BeginFunc(ctx, w.pool, func(tx pgx.Tx) error {
				if _, err := tx.Exec(ctx, insert, id); err != nil {
					return err
				}
				_, err := river.JobCompleteTx[*riverpgxv5.Driver](ctx, tx, job)
				return err
			})
		}
		return nil
	})
}

func prepareRiver(ctx context.Context, s spec) error {
	pool, err := openPool(ctx, s.DatabaseURL, s.PoolSize)
	if err != nil {
		return err
	}
	defer pool.Close()
	migrator, err := rivermigrate.New(riverpgxv5.New(pool), &rivermigrate.Config{Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		return err
	}
	_, err = migrator.Migrate(ctx, rivermigrate.DirectionUp, nil)
	return err
}

func produceRiver(ctx context.Context, s spec) error {
	pool, err := openPool(ctx, s.DatabaseURL, s.PoolSize)
	if err != nil {
		return err
	}
	defer pool.Close()
	client, err := river.NewClient(riverpgxv5.New(pool), &river.Config{
		FetchCooldown: river.FetchCooldownMin, // so often at most a client tells the workers of new jobs
		Logger:        slog.New(slog.DiscardHandler),
	})
	if err != nil {
		return err
	}
	now := func() riverJob { return riverJob{At: time.Now().UnixNano(), Job: s.Job} }
	if s.Pause > 0 {
		return producing(ctx, s, func(ctx context.Context) error {
			_, err := client.Insert(ctx, now(), nil)
			return err
		})
	}
	const atOnce = 5000
	for done := 0; done < s.Jobs; done += atOnce {
		batch := make([]river.InsertManyParams, min(atOnce, s.Jobs-done))
		for i := range batch {
			batch[i].Args = now()
		}
		if _, err := client.InsertManyFast(ctx, batch); err != nil {
			return err
		}
	}
	return nil
}

func riverLeft(ctx context.Context, s spec) (left int, err error) {
	conn, err := pgx.Connect(ctx, s.DatabaseURL)
	if err != nil {
		return 0, err
	}
	defer conn.Close(context.WithoutCancel(ctx))
	err = conn.QueryRow(ctx, "SELECT count(*) FROM river_job WHERE state <> 'completed'").Scan(&left)
	return left, err
}

func workRiver(ctx context.Context, s spec, rec *recorder) error {
	pool, err := openPool(ctx, s.DatabaseURL, s.PoolSize+riverConnections)
	if err != nil {
		return err
	}
	defer pool.Close()
	workers := river.NewWorkers()
	river.AddWorker(workers, &riverWorker{rec: rec, pool: pool})
	client, err := river.NewClient(riverpgxv5.New(pool), &river.Config{
		FetchCooldown: river.FetchCooldownMin,
		Queues:        map[string]river.QueueConfig{river.QueueDefault: {MaxWorkers: max(riverSlots, s.Slots)}},
		Workers:       workers,
		Logger:        slog.New(slog.DiscardHandler),
	})
	if err != nil {
		return err
	}
	if err := client.Start(context.WithoutCancel(ctx)); err != nil {
		return err
	}
	close(rec.started)
	<-ctx.Done()
	return client.Stop(context.WithoutCancel(ctx))
}
