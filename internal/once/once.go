// Package once makes a job's effects in Postgres happen once, however often the job is
// delivered: a record of the job that is committed with its effects, a lock that keeps a
// second run out for as long as the first is in its transaction, and the fence that ends
// the session of a run that has lost its job without knowing.
package once

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/jackc/pgerrcode"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/carpool-go/carpool/dbpool"
	"github.com/carpool-go/carpool/internal/pgtext"
	"github.com/carpool-go/carpool/internal/wait"
)

// Job is one delivery of a job. It is used by one goroutine.
type Job struct {
	DB              *dbpool.Pool
	ID, Kind, Queue string
	// Isolation is the transaction's; "" is the database's default.
	Isolation pgx.TxIsoLevel
	// First is set for a job that has most likely not been delivered before. Its transaction
	// begins with the handler's first statement, which saves a round trip; whether it is done
	// shows only then. It is for one run.
	First bool
	Log   *slog.Logger

	recorded bool
	// yieldOnce has the next claim wait for another run to go first.
	yieldOnce bool
	// grace and check are set by tests that can't wait for otherRunGrace and otherRunCheck.
	grace, check time.Duration
}

// maxID bounds a job's id, in bytes. An index of Postgres takes no more than 2,704 for all
// that is in it.
const maxID = 1000

// CheckID returns what is wrong with the id or the kind of a job that Postgres can't keep,
// whatever is tried; nil for all that carpool enqueues. The error doesn't show them.
func CheckID(id, kind string) error {
	what := ""
	switch {
	case len(id) > maxID:
		what = fmt.Sprintf("the job's id has %d bytes, and may have %d", len(id), maxID)
	case pgtext.Clean(id) != id:
		what = "the job's id has a NUL, or isn't UTF-8"
	case pgtext.Clean(kind) != kind:
		what = "the job's kind has a NUL, or isn't UTF-8"
	default:
		return nil
	}
	return errors.New(what + ", which Postgres can't keep; let its producer enqueue it under another")
}

// Recorded reports whether Do has recorded the job, or found its record.
func (j *Job) Recorded() bool { return j.recorded }

// Again prepares for another run of the same delivery.
func (j *Job) Again() { j.recorded = false }

// ErrNoAnswer is wrapped by the error of a job's transaction whose beginning or
// commit got no answer. What became of a commit, running the job again resolves:
// it then finds its record, or not.
var ErrNoAnswer = errors.New("the database did not answer")

// ErrNotBegun is wrapped by the error of a job whose transaction could not be begun,
// whatever the reason: nothing of it has run in there.
var ErrNotBegun = errors.New("the job's transaction could not be begun")

// ErrOtherRun is wrapped by the error of a job whose time was up before another run
// of it, which has lost its lease, had ended its transaction.
var ErrOtherRun = errors.New("another run of this job is still in its transaction")

// MisuseError is a fault of the handler's code that another try doesn't mend.
type MisuseError struct{ err error }

func (e *MisuseError) Error() string { return e.err.Error() }
func (e *MisuseError) Unwrap() error { return e.err }

// Do runs fn in a transaction that also records the job as done, with fn's result as JSON,
// and commits it. If the job has been recorded already, by an earlier delivery, fn isn't
// run and the result is that one's; nil for none.
//
// It returns fn's error, the database's, a [MisuseError], or one that wraps [ErrNotBegun]
// or [ErrNoAnswer].
func (j *Job) Do(ctx context.Context, fn func(tx pgx.Tx) ([]byte, error)) (json.RawMessage, error) {
	if j.recorded {
		return nil, &MisuseError{errors.New("tasks.Once was called twice")}
	}
	if j.First {
		j.First = false
		result, again, err := j.runFirst(ctx, fn)
		if !again {
			j.yieldOnce = isEnded(err)
			j.recorded = err == nil
			return result, err
		}
	}
	for {
		c, err := j.claim(ctx)
		if err != nil {
			return nil, fmt.Errorf("%w: %w", ErrNotBegun, err)
		}
		if c.done {
			j.recorded = true
			return c.result, nil
		}
		result, err := c.mine.run(ctx, j, fn)
		if isRecorded(err) {
			continue // by another run, after this one had looked
		}
		// Perhaps another run has ended this one's session, which then goes first; or
		// the two would end each other's for ever.
		j.yieldOnce = isEnded(err)
		j.recorded = err == nil
		return result, err
	}
}

// Done looks for the record of a job that isn't to be run any more, and returns its
// result, nil for none. Another run that is in its transaction still is waited for, and at
// last ended, as before a run.
//
// The errors are the database's, and those that wrap [ErrNoAnswer] or [ErrOtherRun].
func (j *Job) Done(ctx context.Context) (result json.RawMessage, done bool, err error) {
	c, err := j.claim(ctx)
	if err != nil {
		return nil, false, fmt.Errorf("look whether the job is done: %w", err)
	}
	if c.mine != nil {
		c.mine.rollBack()
	}
	return c.result, c.done, nil
}

// Look looks for the job's record, and for nothing else. The result is nil for none. The
// error wraps [ErrNotBegun].
func (j *Job) Look(ctx context.Context) (result json.RawMessage, done bool, err error) {
	err = j.DB.QueryRow(ctx, lookJob, j.ID, j.Kind).Scan(&result)
	if errors.Is(err, pgx.ErrNoRows) {
		return nil, false, nil
	}
	if err == nil {
		err = j.confirmRecord(ctx)
	}
	if err != nil {
		return nil, false, fmt.Errorf("%w: look whether the job is done: %w", ErrNotBegun, err)
	}
	return result, true, nil
}

// confirmRecord returns nil once the record that was found is as safe as a commit that was
// answered. It commits something after it, and so waits for a synchronous standby, because
// a record can be seen that the standby doesn't have: when a commit that waits for one is
// cancelled, or its session ended, the primary keeps it, and a failover loses it.
func (j *Job) confirmRecord(ctx context.Context) error {
	if _, err := j.DB.Exec(ctx, confirm); err != nil {
		return fmt.Errorf("confirm the job's record: %w", err)
	}
	return nil
}

const (
	// lockJob keeps a second run of the same job out for as long as the transaction is open;
	// the record alone would only stop it at its end. It returns the transaction's id, by
	// which recordJob knows it again; null if another run has the lock.
	lockJob = "SELECT CASE WHEN pg_try_advisory_xact_lock(carpool.run_key($1, $2)) THEN pg_current_xact_id()::text END"
	lookJob = "SELECT result FROM carpool.jobs_done WHERE id = $1 AND kind = $2"
	// beginRun is lockJob and a look in one. It fails with stateOtherHolds or stateIsDone, and
	// else has the server send what it has answered so far.
	beginRun = "SELECT carpool.begin_run($1, $2)"
	// confirm writes a message into the log that nobody reads. It needs no rights and leaves
	// no dead row.
	confirm = "SELECT pg_logical_emit_message(true, 'carpool', '')"
	// endHolder ends the session that has the job locked.
	endHolder = `SELECT count(pg_terminate_backend(l.pid)) FROM pg_locks l,
		LATERAL (SELECT carpool.run_key($1, $2) AS key) k
		WHERE l.locktype = 'advisory' AND l.granted AND l.objsubid = 1 AND l.pid <> pg_backend_pid()
		AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
		AND l.classid = ((k.key >> 32) & 4294967295)::oid AND l.objid = (k.key & 4294967295)::oid`
	// recordJob fails, since the id can't be null, in another transaction than the one that
	// has the id $5; null is for any.
	recordJob = "INSERT INTO carpool.jobs_done (id, kind, queue, result) VALUES (CASE WHEN coalesce($5 = pg_current_xact_id()::text, true) THEN $1 END, $2, $3, $4)"
)

// The SQLSTATEs of carpool.begin_run.
const (
	stateOtherHolds = "CP001"
	stateIsDone     = "CP002"
)

const (
	// otherRunGrace is how long another run of the same job may go on with its
	// transaction before its session is ended. asynq gives a job to a second
	// worker only when the first has lost its lease, of which the first, if it
	// is awake, hears within its heartbeat of 5 s.
	otherRunGrace = 10 * time.Second
	otherRunCheck = 100 * time.Millisecond
	// answerBound is how long the database may take to begin, commit or roll back.
	// A connection whose other end is gone would be waited for until the job's time
	// is up.
	answerBound = 10 * time.Second
)

// claim is what came of claiming a job: one of its fields tells.
type claim struct {
	// mine is the job's transaction, begun, in which the job is locked and has no record.
	mine *jobTx
	// done is true for a job that has a record, with its result; nil for none.
	done   bool
	result json.RawMessage
	// heldByOther is true for a job that another run has locked.
	heldByOther bool
}

// claim begins the job's transaction, or finds the job done. While another run of the job
// is in its transaction it waits, without holding a connection, and at last ends that
// one's session, because a worker that slept beyond its lease must not commit after its
// successor. What it returns is never heldByOther.
func (j *Job) claim(ctx context.Context) (claim, error) {
	grace, check := cmp.Or(j.grace, otherRunGrace), cmp.Or(j.check, otherRunCheck)
	since, mayEnd := time.Now(), !j.yieldOnce
	if deadline, ok := ctx.Deadline(); ok {
		grace = min(grace, time.Until(deadline)/2)
	}
	if j.yieldOnce {
		_ = wait.For(ctx, 3*check) // tryClaim finds out that ctx has ended
	}
	waited := false
	for {
		c, err := j.tryClaim(ctx)
		if err != nil && waited && ctx.Err() != nil {
			err = fmt.Errorf("%w: %w", ErrOtherRun, err)
		}
		if err == nil && c.done {
			err = j.confirmRecord(ctx)
		}
		if err != nil || !c.heldByOther {
			return c, err
		}
		waited = true
		if mayEnd && time.Since(since) > grace {
			if mayEnd, err = j.endOther(ctx); err != nil {
				return claim{}, err
			}
			since = time.Now()
		}
		if err := wait.For(ctx, check); err != nil {
			return claim{}, fmt.Errorf("%w: %w", ErrOtherRun, err)
		}
	}
}

// tryClaim begins a transaction, locks the job and looks for its record, in one round
// trip. The transaction is rolled back unless the job is mine.
func (j *Job) tryClaim(ctx context.Context) (claim, error) {
	conn, err := j.DB.Acquire(ctx)
	if err != nil {
		return claim{}, err
	}
	var c claim
	var xid *string
	var b pgx.Batch
	b.BeginTx(pgx.TxOptions{IsoLevel: j.Isolation})
	b.Queue(lockJob, j.ID, j.Kind).QueryRow(func(row pgx.Row) error { return row.Scan(&xid) })
	// A statement of its own, so that it sees what was committed before the lock
	// was had.
	b.Queue(lookJob, j.ID, j.Kind).QueryRow(func(row pgx.Row) error {
		err := row.Scan(&c.result)
		c.done = err == nil
		if errors.Is(err, pgx.ErrNoRows) {
			return nil
		}
		return err
	})
	beginCtx, cancel := context.WithTimeout(ctx, answerBound)
	defer cancel()
	results := conn.SendBatch(beginCtx, &b)
	if err := results.Close(); err != nil {
		conn.Release()
		if beginCtx.Err() != nil && ctx.Err() == nil {
			err = fmt.Errorf("%w: %w", ErrNoAnswer, err)
		}
		return claim{}, err
	}
	tx := &jobTx{lentTx: lentTx{results.Tx(), conn}, xid: xid}
	switch {
	case xid == nil: // what the look has found may be older than the other run's end
		tx.rollBack()
		return claim{heldByOther: true}, nil
	case c.done:
		tx.rollBack()
		return c, nil
	}
	return claim{mine: tx}, nil
}

// endOther ends the session of the job's other run. may is false if it is another
// role's, whose sessions this one may not end.
func (j *Job) endOther(ctx context.Context) (may bool, err error) {
	var ended int
	err = j.DB.QueryRow(ctx, endHolder, j.ID, j.Kind).Scan(&ended)
	if e, ok := errors.AsType[*pgconn.PgError](err); ok && e.Code == pgerrcode.InsufficientPrivilege {
		j.Log.Warn("another run of this job does not end, and its session is another role's; it is waited for. "+
			"GRANT pg_signal_backend TO the worker's role, and its session will be ended", "error", e.Message)
		return false, nil
	}
	if err != nil {
		return true, fmt.Errorf("end the session of another run: %w", err)
	}
	if ended > 0 {
		j.Log.Warn("another run of this job did not end; its session was, and its transaction with it")
	}
	return true, nil
}

// isEnded reports whether err says that somebody has ended the session.
func isEnded(err error) bool {
	e, ok := errors.AsType[*pgconn.PgError](err)
	return ok && e.Code == pgerrcode.AdminShutdown
}

// isRecorded reports whether err says that the job's record is there already.
func isRecorded(err error) bool {
	e, ok := errors.AsType[*pgconn.PgError](err)
	return ok && e.Code == pgerrcode.UniqueViolation && e.SchemaName == "carpool" && e.TableName == "jobs_done"
}
