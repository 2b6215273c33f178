package delivery

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
	"unicode/utf8"

	"github.com/hibiken/asynq"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/redis/go-redis/v9"

	"github.com/carpool-go/carpool/dbpool"
	"github.com/carpool-go/carpool/internal/asynqwire"
	"github.com/carpool-go/carpool/internal/once"
	"github.com/carpool-go/carpool/internal/reason"
	"github.com/carpool-go/carpool/internal/unique"
	"github.com/carpool-go/carpool/internal/wait"
	"github.com/carpool-go/carpool/tasks"
)

// Executor is what every job runs in. It is the asynq.Handler of all servers of
// this process: wait for the database, decode, validate, bound by the deadline,
// run, account, log.
type Executor struct {
	tasks     *tasks.Set
	rdb       redis.UniversalClient
	client    *tasks.Client
	locks     *unique.Locks
	inspector *asynq.Inspector
	db        *dbpool.Pool
	breaker   *Breaker
	acks      *ackHook
	log       *slog.Logger
	// ending is done, with errEnding as its cause, once jobs that still run
	// must stop because the worker does; end ends it.
	ending context.Context
	end    context.CancelCauseFunc

	runs runs
	// background are goroutines that finish what a job's end began.
	background sync.WaitGroup
}

// Start begins to hold the unique keys of the jobs that run. The jobs come from asynq's
// servers, which call the executor.
func (x *Executor) Start() error {
	x.background.Go(func() { x.holdUniqueKeys(x.ending) })
	return nil
}

// Stop ends the contexts of jobs that still run, and waits for what the end of jobs began.
func (x *Executor) Stop() {
	x.end(errEnding)
	x.background.Wait()
}

// Running is how many jobs run.
func (x *Executor) Running() int { return x.runs.len() }

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
	outcomeLost        = "lost"        // with its lease: it is another worker's by now
)

// ProcessTask runs one attempt of a job.
func (x *Executor) ProcessTask(asynqCtx context.Context, t *asynq.Task) error {
	started := time.Now()
	job := x.newJob(asynqCtx, t)
	run, err := x.runs.begin(asynqCtx, job.Queue+" "+job.ID)
	if err != nil {
		return postponed(fmt.Errorf("an earlier run of this job has not ended: %w", err))
	}
	defer x.runs.end(run)
	run.unique.begin(job.Queue, job.ID, t.Headers())

	ctx, release := x.withDeadline(asynqCtx, started)
	defer release()
	ctx, borrower := x.db.Track(ctx, job.Kind+" "+job.ID)
	defer borrower.End() // also when a handler ends its goroutine
	var result []byte
	pprof.Do(ctx, pprof.Labels(jobLabel, job.ID), func(ctx context.Context) {
		result, err = x.attempt(ctx, job, t.Payload(), borrower)
	})
	usage := borrower.End()
	err = sanitizeError(explain(ctx, err))
	if why := run.givenUp(asynqCtx); why != nil && !errors.Is(err, why) && !(why == errCancelled && err == nil) {
		err = why // asynq doesn't hear the handler any more
	}
	run.done, run.result = err == nil, result

	outcome := x.outcome(ctx, job, err)
	if outcome == outcomeDone && result != nil && asynqCtx.Err() == nil {
		if err := x.keepResult(asynqCtx, job, result); err != nil {
			job.Log.Warn("the job is done, but its result could not be written", "error", err)
		}
	}
	var giveUpKey func() error
	if outcome == outcomeDone || outcome == outcomeArchived || outcome == outcomeCancelled {
		giveUpKey = func() error { return x.locks.Release(context.WithoutCancel(asynqCtx), job.ID, t.Headers()) }
	}
	if err := run.unique.end(giveUpKey); err != nil {
		job.Log.Warn("the job has ended, but its unique key could not be given up", "error", err)
	}
	x.record(job, outcome, time.Since(started), usage, err)
	switch outcome {
	case outcomeArchived:
		return tasks.Permanent(err) // asynq has been told of more retries
	case outcomeInterrupted:
		// An error would use up a retry. asynq pushes the job back to its queue
		// when the time for the shutdown is up, and then ends this context.
		<-asynqCtx.Done()
	}
	return err
}

// keepResult writes a result, again and again while Redis is away, as the
// acknowledgement is that follows it.
func (x *Executor) keepResult(asynqCtx context.Context, job *tasks.Job, result []byte) error {
	ctx, cancel := asynqCtx, context.CancelFunc(func() {})
	if deadline, ok := asynqCtx.Deadline(); ok { // at which asynq would take it for a failure
		ctx, cancel = context.WithDeadline(asynqCtx, deadline.Add(-asynqwire.TimeoutGrace/4))
	}
	defer cancel()
	for {
		err := asynqwire.WriteResult(ctx, x.rdb, job.Queue, job.ID, result)
		if !mayBeTriedAgain(err) {
			return err
		}
		if wait.For(ctx, ackPauseCap/2+rand.N(ackPauseCap)) != nil {
			return err
		}
	}
}

// HandleError is called by asynq with each failure before it acts on it. If it
// has given up a handler that still runs, because that ignores the end of its
// context, the job's slot is kept here, and with it the job's lease, until the
// handler has ended: asynq alone frees the slot and runs the job beside itself.
// (Upstream, processor.exec would wait for resCh after ctx.Done.)
//
// What is postponed or snoozed and has no retry left by asynq's count, it is about to
// archive.
func (x *Executor) HandleError(ctx context.Context, t *asynq.Task, err error) {
	id, _ := asynq.GetTaskID(ctx)
	queue, _ := asynq.GetQueueName(ctx)
	run := x.runs.giveUp(queue+" "+id, err)
	if run != nil {
		awaitEnd(run.ended, id, x.log.With(slog.Group("job", "id", id, "kind", t.Type())))
	}
	if err == context.Canceled { //nolint:errorlint // asynq's own
		x.background.Go(func() { x.finishCancelled(queue, id, run) })
		return
	}
	retried, _ := asynq.GetRetryCount(ctx)
	maxRetry, _ := asynq.GetMaxRetry(ctx)
	var until time.Time
	if retried >= maxRetry && !isFailure(err) && !errors.Is(err, asynq.SkipRetry) {
		until = time.Now().Add(retryDelay(retried, err, t))
	}
	x.acks.postpone(queue, id, until)
}

// newJob describes the attempt.
func (x *Executor) newJob(ctx context.Context, t *asynq.Task) *tasks.Job {
	id, _ := asynq.GetTaskID(ctx)
	queue, _ := asynq.GetQueueName(ctx)
	retried, _ := asynq.GetRetryCount(ctx)
	maxRetry, ok := asynqwire.MaxRetry(t.Headers())
	if !ok { // it was enqueued by others
		maxRetry, _ = asynq.GetMaxRetry(ctx)
	}
	return &tasks.Job{
		ID: id, Kind: t.Type(), Queue: queue,
		Attempt: retried + 1, MaxRetry: maxRetry,
		DB: x.db, Client: x.client,
		Log:         x.log.With(slog.Group("job", "id", id, "kind", t.Type())),
		WriteResult: func(data []byte) error { return asynqwire.WriteResult(ctx, x.rdb, queue, id, data) },
	}
}

// withDeadline returns the context of the handler. It ends a little before asynq's
// own deadline, so that the job's end is the executor's to record, or when the
// worker stops.
func (x *Executor) withDeadline(asynqCtx context.Context, started time.Time) (context.Context, func()) {
	ctx, cancel := context.WithCancelCause(asynqCtx)
	stop := context.AfterFunc(x.ending, func() { cancel(errEnding) })
	release := func() { stop(); cancel(nil) }
	deadline, ok := asynqCtx.Deadline()
	if !ok {
		return ctx, release
	}
	timeout := deadline.Sub(started)
	timeout -= min(asynqwire.TimeoutGrace, timeout/2)
	ctx, cancelTimeout := context.WithTimeoutCause(ctx, timeout, fmt.Errorf("%w of %s", errTimeout, timeout.Round(time.Second)))
	return ctx, func() { cancelTimeout(); release() }
}

const (
	// maxConflicts is how often a job is run again at once because Postgres has
	// sacrificed its transaction to another.
	maxConflicts = 5
	// blockedDelay is how long a job waits, more or less, that can't begin before somebody
	// has changed something.
	blockedDelay = 2 * time.Minute
	// maxOutages is how often in a row the database may go away while the same
	// job runs before that counts as the job's failure: it may be its doing.
	maxOutages = 5
)

// attempt is attemptWith with the reason, if the job has used up its tries, why none
// of them had an end: its worker died each time, or it ran into its timeout and did
// not say so. The reason outlasts a postponement.
func (x *Executor) attempt(ctx context.Context, job *tasks.Job, data []byte, borrower *dbpool.Borrower) ([]byte, error) {
	if err := once.CheckID(job.ID, job.Kind); err != nil {
		return nil, tasks.Permanent(err) // of a producer that is none of carpool's
	}
	unended := ""
	if job.Attempt > job.MaxRetry+1 {
		var err error
		if unended, err = x.crashReason(ctx, job); err != nil {
			return nil, err
		}
	}
	result, err := x.attemptWith(ctx, job, unended, data, borrower)
	if e, ok := errors.AsType[*postponedError](err); ok && unended != "" {
		err = &postponedError{reason.NotLookedUp(reason.Unended(unended), e.err), e.delay}
	}
	return result, err
}

// attemptWith runs the handler until what comes of it is the job's own. With a reason
// it doesn't: the job is given up, unless its last worker died after the commit.
func (x *Executor) attemptWith(ctx context.Context, job *tasks.Job, unended string, data []byte, borrower *dbpool.Borrower) ([]byte, error) {
	task, err := x.tasks.Lookup(job.Kind)
	if err != nil {
		return nil, x.unknown(ctx, job, err)
	}
	if unended != "" {
		job.Attempt-- // this is none
		return x.doneOr(ctx, job, task, tasks.Permanent(reason.GaveUp(unended, job.Attempt)))
	}
	payload, err := task.Decode(data)
	if err != nil {
		return x.doneOr(ctx, job, task, err) // by an older worker, which took it
	}
	if task.Once {
		if err := x.breaker.wait(ctx); err != nil {
			return nil, postponed(fmt.Errorf("the database is away: %w", err))
		}
	}
	began := time.Now()
	for conflicts := 0; ; {
		died := borrower.End().Died
		result, err := x.run(ctx, job, task, payload)
		if err == nil {
			x.breaker.clearOutages(job.ID)
			if task.Once {
				x.breaker.unblock()
			}
			return result, nil
		}
		if isConflict(err) && conflicts < maxConflicts && ctx.Err() == nil {
			conflicts++
			time.Sleep(rand.N(10 * time.Millisecond << conflicts))
			continue
		}
		usage := borrower.End()
		outage := x.isOutage(ctx, err, usage.Died > died, usage.Acquires > 0)
		switch {
		case outage:
		case errors.Is(err, once.ErrNotBegun):
			return nil, x.notBegun(err)
		case isExhausted(err):
			return nil, x.exhausted(job, err)
		default:
			x.breaker.clearOutages(job.ID)
			return nil, err
		}
		if ctx.Err() != nil && errors.Is(err, once.ErrNoAnswer) {
			return nil, postponed(err) // it may be the job's end that broke it off
		}
		if busy := x.noteOutage(err); busy {
			return nil, postponed(err)
		}
		if errors.Is(err, once.ErrNotBegun) {
			time.Sleep(rand.N(probeEvery)) // nothing of the job has run: it is not to blame, and may go on for long
		} else if x.breaker.countOutage(job.ID) > maxOutages {
			x.breaker.clearOutages(job.ID)
			return nil, fmt.Errorf("the database went away %d times in a row while this job ran: %w", maxOutages+1, err)
		}
		if x.breaker.wait(ctx) != nil {
			return nil, postponed(err)
		}
		if deadline, ok := ctx.Deadline(); ok && time.Since(began) > time.Until(deadline) {
			return nil, postponed(err) // a new delivery has its whole time again
		}
	}
}

// notBegun postpones a job of which nothing has run, because what kept it from beginning is
// not its doing. Where no waiting mends that it waits for minutes, and the log and the
// instance's snapshot say what does.
func (x *Executor) notBegun(err error) error {
	if errors.Is(err, once.ErrOtherRun) || !isForGood(err) {
		return postponed(err)
	}
	x.breaker.block(err)
	return postponedFor(blockedDelay, err)
}

// exhausted postpones a job that failed because the server has run out of something,
// longer each time, until that has happened too often in a row: then it may be the job's
// doing, and is its failure.
func (x *Executor) exhausted(job *tasks.Job, err error) error {
	n := x.breaker.countOutage(job.ID)
	if n > maxOutages {
		x.breaker.clearOutages(job.ID)
		return fmt.Errorf("the database ran out of something %d times in a row while this job ran: %w", n, err)
	}
	return postponedFor(time.Second<<n, err)
}

// noteOutage opens the breaker for an error that says that the database is away, unless
// it is only that others of this worker hold all connections.
func (x *Executor) noteOutage(outage error) (busy bool) {
	timeout, ok := errors.AsType[*dbpool.TimeoutError](outage)
	busy = ok && timeout.ConnectErr == nil
	if !busy {
		x.breaker.open(outage)
	}
	return busy
}

// unknownDelay is how long a job whose kind only others know is left to them, more
// or less.
const unknownDelay = 4 * time.Second

// unknown postpones a job whose kind a newer worker knows, as there is one during
// a deploy: each writes down its kinds when it starts, if nobody has within the hour.
// Else the job can't be run.
func (x *Executor) unknown(ctx context.Context, job *tasks.Job, err error) error {
	var known bool
	e := x.db.QueryRow(ctx, "SELECT EXISTS (SELECT FROM carpool.kinds WHERE kind = $1 AND seen_at > now() - interval '2 hours')",
		job.Kind).Scan(&known)
	if e != nil || known {
		return postponedFor(unknownDelay, fmt.Errorf("%w; another worker may", err))
	}
	return err
}

// crashReason returns why a job's tries had no end, from its last error; "" if somebody
// has put it back, and it is to be run.
func (x *Executor) crashReason(ctx context.Context, job *tasks.Job) (unended string, err error) {
	for {
		msg, err := asynqwire.ReadMessage(ctx, x.rdb, job.Queue, job.ID)
		switch {
		case err == nil:
			return reason.OfUnended(msg.LastErr), nil
		case errors.Is(err, asynqwire.ErrNoSuchTask):
			return "", tasks.Permanent(errors.New("the job is not in Redis any more"))
		case errors.Is(err, asynqwire.ErrMessage):
			return "", tasks.Permanent(err)
		}
		if wait.For(ctx, ackPauseCap/4) != nil {
			return "", postponed(reason.NotLookedUp(reason.Unended(reason.Crashed), err))
		}
	}
}

// doneOr returns verdict, which is why the job isn't run, or the result if it has
// been done before. If that can't be seen now the job is postponed.
func (x *Executor) doneOr(ctx context.Context, job *tasks.Job, task *tasks.Task, verdict error) ([]byte, error) {
	if !task.Once {
		return nil, verdict
	}
	if err := x.breaker.wait(ctx); err != nil {
		return nil, postponed(fmt.Errorf("the database is away: %w", err))
	}
	result, done, err := (&once.Job{DB: job.DB, ID: job.ID, Kind: job.Kind, Queue: job.Queue, Log: job.Log}).Done(ctx)
	switch {
	case done:
		return result, nil
	case err == nil:
		return nil, verdict
	case isForGood(err):
		return nil, reason.NotLookedUp(verdict, err)
	case ctx.Err() == nil && !isRefusal(err) && !errors.Is(err, once.ErrOtherRun):
		x.noteOutage(err)
	}
	return nil, postponed(err)
}

// isOutage reports whether the job failed because the database was away. died:
// one of its connections broke. used: it had one.
func (x *Executor) isOutage(ctx context.Context, err error, died, used bool) bool {
	if _, snoozed := tasks.SnoozeDelay(err); snoozed {
		return false
	}
	if died || dbpool.IsAway(err) || errors.Is(err, once.ErrNoAnswer) {
		return true
	}
	// After a failover a server may take no writes; so may a transaction that the
	// handler has made so.
	e, ok := errors.AsType[*pgconn.PgError](err)
	readOnly := ok && e.Code == "25006" // read_only_sql_transaction
	// A statement that waits for a server that is silent ends with the job's time.
	// asynq's is over soon too.
	silent := used && errors.Is(context.Cause(ctx), errTimeout)
	if !readOnly && !silent {
		return false
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), asynqwire.TimeoutGrace/2)
	defer cancel()
	return x.breaker.answers(ctx) != nil
}

// run calls the handler, in a goroutine of its own: a handler that ends its
// goroutine would else end asynq's, which then waits for the job's whole time.
func (x *Executor) run(ctx context.Context, job *tasks.Job, task *tasks.Task, payload tasks.Payload) (result []byte, err error) {
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
			switch err.Error() { // that of a nil pointer may panic, and it is the handler's
			case context.Canceled.Error(), context.DeadlineExceeded.Error():
				if ctx.Err() == nil {
					err = fmt.Errorf("the handler: %w", err) // by itself it is asynq's word
				}
			}
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

// sanitizeError returns an error whose text asynq can send: one that is not UTF-8 it
// can't, and the job would have no end. asynq.RevokeTask, for which it takes a job for
// done, is a failure here.
func sanitizeError(err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, asynq.RevokeTask):
		return errors.New("the handler has returned asynq.RevokeTask, which is not for jobs of carpool: return nil or tasks.Permanent")
	case !utf8.ValidString(err.Error()):
		return &validError{err}
	}
	return err
}

// validError is an error whose text is made UTF-8.
type validError struct{ error }

func (e *validError) Error() string { return strings.ToValidUTF8(e.error.Error(), "?") }
func (e *validError) Unwrap() error { return e.error }

// outcome decides what becomes of the job, the way asynq will for the same
// error.
func (x *Executor) outcome(ctx context.Context, job *tasks.Job, err error) string {
	switch {
	case err == nil:
		return outcomeDone
	case errors.Is(context.Cause(ctx), errEnding):
		return outcomeInterrupted // whatever the error is: it may come from the interruption
	case errors.Is(err, asynq.ErrLeaseExpired):
		return outcomeLost
	case errors.Is(err, errCancelled):
		return outcomeCancelled
	case errors.Is(err, asynq.SkipRetry):
		return outcomeArchived
	case !isFailure(err):
		if _, ok := tasks.SnoozeDelay(err); ok {
			return outcomeSnoozed
		}
		return outcomePostponed
	case job.Attempt > job.MaxRetry:
		return outcomeArchived
	default:
		return outcomeRetry
	}
}

// record logs what the job did, what it did to the pool, and how the pool
// stands. Log searches rely on these keys.
func (x *Executor) record(job *tasks.Job, outcome string, took time.Duration, usage dbpool.Usage, err error) {
	level := slog.LevelDebug
	switch outcome {
	case outcomeRetry, outcomeLost:
		level = slog.LevelWarn
	case outcomeArchived:
		level = slog.LevelError
	case outcomeInterrupted, outcomeCancelled:
		level = slog.LevelInfo
	}
	ctx := context.Background()
	if !x.log.Enabled(ctx, level) {
		return
	}
	stats := x.db.Stats()
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
	x.log.LogAttrs(ctx, level, "job", attrs...)
}
