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
	"github.com/carpool-go/carpool/tasks"
)

// Executor is what every job runs in. It is the asynq.Handler of all servers of
// this process: wait for the database, decode, validate, bound by the deadline,
// run, account, log.
type Executor struct {
	tasks   *tasks.Set
	rdb     redis.UniversalClient
	client  *tasks.Client
	locks   *unique.Locks
	db      *dbpool.Pool
	breaker *Breaker
	held    *held
	ends    *ends
	log     *slog.Logger
	// retryDelay is the function of this name; a test has one without chance.
	retryDelay func(retried int, err error) time.Duration
	// ending is done, with errEnding as its cause, once jobs that still run
	// must stop because the worker does; end ends it.
	ending context.Context
	end    context.CancelCauseFunc

	hands hands
	runs  runs
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
	x.hands.close()
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

// ProcessTask runs one attempt of a job, and says what becomes of it. asynq is told nothing
// but that the slot is free.
func (x *Executor) ProcessTask(asynqCtx context.Context, t *asynq.Task) error {
	x.hands.do(func() { x.process(asynqCtx, t) })
	return nil
}

func (x *Executor) process(asynqCtx context.Context, t *asynq.Task) {
	started := time.Now()
	job := x.newJob(asynqCtx, t)
	h := x.held.begin(job.Queue, job.ID)
	if h == nil {
		return // its lease was lost in this moment
	}
	job.Delivery = h.deliveries
	ctx, release := x.jobContext(asynqCtx, h, started)
	defer release()
	a := &attempt{held: h, job: job, headers: t.Headers(), started: started}
	defer func() { // also if the payload's own code panics, or ends its goroutine
		if p := recover(); p != nil {
			a.err = fmt.Errorf("panic: %v", p)
			job.Log.Error("the job's kind panicked", "panic", fmt.Sprint(p), "stack", string(debug.Stack()))
		}
		x.finish(ctx, a)
		if a.run != nil {
			x.runs.end(a.run)
		}
	}()
	if a.run, a.err = x.runs.begin(ctx, job.Queue+" "+job.ID); a.err != nil {
		a.err = postponed(fmt.Errorf("an earlier run of this job has not ended: %w", a.err))
		return
	}
	if a.err = context.Cause(ctx); a.err != nil {
		return // it was cancelled before, or its lease is lost
	}
	a.err = errGoexit
	x.track(ctx, a, t.Payload())
}

// track runs an attempt and watches it: what it does to the pool, and that it ends when its
// context has.
func (x *Executor) track(ctx context.Context, a *attempt, payload []byte) {
	a.run.unique.begin(a.job.Queue, a.job.ID, a.headers)
	watched := context.AfterFunc(ctx, func() { awaitEnd(a.run.ended, a.job.ID, a.job.Log) })
	defer watched()
	ctx, borrower := x.db.Track(ctx, a.job.Kind+" "+a.job.ID)
	defer func() { a.usage = borrower.End() }()
	pprof.Do(ctx, pprof.Labels(jobLabel, a.job.ID), func(ctx context.Context) {
		a.result, a.err = x.attempt(ctx, a, payload, borrower)
	})
}

// attempt is one attempt of a job.
type attempt struct {
	held    *heldJob
	job     *tasks.Job
	headers map[string]string
	started time.Time
	run     *jobRun // nil if it has not begun

	// What has come of it:
	result []byte
	err    error
	usage  dbpool.Usage
}

// finish decides what becomes of a job after an attempt.
func (x *Executor) finish(ctx context.Context, a *attempt) {
	err := sanitizeError(explain(ctx, a.err))
	outcome := x.outcome(ctx, a.job, err)
	if a.run != nil {
		var giveUpKey func() error
		if outcome == outcomeDone || outcome == outcomeArchived || outcome == outcomeCancelled {
			giveUpKey = func() error { return x.locks.Release(context.WithoutCancel(ctx), a.job.ID, a.headers) }
		}
		if err := a.run.unique.end(giveUpKey); err != nil {
			a.job.Log.Warn("the job has ended, but its unique key could not be given up", "error", err)
		}
	}
	x.record(a.job, outcome, time.Since(a.started), a.usage, err)
	x.settle(a.held, outcome, a.result, err)
}

// settle has Redis told what becomes of a job.
func (x *Executor) settle(h *heldJob, outcome string, result []byte, err error) {
	msg, now := h.message, time.Now()
	if err != nil {
		msg.LastErr, msg.LastFailedAt = err.Error(), now.Unix()
	}
	switch outcome {
	case outcomeDone:
		x.ends.say(h, asynqwire.Done{Message: h.message, Result: result})
	case outcomeRetry:
		msg.Retried++
		x.ends.say(h, asynqwire.RetryAt{Message: msg, Due: now.Add(x.retryDelay(h.message.Retried, err)), Failed: true})
	case outcomePostponed, outcomeSnoozed:
		if e, ok := errors.AsType[*unknownError](err); ok {
			h.fetcher.leaveToOthers(e.kind)
			x.ends.say(h, asynqwire.PushBack{Last: true, Undelivered: true})
			return
		}
		x.ends.say(h, asynqwire.RetryAt{Message: msg, Due: now.Add(postponeTime(err)), Unended: h.unended})
	case outcomeArchived:
		x.ends.say(h, asynqwire.Archive{Message: &msg})
	case outcomeCancelled:
		msg.LastErr = reason.Cancelled
		x.ends.say(h, asynqwire.Archive{Message: &msg})
	case outcomeInterrupted:
		x.ends.say(h, asynqwire.PushBack{})
	case outcomeLost:
		x.ends.sayNothing(h)
	}
}

// HandleError is called by asynq when it doesn't wait for a handler any more that still
// runs, because that ignores the end of its context. The job's slot is kept here, until the
// handler has ended: asynq alone frees the slot and runs the job beside itself.
// (Upstream, processor.exec would wait for resCh after ctx.Done.)
//
// A job that has not begun, since its time was over when it was fetched, has failed.
func (x *Executor) HandleError(ctx context.Context, t *asynq.Task, err error) {
	job := x.newJob(ctx, t)
	if run := x.runs.get(job.Queue + " " + job.ID); run != nil {
		select {
		case <-run.ended:
		case <-x.ending.Done():
			select {
			case <-run.ended:
			case <-time.After(EndingGrace):
				if h := x.held.byKey(asynqwire.Task(job.Queue, job.ID)); h != nil {
					x.ends.say(h, asynqwire.PushBack{})
				}
			}
		}
		return
	}
	h := x.held.begin(job.Queue, job.ID)
	if h == nil {
		return
	}
	ended, end := context.WithCancelCause(context.WithoutCancel(ctx))
	defer end(nil)
	switch {
	case h.ctx.Err() != nil:
		end(context.Cause(h.ctx))
	case errors.Is(err, context.Canceled): // asynq has heard of it first
		end(errCancelled)
	case errors.Is(err, asynq.ErrLeaseExpired):
		end(errLeaseLost)
	}
	a := &attempt{held: h, job: job, headers: t.Headers(), started: time.Now(), err: fmt.Errorf("it was too late for the job to begin: %w", err)}
	x.finish(ended, a)
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
		Log:         slog.New(&jobLog{x.log.Handler(), id, t.Type()}),
		WriteResult: func(data []byte) error { return asynqwire.WriteResult(ctx, x.rdb, queue, id, data) },
	}
}

// jobContext returns the context of the handler. It ends a little before asynq's own
// deadline, when the job is cancelled or its lease is lost, or when the worker stops; its
// cause says which.
func (x *Executor) jobContext(asynqCtx context.Context, h *heldJob, started time.Time) (context.Context, func()) {
	ctx, cancel := context.WithCancelCause(context.WithoutCancel(asynqCtx))
	if why := context.Cause(h.ctx); why != nil {
		cancel(why)
	}
	ending := context.AfterFunc(x.ending, func() { cancel(errEnding) })
	lost := context.AfterFunc(h.ctx, func() { cancel(context.Cause(h.ctx)) })
	release := func() { ending(); lost(); cancel(nil) }
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
// of them had an end. The reason outlasts a postponement.
func (x *Executor) attempt(ctx context.Context, a *attempt, data []byte, borrower *dbpool.Borrower) ([]byte, error) {
	if err := once.CheckID(a.job.ID, a.job.Kind); err != nil {
		return nil, tasks.Permanent(err) // of a producer that is none of carpool's
	}
	unended := ""
	if a.job.Attempt > a.job.MaxRetry+1 {
		unended = a.held.unended
	}
	result, err := x.attemptWith(ctx, a.job, unended, data, borrower)
	if e, ok := errors.AsType[*postponedError](err); ok && unended != "" {
		err = &postponedError{reason.NotLookedUp(errors.New(unended), e.err), e.delay}
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

// unknownDelay is how long a job whose kind may be known elsewhere waits for the database,
// more or less.
const unknownDelay = 4 * time.Second

// unknownError is returned for a job that another worker can run, whose kinds are others.
type unknownError struct {
	kind string
	err  error
}

func (e *unknownError) Error() string { return e.err.Error() + "; it is left to another worker" }

// unknown leaves a job to others whose kind a newer worker knows, as there is one during a
// deploy: each writes down its kinds when it starts, if nobody has within the hour. Else the
// job can't be run.
func (x *Executor) unknown(ctx context.Context, job *tasks.Job, err error) error {
	var known bool
	e := x.db.QueryRow(ctx, "SELECT EXISTS (SELECT FROM carpool.kinds WHERE kind = $1 AND seen_at > now() - interval '2 hours')",
		job.Kind).Scan(&known)
	switch {
	case e != nil:
		return postponedFor(unknownDelay, fmt.Errorf("%w; another worker may", err))
	case known:
		return &unknownError{job.Kind, err}
	}
	return err
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

// run calls the handler.
func (x *Executor) run(ctx context.Context, job *tasks.Job, task *tasks.Task, payload tasks.Payload) (result []byte, err error) {
	defer func() {
		if p := recover(); p != nil {
			result, err = nil, fmt.Errorf("panic: %v", p)
			job.Log.Error("the handler panicked", "panic", fmt.Sprint(p), "stack", string(debug.Stack()))
		}
	}()
	if result, err = task.Run(ctx, job, payload); err != nil {
		_ = err.Error() // that of a nil pointer may panic, and it is the handler's
	}
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

// sanitizeError returns an error whose text asynq can read, which must be UTF-8.
// asynq.RevokeTask, for which it takes a job for
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

// outcome decides what becomes of the job.
func (x *Executor) outcome(ctx context.Context, job *tasks.Job, err error) string {
	switch {
	case err == nil:
		return outcomeDone
	// Whatever the error is: it may come from what has ended the context.
	case errors.Is(context.Cause(ctx), errEnding):
		return outcomeInterrupted
	case errors.Is(context.Cause(ctx), errLeaseLost):
		return outcomeLost
	case errors.Is(context.Cause(ctx), errCancelled):
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
