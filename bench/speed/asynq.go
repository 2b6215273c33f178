package main

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"time"

	"github.com/hibiken/asynq"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
)

// prepareAsynq makes the table by which a careful team would know a job that was done.
func prepareAsynq(ctx context.Context, s spec) error {
	return execute(ctx, s.DatabaseURL, "CREATE TABLE done (job text PRIMARY KEY)")
}

func produceAsynq(ctx context.Context, s spec) error {
	opts, err := asynq.ParseRedisURI(s.RedisURL)
	if err != nil {
		return err
	}
	client := asynq.NewClient(opts)
	defer client.Close()
	return producing(ctx, s, func(ctx context.Context) error {
		now := strconv.FormatInt(time.Now().UnixNano(), 10)
		_, err := client.EnqueueContext(ctx, asynq.NewTask(s.Job, []byte(now)), asynq.Queue(queueOfJobs))
		return err
	})
}

// asynqLeft serves carpool too.
func asynqLeft(_ context.Context, s spec) (int, error) {
	opts, err := asynq.ParseRedisURI(s.RedisURL)
	if err != nil {
		return 0, err
	}
	inspector := asynq.NewInspector(opts)
	defer inspector.Close()
	q, err := inspector.GetQueueInfo(queueOfJobs)
	if err != nil {
		return 0, err
	}
	return q.Pending + q.Active + q.Scheduled + q.Retry + q.Archived, nil
}

func workAsynq(ctx context.Context, s spec, rec *recorder) error {
	pool, err := openPool(ctx, s.WorkerDatabaseURL, s.PoolSize)
	if err != nil {
		return err
	}
	defer pool.Close()
	opts, err := asynq.ParseRedisURI(s.WorkerRedisURL)
	if err != nil {
		return err
	}
	server := asynq.NewServer(opts, asynq.Config{Concurrency: s.Slots, Queues: s.Queues, LogLevel: asynq.FatalLevel})
	handle := func(ctx context.Context, t *asynq.Task) error {
		at, err := strconv.ParseInt(string(t.Payload()), 10, 64)
		if err != nil {
			return err
		}
		id, _ := asynq.GetTaskID(ctx)
		return rec.job(at, func() error {
			switch t.Type() {
			case emptyJob:
				return nil
			case insertJob:
				_, err := pool.Exec(ctx, insert, id)
				return err
			case onceJob:
				return insertOnce(ctx, pool, id)
			}
			return fmt.Errorf("%q is no kind of job", t.Type())
		})
	}
	if err := server.Start(asynq.HandlerFunc(handle)); err != nil {
		return err
	}
	close(rec.started)
	<-ctx.Done()
	server.Shutdown()
	return nil
}

// asynq-plain is asynq whose jobs insert at least once, beside those of others that do so
// exactly once.

func produceAsynqPlain(ctx context.Context, s spec) error { return produceAsynq(ctx, s.atLeastOnce()) }

func workAsynqPlain(ctx context.Context, s spec, rec *recorder) error {
	return workAsynq(ctx, s.atLeastOnce(), rec)
}

// insertOnce inserts unless the job has done so before, which asynq itself doesn't know.
func insertOnce(ctx context.Context, pool *pgxpool.Pool, id string) error {
	return pgx.BeginFunc(ctx, pool, func(tx pgx.Tx) error {
		first, err := tx.Exec(ctx, "INSERT INTO done VALUES ($1) ON CONFLICT DO NOTHING", id)
		if err != nil || first.RowsAffected() == 0 {
			return err
		}
		_, err = tx.Exec(ctx, insert, id)
		return err
	})
}

func openPool(ctx context.Context, url string, size int) (*pgxpool.Pool, error) {
	cfg, err := pgxpool.ParseConfig(url)
	if err != nil {
		return nil, errors.New("the database's URL is no URL")
	}
	cfg.MaxConns = int32(size)
	return pgxpool.NewWithConfig(ctx, cfg)
}
