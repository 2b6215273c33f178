package worker_test

import (
	"context"
	"encoding/json"
	"io"
	"log/slog"
	"math/rand/v2"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/hibiken/asynq"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/carpool-go/carpool/tasks"
	"github.com/carpool-go/carpool/worker/cli"
)

// chaosEnv holds the mode of a worker process of the chaos test.
const chaosEnv = "CARPOOL_CHAOS_WORKER"

// The modes of the chaos test.
const (
	protected   = "protected"   // RegisterTx
	unprotected = "unprotected" // carpool, but the handler has a transaction of its own
	plain       = "plain"       // asynq and pgx, no carpool
)

// chaosEffect is a job whose effect is a row in the table effects.
type chaosEffect struct {
	N int `json:"n"`
}

func (chaosEffect) Kind() string { return "chaos:effect" }
func (chaosEffect) Options() tasks.Options {
	return tasks.Options{MaxRetry: 20, Timeout: time.Minute}
}
func (chaosEffect) Validate() error { return nil }

// happen takes a little while, and now and then a longer one, so that faults hit
// it in the middle.
func (e chaosEffect) happen(ctx context.Context, tx pgx.Tx, id string) error {
	pause := rand.N(20 * time.Millisecond)
	if rand.N(100) == 0 {
		pause = rand.N(2 * time.Second)
	}
	if _, err := tx.Exec(ctx, "INSERT INTO effects (job_id, n) VALUES ($1, $2)", id, e.N); err != nil {
		return err
	}
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(pause):
		return nil
	}
}

// chaosWorker is what the test binary does when the chaos test starts it as a
// worker. It ends when its standard input does, which is when the test has died.
func chaosWorker() int {
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin)
		os.Exit(1)
	}()
	mode := os.Getenv(chaosEnv)
	if mode == plain {
		return plainWorker()
	}
	cli.Program{Name: "worker", Groups: []tasks.Group{chaosTasks{mode == protected}, chainTasks{}}}.Main()
	return 0
}

// chaosTasks is the group of the chaos test's kind.
type chaosTasks struct{ protected bool }

func (c chaosTasks) Register(s *tasks.Set) {
	if c.protected {
		tasks.RegisterTx(s, func(ctx context.Context, job *tasks.Job, tx pgx.Tx, e chaosEffect) (any, error) {
			return nil, e.happen(ctx, tx, job.ID)
		})
		return
	}
	tasks.Register(s, func(ctx context.Context, job *tasks.Job, e chaosEffect) (any, error) {
		return nil, pgx.BeginFunc(ctx, job.DB, func(tx pgx.Tx) error { return e.happen(ctx, tx, job.ID) })
	})
}

// plainWorker is a worker made of asynq and pgx as their documentation has it.
func plainWorker() int {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	log := slog.New(slog.NewJSONHandler(os.Stderr, nil))
	db, err := pgxpool.New(ctx, os.Getenv("DATABASE_URL"))
	if err != nil {
		log.Error("pgxpool", "error", err)
		return 1
	}
	defer db.Close()
	rdb, err := tasks.OpenRedis(os.Getenv("REDIS_URL"))
	if err != nil {
		log.Error("redis", "error", err)
		return 1
	}
	defer rdb.Close()
	server := asynq.NewServerFromRedisClient(rdb, asynq.Config{Concurrency: 10})
	err = server.Start(asynq.HandlerFunc(func(ctx context.Context, t *asynq.Task) error {
		id, _ := asynq.GetTaskID(ctx)
		retried, _ := asynq.GetRetryCount(ctx)
		var e chaosEffect
		if err := json.Unmarshal(t.Payload(), &e); err != nil {
			return err
		}
		err := pgx.BeginFunc(ctx, db, func(tx pgx.Tx) error { return e.happen(ctx, tx, id) })
		outcome := "done"
		if err != nil {
			outcome = "retry"
		}
		log.Info("job", slog.Group("job", "id", id, "kind", t.Type(), "attempt", retried+1, "outcome", outcome), "error", err)
		return err
	}))
	if err != nil {
		log.Error("asynq", "error", err)
		return 1
	}
	<-ctx.Done()
	server.Shutdown()
	return 0
}
