// Package tasks says what a job is, and enqueues jobs. It is for services that enqueue,
// and for packages with tasks of their own.
//
// # To enqueue a job
//
// A service makes a [Client] with [NewClient] and calls [Client.Enqueue] with a payload:
// one of its own, or one of the ready-made kinds in the packages csvimport, webhook and
// rowsprune below this one. [Client.EnqueueTx] enqueues in a transaction of Postgres, so
// that the job is there if what it is about was committed. The package brings no net/http
// along.
//
// # To write a task
//
// A task is a [Payload] and its handler. It is registered by one of three functions, and
// what the handler does decides which one:
//
//   - [Register] is for a handler that may run twice for one job, as after a crash.
//   - [RegisterTx] is for one whose effects are all in Postgres: they happen in a
//     transaction that the handler is given, and exactly once.
//   - [RegisterOnce] is for one that works for long before it has its effects in Postgres:
//     they happen exactly once too, in the transaction of [Once].
//
// A [Group] registers the tasks that belong together, and has their settings. Package
// worker runs groups of tasks, with its command line in worker/cli; package taskstest
// below this one runs one handler in a test.
//
// The error of a handler decides what becomes of the job. [Permanent] sends it to the
// archive at once, [RetryAfter] sets the time until the next try, and [Snooze] comes back
// later without using up a try. After any other error the job is tried again, later and
// later, until [Options.MaxRetry] is used up and it is archived. A database that is away
// is nobody's failure: jobs wait for it.
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
	"github.com/carpool-go/carpool/internal/once"
)

// Payload is what a job carries: a struct. It travels as JSON, so that any language can
// write it; its fields may have `doc` and `example` tags, which the command kinds
// prints.
type Payload interface {
	// Kind returns the job's stable name, such as "csv:import". It and Options are
	// called on the zero value too, so they depend on no field.
	Kind() string
	// Options returns the kind's defaults; an enqueuer may override them.
	Options() Options
	// Validate returns what is wrong with the payload, beginning with the
	// JSON name of the field, nil if nothing is. It is called before the job is
	// enqueued, and before it runs. Its text is logged and kept with the job, so it
	// must not repeat the payload's content.
	Validate() error
}

// Handler does the work of one kind of job. The payload is decoded and valid, and ctx
// ends when [Options.Timeout] is over, when the job is cancelled, or when its worker has
// to stop. What it returns is kept as the job's result, as JSON, for [Options.Retention];
// a [json.RawMessage] is JSON already, and nil, if R is any, is no result. One that can't be
// JSON, or has more bytes than MAX_PAYLOAD allows, is the job's permanent failure.
//
// A returned error means another try, unless it came from [Permanent], [RetryAfter] or
// [Snooze]. Its text is logged and kept with the job, so it must not hold the payload's
// content. A worker takes a panic for an error.
type Handler[P Payload, R any] func(ctx context.Context, job *Job, payload P) (R, error)

const (
	// DefaultQueue is the queue of a kind that names none.
	DefaultQueue = "default"
	// DefaultMaxRetry is how often a failing job of a kind that names no number is
	// tried again.
	DefaultMaxRetry = 10
	// DefaultTimeout bounds one attempt of a kind that names no time.
	DefaultTimeout = 10 * time.Minute
	// maxMaxRetry is more than any job lives to see, and fits asynq's number.
	maxMaxRetry = 1_000_000_000
	// NoRetry as MaxRetry means that the first failure is the last; 0 would be the
	// default.
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
	// Retention is how long a job that is done stays in Redis with its result, in
	// whole seconds; 0 means that it is forgotten at once.
	Retention time.Duration
	// Isolation is that of the transaction of [RegisterTx] and [RegisterOnce]; ""
	// means the database's default. A transaction that Postgres could not
	// serialize is run again at once, up to five times, which uses up no try.
	Isolation pgx.TxIsoLevel
	// SQL says who may enqueue the kind by the function carpool.enqueue; "" is
	// [SQLProducers].
	SQL SQL
}

// SQL is who may enqueue a kind of job by the function carpool.enqueue.
type SQL string

const (
	// SQLProducers is every role that may execute the function.
	SQLProducers SQL = ""
	// SQLOperators is the role that has migrated and its members, members of the role
	// carpool_operator, and superusers. It is for kinds that are power in the hands of
	// whoever enqueues them, since they do what the worker's role may.
	SQLOperators SQL = "operators"
)

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

// Job is what a handler is told about the job it runs, and what it is lent. A worker makes
// it; a test has it from package taskstest.
type Job struct {
	// ID is the same at every attempt; Kind is the payload's; Queue is where the job was
	// fetched from.
	ID, Kind, Queue string
	// Attempt counts from 1.
	Attempt int
	// MaxRetry is how many attempts may follow the first one.
	MaxRetry int
	// Delivery counts from 1, attempts that had no end among them, as far as carpool's workers
	// had the job; 0 if it isn't known. It is for saving work, not for safety.
	Delivery int
	// DB is the shared pool. Connections taken from it with the handler's
	// context are charged to this job.
	DB *dbpool.Pool
	// Client enqueues further jobs: at once, or with the handler's transaction by
	// [Client.EnqueueTx].
	Client *Client
	// Log carries the job's id and kind. What is logged must not hold the
	// payload's content.
	Log *slog.Logger
	// WriteResult stores JSON in the place of the job's result; nil discards it. A worker
	// sets it for [Job.Progress], which handlers call.
	WriteResult func([]byte) error

	once *once.Job // of a transactional task
	// recorded is the result in the job's record, once it has one; nil for none.
	recorded json.RawMessage

	mu       sync.Mutex
	reported time.Time
}

// progressEvery bounds how often a job's progress is written to Redis.
const progressEvery = time.Second

// Progress shows v, as JSON {"progress": v}, where the job's result will be: in the
// monitor, in the command enqueue --wait, and to [Client.Wait]. It writes at most once a
// second, and the other calls cost nothing, so it may be called for every row. The error
// is Redis', the end of ctx, or that v can't be JSON or is too large for a result; most
// handlers pass over it, because the work itself goes on.
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
	if err == nil {
		err = j.checkSize(data)
	}
	if err != nil {
		return fmt.Errorf("tasks: progress: %w", err)
	}
	if err := j.WriteResult(data); err != nil {
		return fmt.Errorf("tasks: progress: %w", err)
	}
	j.reported = time.Now()
	return nil
}
