package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"runtime/debug"
	"runtime/pprof"
	"strings"
	"sync"
	"time"

	"github.com/hibiken/asynq"
	"github.com/redis/go-redis/v9"

	"github.com/carpool-go/carpool/dbpool"
	"github.com/carpool-go/carpool/tasks"
)

// frame is what every job runs in. It is the asynq.Handler of all servers of
// this process: wait for the database, decode, validate, bound by the deadline,
// run, account, log.
type frame struct {
	tasks     *tasks.Set
	rdb       redis.UniversalClient
	client    *tasks.Client
	inspector *asynq.Inspector
	db        *dbpool.Pool
	gate      *gate
	acks      *ackHook
	log       *slog.Logger
	// ending is done, with errEnding as its cause, once jobs that still run
	// must stop because the worker does.
	ending context.Context

	// beat shows this instance's figures to the others; nil: it doesn't.
	beat func(context.Context)

	runs runs
	// behind are goroutines that finish what a job's end began.
	behind sync.WaitGroup
}

var (
	// errEnding is the cause of a context that ended because the worker stops.
	errEnding = errors.New("the worker is stopping")
	// errTimeout is wrapped by the cause of one that ended because the job's
	// time was up.
	errTimeout = errors.New("it ran into its timeout")
	errGoexit  = errors.New("the handler ended its goroutine, by runtime.Goexit or a test's FailNow, instead of returning")
)

// The outcomes of one attempt, as the record after each job has them.
const (
	outcomeDone        = "done"
	outcomeRetry       = "retry"
	outcomeArchived    = "archived"
	outcomeCancelled   = "cancelled"
	outcomePostponed   = "postponed"   // for the database's sake; no try is used up
	outcomeSnoozed     = "snoozed"     // as the handler wanted; no try is used up
	outcomeInterrupted = "interrupted" // by the worker's end; no try is used up
)

// ProcessTask runs one attempt of a job.
func (f *frame) ProcessTask(asynqCtx context.Context, t *asynq.Task) error {
	started := time.Now()
	job, last := f.newJob(asynqCtx, t)
	run, err := f.runs.begin(asynqCtx, job.Queue+" "+job.ID)
	if err != nil {
		return postponed(fmt.Errorf("an earlier run of this job has not ended: %w", err))
	}
	defer f.runs.end(run)
	f.acks.postpone(job.Queue, job.ID, time.Time{})

	ctx, release := f.bound(asynqCtx, started)
	defer release()
	ctx, borrower := f.db.Track(ctx, job.Kind+" "+job.ID)
	defer borrower.End() // also when a handler ends its goroutine
	var result []byte
	pprof.Do(ctx, pprof.Labels(jobLabel, job.ID), func(ctx context.Context) {
		result, err = f.attempt(ctx, job, t.Payload(), borrower)
	})
	usage := borrower.End()
	err = explain(ctx, err)
	if why := run.givenUp(asynqCtx); why != nil && !errors.Is(err, why) && !(why == errCancelled && err == nil) {
		err = why // asynq doesn't hear the handler any more
	}
	run.done, run.result = err == nil, result

	outcome := f.outcome(ctx, job, err)
	if outcome == outcomeDone && result != nil && asynqCtx.Err() == nil { // else asynq doesn't write it
		if err := job.WriteResult(result); err != nil {
			job.Log.Warn("the job is done, but its result could not be written", "error", err)
		}
	}
	if outcome == outcomeDone || outcome == outcomeArchived || outcome == outcomeCancelled {
		if err := f.client.ReleaseUnique(context.WithoutCancel(asynqCtx), job.ID, t.Headers()); err != nil {
			job.Log.Warn("the job has ended, but its unique key could not be given up", "error", err)
		}
	}
	f.record(job, outcome, time.Since(started), usage, err)
	if f.beat != nil && job.Kind == (tasks.PoolValidate{}).Kind() {
		f.beat(asynqCtx)
	}
	switch outcome {
	case outcomeArchived:
		return tasks.Permanent(err) // asynq has been told of more retries
	case outcomePostponed, outcomeSnoozed:
		if last {
			f.acks.postpone(job.Queue, job.ID, time.Now().Add(retryDelay(0, err, t)))
		}
	case outcomeInterrupted:
		// An error would use up a retry. asynq pushes the job back to its queue
		// when the time for the shutdown is up, and then ends this context.
		<-asynqCtx.Done()
	}
	return err
}

// HandleError is called by asynq with each failure before it acts on it. If it
// has given up a handler that still runs, because that ignores the end of its
// context, the job's hand is kept here, and with it the job's lease, until the
// handler has ended: asynq alone frees the hand and runs the job beside itself.
// (Upstream, processor.exec would wait for resCh after ctx.Done.)
func (f *frame) HandleError(ctx context.Context, _ *asynq.Task, err error) {
	id, _ := asynq.GetTaskID(ctx)
	queue, _ := asynq.GetQueueName(ctx)
	run := f.runs.giveUp(queue+" "+id, err)
	if run != nil {
		awaitEnd(run.ended, id, f.log.With(slog.Group("job", "id", id)))
	}
	if err == context.Canceled { //nolint:errorlint // asynq's own
		f.behind.Go(func() { f.putAway(queue, id, run) })
	}
}

// newJob describes the attempt. last tells that asynq has no retry left for the job.
func (f *frame) newJob(ctx context.Context, t *asynq.Task) (job *tasks.Job, last bool) {
	id, _ := asynq.GetTaskID(ctx)
	queue, _ := asynq.GetQueueName(ctx)
	retried, _ := asynq.GetRetryCount(ctx)
	asynqMax, _ := asynq.GetMaxRetry(ctx)
	maxRetry, counted := tasks.MaxRetry(t.Headers())
	if !counted {
		maxRetry = asynqMax
	}
	return &tasks.Job{
		ID: id, Kind: t.Type(), Queue: queue,
		Attempt: retried + 1, MaxRetry: maxRetry,
		DB: f.db, Client: f.client,
		Log: f.log.With(slog.Group("job", "id", id, "kind", t.Type())),
		WriteResult: func(data []byte) error {
			_, err := t.ResultWriter().Write(data)
			return err
		},
	}, retried >= asynqMax
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
	ctx, cancelTimeout := context.WithTimeoutCause(ctx, timeout, fmt.Errorf("%w of %s", errTimeout, timeout.Round(time.Second)))
	return ctx, func() { cancelTimeout(); release() }
}

const (
	// maxConflicts is how often a job is run again at once because Postgres has
	// sacrificed its transaction to another.
	maxConflicts = 5
	// maxOutages is how often in a row the database may go away while the same
	// job runs before that counts as the job's failure: it may be its doing.
	maxOutages = 5
)

// attempt runs the handler until what comes of it is the job's own.
func (f *frame) attempt(ctx context.Context, job *tasks.Job, data []byte, borrower *dbpool.Borrower) ([]byte, error) {
	task, err := f.tasks.Lookup(job.Kind)
	if err != nil {
		return nil, f.unknown(ctx, job, err)
	}
	payload, err := task.Decode(data)
	if err != nil {
		return nil, err
	}
	if job.Attempt > job.MaxRetry+1 {
		result, ended, err := f.decideSpent(ctx, job, task)
		if ended || err != nil {
			return result, err
		}
	}
	if task.Once {
		if err := f.gate.wait(ctx); err != nil {
			return nil, postponed(fmt.Errorf("the database is away: %w", err))
		}
	}
	began := time.Now()
	for conflicts := 0; ; {
		died := borrower.End().Died
		result, err := f.run(ctx, job, task, payload)
		if err == nil {
			f.gate.forgive(job.ID)
			return result, nil
		}
		if isConflict(err) && conflicts < maxConflicts && ctx.Err() == nil {
			conflicts++
			time.Sleep(rand.N(10 * time.Millisecond << conflicts))
			continue
		}
		usage := borrower.End()
		if !f.isOutage(ctx, err, usage.Died > died, usage.Acquires > 0) {
			f.gate.forgive(job.ID)
			if errors.Is(err, tasks.ErrOtherRun) {
				err = postponed(err)
			}
			return nil, err
		}
		if busy := f.note(err); busy {
			return nil, postponed(err)
		}
		if f.gate.blame(job.ID) > maxOutages {
			f.gate.forgive(job.ID)
			return nil, fmt.Errorf("the database went away %d times in a row while this job ran: %w", maxOutages+1, err)
		}
		if f.gate.wait(ctx) != nil {
			return nil, postponed(err)
		}
		if deadline, ok := ctx.Deadline(); ok && time.Since(began) > time.Until(deadline) {
			return nil, postponed(err) // a new delivery has its whole time again
		}
	}
}

// note shuts the gate for an error that says that the database is away, unless it
// is only that others of this worker hold all connections.
func (f *frame) note(outage error) (busy bool) {
	timeout, ok := errors.AsType[*dbpool.TimeoutError](outage)
	busy = ok && timeout.ConnectErr == nil
	if !busy {
		f.gate.shut(outage)
	}
	return busy
}

// unknownDelay is how long a job whose kind only others know is left to them, more
// or less.
const unknownDelay = 4 * time.Second

// unknown postpones a job whose kind a newer worker knows, as there is one during
// a deploy: each writes down its kinds when it starts, if nobody has within the hour.
// Else the job can't be run.
func (f *frame) unknown(ctx context.Context, job *tasks.Job, err error) error {
	var known bool
	e := f.db.QueryRow(ctx, "SELECT EXISTS (SELECT FROM carpool.kinds WHERE kind = $1 AND seen_at > now() - interval '2 hours')",
		job.Kind).Scan(&known)
	if e != nil || known {
		return &postponedError{fmt.Errorf("%w; another worker may", err), unknownDelay/2 + rand.N(unknownDelay)}
	}
	return err
}

// decideSpent decides on a job that has used up its tries without having ended: its
// worker died each time, or it ran into its timeout and did not say so. It is given
// up, unless the last worker died after the commit. ended is false if the job is to
// be run all the same: somebody has put it back.
func (f *frame) decideSpent(ctx context.Context, job *tasks.Job, task *tasks.Task) (result []byte, ended bool, err error) {
	info, err := f.inspector.GetTaskInfo(job.Queue, job.ID)
	for ; err != nil; info, err = f.inspector.GetTaskInfo(job.Queue, job.ID) {
		select {
		case <-ctx.Done():
			return nil, false, postponed(fmt.Errorf("%s%s%w", crashed, notLookedUp, err))
		case <-time.After(rescueEvery / 10):
		}
	}
	reason, _, _ := strings.Cut(info.LastErr, notLookedUp)
	if !isUnended(reason) {
		return nil, false, nil
	}
	job.Attempt-- // this is none
	if !task.Once {
		return nil, false, giveUp(reason, job.Attempt)
	}
	if err = f.gate.wait(ctx); err == nil {
		var done bool
		result, done, err = tasks.LookDone(ctx, job)
		if err == nil && done {
			return result, true, nil
		}
		if err == nil {
			return nil, false, giveUp(reason, job.Attempt)
		}
		if isRefusal(err) {
			return nil, false, fmt.Errorf("%w%s%w", giveUp(reason, job.Attempt), notLookedUp, err)
		}
		f.note(err)
	}
	return nil, false, postponed(fmt.Errorf("%s%s%w", reason, notLookedUp, err))
}

// notLookedUp stands between the reason why a job is given up, which must be found
// again by decideSpent, and why that could not be done.
const notLookedUp = "; whether it was done before could not be looked up: "

// isOutage reports whether the job failed because the database was away. died:
// one of its connections broke. used: it had one.
func (f *frame) isOutage(ctx context.Context, err error, died, used bool) bool {
	if _, snoozed := tasks.SnoozeDelay(err); snoozed {
		return false
	}
	if died || dbpool.IsAway(err) || errors.Is(err, tasks.ErrNoAnswer) {
		return true
	}
	if !used || !errors.Is(context.Cause(ctx), errTimeout) {
		return false
	}
	// A statement that waits for a server that is silent ends with the job's time.
	// asynq's is over soon too.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), tasks.TimeoutGrace/2)
	defer cancel()
	return f.gate.answers(ctx) != nil
}

// run calls the handler, in a goroutine of its own: a handler that ends its
// goroutine would else end asynq's, which then waits for the job's whole time.
func (f *frame) run(ctx context.Context, job *tasks.Job, task *tasks.Task, payload tasks.Payload) (result []byte, err error) {
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		returned := false
		defer func() {
			p := recover()
			switch {
			case p != nil:
				err = fmt.Errorf("panic: %v", p)
				job.Log.Error("the handler panicked", "panic", fmt.Sprint(p), "stack", string(debug.Stack()))
			case !returned:
				err = errGoexit
			}
		}()
		result, err = task.Run(ctx, job, payload)
		if err != nil {
			_ = err.Error() // that of a nil pointer may panic, and it is the handler's
		}
		returned = true
	}()
	<-ended
	return result, err
}

// explain puts the reason why the context ended before a failure that is only its
// consequence.
func explain(ctx context.Context, err error) error {
	cause := context.Cause(ctx)
	if err == nil || cause == nil || !isFailure(err) || errors.Is(err, cause) {
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
	case errors.Is(err, errCancelled):
		return outcomeCancelled
	case !isFailure(err):
		if _, ok := tasks.SnoozeDelay(err); ok {
			return outcomeSnoozed
		}
		return outcomePostponed
	case errors.Is(err, asynq.SkipRetry), job.Attempt > job.MaxRetry:
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
	case outcomeInterrupted, outcomeCancelled:
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
