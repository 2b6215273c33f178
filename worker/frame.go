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
	"unicode/utf8"

	"github.com/hibiken/asynq"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/redis/go-redis/v9"

	"github.com/carpool-go/carpool/dbpool"
	"github.com/carpool-go/carpool/internal/asynqkey"
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
	outcomeLost        = "lost"        // with its lease: it is another worker's by now
)

// ProcessTask runs one attempt of a job.
func (f *frame) ProcessTask(asynqCtx context.Context, t *asynq.Task) error {
	started := time.Now()
	job := f.newJob(asynqCtx, t)
	run, err := f.runs.begin(asynqCtx, job.Queue+" "+job.ID)
	if err != nil {
		return postponed(fmt.Errorf("an earlier run of this job has not ended: %w", err))
	}
	defer f.runs.end(run)

	ctx, release := f.bound(asynqCtx, started)
	defer release()
	ctx, borrower := f.db.Track(ctx, job.Kind+" "+job.ID)
	defer borrower.End() // also when a handler ends its goroutine
	var result []byte
	pprof.Do(ctx, pprof.Labels(jobLabel, job.ID), func(ctx context.Context) {
		result, err = f.attempt(ctx, job, t.Payload(), borrower)
	})
	usage := borrower.End()
	err = speakable(explain(ctx, err))
	if why := run.givenUp(asynqCtx); why != nil && !errors.Is(err, why) && !(why == errCancelled && err == nil) {
		err = why // asynq doesn't hear the handler any more
	}
	run.done, run.result = err == nil, result

	outcome := f.outcome(ctx, job, err)
	if outcome == outcomeDone && result != nil && asynqCtx.Err() == nil {
		if err := f.keepResult(asynqCtx, job, result); err != nil {
			job.Log.Warn("the job is done, but its result could not be written", "error", err)
		}
	}
	if outcome == outcomeDone || outcome == outcomeArchived || outcome == outcomeCancelled {
		if err := f.client.ReleaseUnique(context.WithoutCancel(asynqCtx), job.ID, t.Headers()); err != nil {
			job.Log.Warn("the job has ended, but its unique key could not be given up", "error", err)
		}
	}
	f.record(job, outcome, time.Since(started), usage, err)
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

// resultScript writes the result of a job that is still there. asynq's own way of it
// would leave a hash behind for one that is not, on which its id then stumbles.
var resultScript = redis.NewScript(`
if redis.call("HEXISTS", KEYS[1], "state") == 1 then redis.call("HSET", KEYS[1], "result", ARGV[1]) end
return 1`)

func writeResult(ctx context.Context, rdb redis.UniversalClient, queue, id string, data []byte) error {
	return resultScript.Run(ctx, rdb, []string{asynqkey.Task(queue, id)}, data).Err()
}

// keepResult writes a result, again and again while Redis is away, as the
// acknowledgement is that follows it.
func (f *frame) keepResult(asynqCtx context.Context, job *tasks.Job, result []byte) error {
	ctx, cancel := asynqCtx, context.CancelFunc(func() {})
	if deadline, ok := asynqCtx.Deadline(); ok { // at which asynq would take it for a failure
		ctx, cancel = context.WithDeadline(asynqCtx, deadline.Add(-tasks.TimeoutGrace/4))
	}
	defer cancel()
	for {
		err := writeResult(ctx, f.rdb, job.Queue, job.ID, result)
		if !mayBeTriedAgain(err) {
			return err
		}
		select {
		case <-ctx.Done():
			return err
		case <-time.After(ackPauseCap/2 + rand.N(ackPauseCap)):
		}
	}
}

// HandleError is called by asynq with each failure before it acts on it. If it
// has given up a handler that still runs, because that ignores the end of its
// context, the job's hand is kept here, and with it the job's lease, until the
// handler has ended: asynq alone frees the hand and runs the job beside itself.
// (Upstream, processor.exec would wait for resCh after ctx.Done.)
//
// What is postponed or snoozed and has no retry left by asynq's count, it is about to
// archive.
func (f *frame) HandleError(ctx context.Context, t *asynq.Task, err error) {
	id, _ := asynq.GetTaskID(ctx)
	queue, _ := asynq.GetQueueName(ctx)
	run := f.runs.giveUp(queue+" "+id, err)
	if run != nil {
		awaitEnd(run.ended, id, f.log.With(slog.Group("job", "id", id, "kind", t.Type())))
	}
	if err == context.Canceled { //nolint:errorlint // asynq's own
		f.behind.Go(func() { f.putAway(queue, id, run) })
		return
	}
	retried, _ := asynq.GetRetryCount(ctx)
	maxRetry, _ := asynq.GetMaxRetry(ctx)
	var until time.Time
	if retried >= maxRetry && !isFailure(err) && !errors.Is(err, asynq.SkipRetry) {
		until = time.Now().Add(retryDelay(retried, err, t))
	}
	f.acks.postpone(queue, id, until)
}

// newJob describes the attempt.
func (f *frame) newJob(ctx context.Context, t *asynq.Task) *tasks.Job {
	id, _ := asynq.GetTaskID(ctx)
	queue, _ := asynq.GetQueueName(ctx)
	retried, _ := asynq.GetRetryCount(ctx)
	maxRetry, ok := tasks.MaxRetry(t.Headers())
	if !ok { // it was enqueued by others
		maxRetry, _ = asynq.GetMaxRetry(ctx)
	}
	return &tasks.Job{
		ID: id, Kind: t.Type(), Queue: queue,
		Attempt: retried + 1, MaxRetry: maxRetry,
		DB: f.db, Client: f.client,
		Log:         f.log.With(slog.Group("job", "id", id, "kind", t.Type())),
		WriteResult: func(data []byte) error { return writeResult(ctx, f.rdb, queue, id, data) },
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

// attempt is attemptWith with the reason, if the job has used up its tries, why none
// of them had an end: its worker died each time, or it ran into its timeout and did
// not say so. The reason outlasts a postponement.
func (f *frame) attempt(ctx context.Context, job *tasks.Job, data []byte, borrower *dbpool.Borrower) ([]byte, error) {
	reason := ""
	if job.Attempt > job.MaxRetry+1 {
		var err error
		if reason, err = f.whySpent(ctx, job); err != nil {
			return nil, err
		}
	}
	result, err := f.attemptWith(ctx, job, reason, data, borrower)
	if e, ok := errors.AsType[*postponedError](err); ok && reason != "" {
		err = &postponedError{fmt.Errorf("%s%s%w", reason, notLookedUp, e.err), e.delay}
	}
	return result, err
}

// attemptWith runs the handler until what comes of it is the job's own. With a reason
// it doesn't: the job is given up, unless its last worker died after the commit.
func (f *frame) attemptWith(ctx context.Context, job *tasks.Job, reason string, data []byte, borrower *dbpool.Borrower) ([]byte, error) {
	task, err := f.tasks.Lookup(job.Kind)
	if err != nil {
		return nil, f.unknown(ctx, job, err)
	}
	if reason != "" {
		job.Attempt-- // this is none
		return f.unlessDone(ctx, job, task, giveUp(reason, job.Attempt))
	}
	payload, err := task.Decode(data)
	if err != nil {
		return f.unlessDone(ctx, job, task, err) // by an older worker, which took it
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
		if ctx.Err() != nil && errors.Is(err, tasks.ErrNoAnswer) {
			return nil, postponed(err) // it may be the job's end that broke it off
		}
		if busy := f.note(err); busy {
			return nil, postponed(err)
		}
		if errors.Is(err, tasks.ErrNotBegun) {
			time.Sleep(rand.N(probeEvery)) // nothing of the job has run: it is not to blame, and may go on for long
		} else if f.gate.blame(job.ID) > maxOutages {
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

// whySpent returns why a job's tries had no end, from its last error; "" if somebody
// has put it back, and it is to be run.
func (f *frame) whySpent(ctx context.Context, job *tasks.Job) (reason string, err error) {
	for {
		data, err := f.rdb.HGet(ctx, asynqkey.Task(job.Queue, job.ID), "msg").Bytes()
		switch {
		case errors.Is(err, redis.Nil):
			return "", tasks.Permanent(errors.New("the job is not in Redis any more"))
		case err == nil:
			msg, err := parseMessage(data)
			if err != nil {
				return "", tasks.Permanent(err)
			}
			if !isUnended(msg.lastErr) {
				return "", nil
			}
			reason, _, _ := strings.Cut(msg.lastErr, notLookedUp)
			return reason, nil
		}
		select {
		case <-ctx.Done():
			return "", postponed(fmt.Errorf("%s%s%w", crashed, notLookedUp, err))
		case <-time.After(ackPauseCap / 4):
		}
	}
}

// unlessDone returns verdict, which is why the job isn't run, or the result if it has
// been done before. If that can't be seen now the job is postponed.
func (f *frame) unlessDone(ctx context.Context, job *tasks.Job, task *tasks.Task, verdict error) ([]byte, error) {
	if !task.Once {
		return nil, verdict
	}
	if err := f.gate.wait(ctx); err != nil {
		return nil, postponed(fmt.Errorf("the database is away: %w", err))
	}
	result, done, err := tasks.LookDone(ctx, job)
	switch {
	case done:
		return result, nil
	case err == nil:
		return nil, verdict
	case isForGood(err):
		return nil, fmt.Errorf("%w%s%w", verdict, notLookedUp, err)
	case ctx.Err() == nil && !isRefusal(err) && !errors.Is(err, tasks.ErrOtherRun):
		f.note(err)
	}
	return nil, postponed(err)
}

// notLookedUp stands between the reason why a job is given up, which the next delivery
// must find again, and why that could not be done.
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

// speakable returns an error whose text asynq can send: one that is not UTF-8 it
// can't, and the job would have no end. asynq.RevokeTask, for which it takes a job for
// done, is a failure here.
func speakable(err error) error {
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
func (f *frame) outcome(ctx context.Context, job *tasks.Job, err error) string {
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
func (f *frame) record(job *tasks.Job, outcome string, took time.Duration, usage dbpool.Usage, err error) {
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
