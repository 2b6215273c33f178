package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"runtime/debug"
	"sync/atomic"
	"time"

	"github.com/hibiken/asynq"

	"github.com/carpool-go/carpool/dbpool"
	"github.com/carpool-go/carpool/tasks"
)

// frame is what every job runs in. It is the asynq.Handler of all servers of
// this process: decode, validate, bound by the deadline, run, account, log.
type frame struct {
	tasks  *tasks.Set
	client *tasks.Client
	db     *dbpool.Pool
	log    *slog.Logger
	// ending is done, with errEnding as its cause, once jobs that still run
	// must stop because the worker does.
	ending context.Context
	// running counts the jobs in the frame.
	running atomic.Int64
}

// errEnding is the cause of a context that ended because the worker stops.
var errEnding = errors.New("the worker is stopping")

// The outcomes of one attempt, as the record after each job has them.
const (
	outcomeDone        = "done"
	outcomeRetry       = "retry"
	outcomeArchived    = "archived"
	outcomeInterrupted = "interrupted"
)

// ProcessTask runs one attempt of a job.
func (f *frame) ProcessTask(asynqCtx context.Context, t *asynq.Task) error {
	f.running.Add(1)
	defer f.running.Add(-1)
	started := time.Now()
	job := f.newJob(asynqCtx, t)

	ctx, release := f.bound(asynqCtx, started)
	defer release()
	ctx, borrower := f.db.Track(ctx, job.Kind+" "+job.ID)
	result, err := f.run(ctx, job, t.Payload())
	err = explain(ctx, err)
	usage := borrower.End()

	outcome := f.outcome(ctx, job, err)
	if outcome == outcomeDone && result != nil {
		if err := job.WriteResult(result); err != nil {
			job.Log.Warn("the job is done, but its result could not be written", "error", err)
		}
	}
	if outcome == outcomeDone || outcome == outcomeArchived {
		if err := f.client.ReleaseUnique(context.WithoutCancel(asynqCtx), job.ID, t.Headers()); err != nil {
			job.Log.Warn("the job has ended, but its unique key could not be given up", "error", err)
		}
	}
	f.record(job, outcome, time.Since(started), usage, err)
	if outcome == outcomeInterrupted {
		// An error would use up a retry. asynq pushes the job back to its queue
		// when the time for the shutdown is up, and then ends this context.
		<-asynqCtx.Done()
	}
	return err
}

func (f *frame) newJob(ctx context.Context, t *asynq.Task) *tasks.Job {
	id, _ := asynq.GetTaskID(ctx)
	queue, _ := asynq.GetQueueName(ctx)
	retried, _ := asynq.GetRetryCount(ctx)
	maxRetry, _ := asynq.GetMaxRetry(ctx)
	return &tasks.Job{
		ID: id, Kind: t.Type(), Queue: queue,
		Attempt: retried + 1, MaxRetry: maxRetry,
		DB: f.db, Client: f.client,
		Log: f.log.With(slog.Group("job", "id", id, "kind", t.Type())),
		WriteResult: func(data []byte) error {
			_, err := t.ResultWriter().Write(data)
			return err
		},
	}
}

// bound returns the context of the handler. It ends a little before asynq's
// own deadline, so that the job's end is the frame's to record, or when the
// worker stops.
func (f *frame) bound(asynqCtx context.Context, started time.Time) (context.Context, func()) {
	ctx, cancel := context.WithCancelCause(asynqCtx)
	stop := context.AfterFunc(f.ending, func() { cancel(errEnding) })
	release := func() { stop(); cancel(nil) }
	deadline, ok := asynqCtx.Deadline()
	if !ok {
		return ctx, release
	}
	timeout := deadline.Sub(started)
	timeout -= min(tasks.TimeoutGrace, timeout/2)
	ctx, cancelTimeout := context.WithTimeoutCause(ctx, timeout, fmt.Errorf("it ran into its timeout of %s", timeout.Round(time.Second)))
	return ctx, func() { cancelTimeout(); release() }
}

func (f *frame) run(ctx context.Context, job *tasks.Job, data []byte) (result []byte, err error) {
	task, err := f.tasks.Lookup(job.Kind)
	if err != nil {
		return nil, err
	}
	payload, err := task.Decode(data)
	if err != nil {
		return nil, err
	}
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("panic: %v", p)
			job.Log.Error("the handler panicked", "panic", fmt.Sprint(p), "stack", string(debug.Stack()))
		}
	}()
	return task.Run(ctx, job, payload)
}

// explain puts the reason why the context ended before an error that is only
// its consequence.
func explain(ctx context.Context, err error) error {
	cause := context.Cause(ctx)
	if err == nil || cause == nil || errors.Is(err, cause) {
		return err
	}
	return fmt.Errorf("%w: %w", cause, err)
}

// outcome decides what becomes of the job, the way asynq will for the same
// error.
func (f *frame) outcome(ctx context.Context, job *tasks.Job, err error) string {
	switch {
	case err == nil:
		return outcomeDone
	case errors.Is(context.Cause(ctx), errEnding):
		return outcomeInterrupted // whatever the error is: it may come from the interruption
	case errors.Is(err, asynq.SkipRetry):
		return outcomeArchived
	case job.Attempt > job.MaxRetry:
		return outcomeArchived
	default:
		return outcomeRetry
	}
}

// record logs what the job did, what it did to the pool, and how the pool
// stands. Log searches rely on these keys.
func (f *frame) record(job *tasks.Job, outcome string, took time.Duration, usage dbpool.Usage, err error) {
	level := slog.LevelDebug
	switch outcome {
	case outcomeRetry:
		level = slog.LevelWarn
	case outcomeArchived:
		level = slog.LevelError
	case outcomeInterrupted:
		level = slog.LevelInfo
	}
	ctx := context.Background()
	if !f.log.Enabled(ctx, level) {
		return
	}
	stats := f.db.Stats()
	db := []any{
		"acquires", usage.Acquires, "wait_ms", usage.Wait.Milliseconds(),
		"held_ms", usage.Held.Milliseconds(), "queries", usage.Queries,
	}
	if usage.Leaked > 0 {
		db = append(db, "leaked", usage.Leaked)
	}
	attrs := []slog.Attr{
		slog.Group("job",
			"id", job.ID, "kind", job.Kind, "queue", job.Queue,
			"attempt", job.Attempt, "outcome", outcome, "took_ms", took.Milliseconds()),
		slog.Group("db", db...),
		slog.Group("pool",
			"pool_size", stats.PoolSize, "checked_in", stats.CheckedIn, "checked_out", stats.CheckedOut,
			"overflow", stats.Overflow, "invalid", stats.Invalid, "waiting", stats.Waiting),
	}
	if err != nil {
		attrs = append(attrs, slog.String("error", err.Error()))
	}
	f.log.LogAttrs(ctx, level, "job", attrs...)
}

const (
	// retryBase and retryCap bound the backoff. With tasks.DefaultMaxRetry a job
	// that goes on failing is given up after a quarter of an hour on average.
	retryBase = 2 * time.Second
	retryCap  = time.Hour
)

// retryDelay is exponential backoff with full jitter, which spreads the
// retries of many jobs that failed at once best; see "Exponential Backoff And
// Jitter" in the AWS Architecture Blog. A delay the handler asked for is kept.
func retryDelay(retried int, err error, _ *asynq.Task) time.Duration {
	if d, ok := tasks.RetryDelay(err); ok {
		return d
	}
	return rand.N(min(retryCap, retryBase<<min(retried, 20))) + 1
}
