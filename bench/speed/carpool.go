package main

import (
	"context"
	"log/slog"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/carpool-go/carpool/dbpool"
	"github.com/carpool-go/carpool/tasks"
	"github.com/carpool-go/carpool/worker"
)

// parcels is carpool's group of the three kinds of job.
type parcels struct{ *recorder }

func (p parcels) Register(s *tasks.Set) {
	tasks.Register(s, func(_ context.Context, _ *tasks.Job, e empty) (any, error) {
		return nil, p.job(e.At, func() error { return nil })
	})
	tasks.Register(s, func(ctx context.Context, job *tasks.Job, i inserting) (any, error) {
		return nil, p.job(i.At, func() error {
			_, err := job.DB.Exec(ctx, insert, job.ID)
			return err
		})
	})
	tasks.RegisterTx(s, func(ctx context.Context, job *tasks.Job, tx pgx.Tx, o insertingOnce) (any, error) {
		return nil, p.job(o.At, func() error {
			_, err := tx.Exec(ctx, insert, job.ID)
			return err
		})
	})
}

// Start is called by the worker.
func (p parcels) Start(context.Context) error {
	close(p.started)
	return nil
}

// enqueued is a payload: when its job was enqueued, in ns since 1970.
type enqueued struct {
	At int64 `json:"at"`
}

func (enqueued) Options() tasks.Options { return tasks.Options{} }
func (enqueued) Validate() error        { return nil }

type (
	empty         struct{ enqueued }
	inserting     struct{ enqueued }
	insertingOnce struct{ enqueued }
)

func (empty) Kind() string         { return "bench:empty" }
func (inserting) Kind() string     { return "bench:insert" }
func (insertingOnce) Kind() string { return "bench:once" }

func prepareCarpool(ctx context.Context, s spec) error {
	return worker.Migrate(ctx, s.DatabaseURL, slog.New(slog.DiscardHandler), parcels{})
}

func produceCarpool(ctx context.Context, s spec) error {
	rdb, err := tasks.OpenRedis(s.RedisURL)
	if err != nil {
		return err
	}
	defer rdb.Close()
	client := tasks.NewClient(rdb)
	return producing(ctx, s, func(ctx context.Context) error {
		var payload tasks.Payload
		switch now := (enqueued{time.Now().UnixNano()}); s.Job {
		case emptyJob:
			payload = empty{now}
		case insertJob:
			payload = inserting{now}
		case onceJob:
			payload = insertingOnce{now}
		}
		_, err := client.Enqueue(ctx, payload, nil)
		return err
	})
}

func workCarpool(ctx context.Context, s spec, rec *recorder) error {
	pool := dbpool.DefaultConfig(s.WorkerDatabaseURL)
	pool.MaxOverflow = s.PoolSize - pool.Size
	return worker.Run(ctx, worker.Config{
		RedisURL: s.WorkerRedisURL, Pool: pool, Groups: []tasks.Group{parcels{rec}}, Queues: s.Queues,
		Concurrency: s.Slots, Logger: slog.New(slog.DiscardHandler),
	})
}
