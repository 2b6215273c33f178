// Package tasks is what a job is: its payload, its kind, its options and its
// handler; and how jobs are enqueued.
//
// Services that only enqueue import this package and use [Client]. A task is a
// [Payload] and a [Handler] in a package of their own, which a [Group] registers;
// the ready-made ones are in the packages below this one.
package tasks

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/carpool-go/carpool/dbpool"
)

// Payload is what a job carries. It travels as JSON, so that any language can
// write it; its fields may have `doc` and `example` tags, which `worker kinds`
// prints.
type Payload interface {
	// Kind is the job's stable name, such as "csv:import".
	Kind() string
	// Options are the kind's defaults; an enqueuer may override them.
	Options() Options
	// Validate reports what is wrong with the payload, beginning with the
	// JSON name of the field. Its text is logged and kept with the job, so it
	// must not repeat the payload's content.
	Validate() error
}

// Handler does the work of one kind of job. The payload is decoded and valid,
// ctx ends at the job's deadline, and what it returns is kept as the job's
// result, as JSON, for [Options.Retention].
//
// A returned error means another try, unless it is wrapped by [Permanent].
type Handler[P Payload, R any] func(ctx context.Context, job *Job, payload P) (R, error)

const (
	// DefaultQueue is the queue of a kind that names none.
	DefaultQueue = "default"
	// DefaultMaxRetry is how often a kind that doesn't say is tried again.
	DefaultMaxRetry = 10
	// DefaultTimeout bounds one attempt of a kind that doesn't say.
	DefaultTimeout = 10 * time.Minute
	// TimeoutGrace is added to the timeout that asynq is told, so that a handler
	// whose time is up can say so before asynq gives up waiting for it.
	TimeoutGrace = 2 * time.Second
	// maxMaxRetry is more than any job lives to see, and fits asynq's number.
	maxMaxRetry = 1_000_000_000
	// NoRetry as MaxRetry means that the first failure is the last.
	NoRetry = -1
)

// Options say how a kind of job is delivered. The zero value is a job on the
// default queue with [DefaultMaxRetry] and [DefaultTimeout] that leaves no
// result behind.
type Options struct {
	// Queue is the queue's name; "" means [DefaultQueue].
	Queue string
	// MaxRetry is how many times a failed job is tried again before it is
	// archived; 0 means [DefaultMaxRetry], [NoRetry] none.
	MaxRetry int
	// Timeout bounds one attempt, in whole seconds; 0 means [DefaultTimeout].
	Timeout time.Duration
	// Retention is how long a finished job stays in sight with its result, in
	// whole seconds; 0 means not at all.
	Retention time.Duration
	// Isolation is that of the transaction of [RegisterTx] and [RegisterOnce]; ""
	// means the database's default. A transaction that Postgres could not
	// serialize is run again.
	Isolation pgx.TxIsoLevel
}

func (o Options) withDefaults() Options {
	if o.Queue == "" {
		o.Queue = DefaultQueue
	}
	switch {
	case o.MaxRetry == 0:
		o.MaxRetry = DefaultMaxRetry
	case o.MaxRetry < 0:
		o.MaxRetry = 0
	}
	o.MaxRetry = min(o.MaxRetry, maxMaxRetry)
	if o.Timeout == 0 {
		o.Timeout = DefaultTimeout
	}
	return o
}

// Job is what a handler is told about the job it runs, and what it is lent.
type Job struct {
	ID    string
	Kind  string
	Queue string
	// Attempt counts from 1.
	Attempt int
	// MaxRetry is how many further attempts a failing job is given.
	MaxRetry int
	// DB is the shared pool. Connections taken from it with the handler's
	// context are charged to this job.
	DB *dbpool.Pool
	// Client enqueues further jobs.
	Client *Client
	// Log carries the job's id and kind. What is logged must not hold the
	// payload's content.
	Log *slog.Logger
	// WriteResult stores bytes as the job's result so far; nil discards them.
	// Handlers call [Job.Progress] instead.
	WriteResult func([]byte) error

	isolation pgx.TxIsoLevel
	recorded  bool // in carpool.jobs_done
	givesWay  bool // to another run of the same job

	mu       sync.Mutex
	reported time.Time
}

// progressEvery bounds how often a job's progress is written to Redis.
const progressEvery = time.Second

// Progress shows v, as JSON {"progress": v}, where the job's result will be:
// in asynqmon and in `worker enqueue --wait`. At most one call a second is
// written, the others cost nothing, so it may be called as often as one likes.
func (j *Job) Progress(ctx context.Context, v any) error {
	if j.WriteResult == nil {
		return nil
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	if time.Since(j.reported) < progressEvery {
		return nil
	}
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("tasks: progress: %w", context.Cause(ctx))
	}
	data, err := json.Marshal(map[string]any{"progress": v})
	if err != nil {
		return fmt.Errorf("tasks: progress: %w", err)
	}
	if err := j.WriteResult(data); err != nil {
		return fmt.Errorf("tasks: progress: %w", err)
	}
	j.reported = time.Now()
	return nil
}
