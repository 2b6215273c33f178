package tasks

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
)

// TxHandler is a [Handler] whose effects are those of tx. The worker begins tx,
// and commits it together with a record of the job's id in carpool.jobs_done if
// the handler returns no error; else it rolls back. However often the job is
// delivered, its effects are there once, and every delivery has the first one's
// result.
//
// What a TxHandler does outside of tx is not covered by that. It must not end tx
// itself, nor use it after it has returned; savepoints are fine.
type TxHandler[P Payload, R any] func(ctx context.Context, job *Job, tx pgx.Tx, payload P) (R, error)

// RegisterTx adds a transactional task, like [Register]. Before the handler runs
// there is one round trip to the database, and one after it.
func RegisterTx[P Payload, R any](s *Set, h TxHandler[P, R]) {
	t := register[P](s)
	t.Once = true
	t.run = func(ctx context.Context, job *Job, p Payload) (any, error) {
		return once(ctx, job, func(tx pgx.Tx) ([]byte, error) {
			return marshalResult(h(ctx, job, tx, p.(P)))
		})
	}
}

// RegisterOnce adds a task whose handler works for a while without the database,
// and then has its effects in the transaction of [Once], which it must call
// before it returns without an error. A job that is delivered again after that
// isn't run at all: the handler is called only if the job's id has no record.
func RegisterOnce[P Payload, R any](s *Set, h Handler[P, R]) {
	t := register[P](s)
	t.Once = true
	t.run = func(ctx context.Context, job *Job, p Payload) (any, error) {
		result, done, err := lookDone(ctx, job)
		if err != nil || done {
			return result, err
		}
		r, err := h(ctx, job, p.(P))
		if err == nil && !job.recorded {
			return nil, Permanent(errors.New("the handler returned without having called tasks.Once"))
		}
		return r, err
	}
}

// Once runs fn in a transaction that also records the job as done, with fn's
// result, and commits it. If the job has been recorded already, by an earlier
// delivery, fn isn't run and the result is that one's. It is for the handlers of
// [RegisterOnce]; a handler calls it once.
//
// It returns fn's error, or the database's; one that wraps [ErrNoAnswer] if the
// beginning of the transaction or its commit got no answer.
func Once[R any](ctx context.Context, job *Job, fn func(tx pgx.Tx) (R, error)) (R, error) {
	var result R
	data, err := once(ctx, job, func(tx pgx.Tx) ([]byte, error) {
		return marshalResult(fn(tx))
	})
	if err == nil && data != nil {
		if err := json.Unmarshal(data, &result); err != nil {
			return result, Permanent(fmt.Errorf("the recorded result of an earlier run can't be read: %w", err))
		}
	}
	return result, err
}

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

// once is [Once] with the result as JSON, nil for none.
func once(ctx context.Context, job *Job, fn func(tx pgx.Tx) ([]byte, error)) (json.RawMessage, error) {
	if job.recorded {
		return nil, Permanent(errors.New("tasks.Once was called twice"))
	}
	for {
		tx, result, done, err := beginOnce(ctx, job)
		if err != nil {
			return nil, fmt.Errorf("%w: %w", ErrNotBegun, err)
		}
		if done {
			job.recorded = true
			return result, nil
		}
		result, err = tx.run(ctx, job, fn)
		if isRecorded(err) {
			continue // by another run, after this one had looked
		}
		// Perhaps another run has ended this one's session, which then goes first; or
		// the two would end each other's for ever.
		job.givesWay = isEnded(err)
		job.recorded = err == nil
		return result, err
	}
}

const (
	// lockJob keeps a second run of the same job out for as long as the
	// transaction is open; the record alone would only stop it at its end.
	// The setting is gone with the transaction, so that recordJob knows it again.
	lockJob = "SELECT pg_try_advisory_xact_lock(hashtextextended('carpool job ' || $1 || ' ' || $2, 0)) FROM set_config('carpool.job', $1, true)"
	lookJob = "SELECT result FROM carpool.jobs_done WHERE id = $1 AND kind = $2"
	// endHolder ends the session that holds lockJob.
	endHolder = `SELECT count(pg_terminate_backend(l.pid)) FROM pg_locks l,
		LATERAL (SELECT hashtextextended('carpool job ' || $1 || ' ' || $2, 0) AS key) k
		WHERE l.locktype = 'advisory' AND l.granted AND l.objsubid = 1 AND l.pid <> pg_backend_pid()
		AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
		AND l.classid = ((k.key >> 32) & 4294967295)::oid AND l.objid = (k.key & 4294967295)::oid`
	// recordJob fails, since the id can't be null, in another transaction than the
	// one that lockJob was in.
	recordJob = "INSERT INTO carpool.jobs_done (id, kind, queue, result) VALUES (CASE current_setting('carpool.job', true) WHEN $1 THEN $1 END, $2, $3, $4)"
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

// beginOnce begins the job's transaction, or finds the job done. While another
// run of the job is in its transaction it waits, without holding a connection,
// and at last ends that one's session: a worker that slept beyond its lease must
// not commit after its successor.
func beginOnce(ctx context.Context, job *Job) (tx *onceTx, result json.RawMessage, done bool, err error) {
	since, grace, mayEnd := time.Now(), otherRunGrace, !job.givesWay
	if deadline, ok := ctx.Deadline(); ok {
		grace = min(grace, time.Until(deadline)/2)
	}
	if job.givesWay {
		time.Sleep(3 * otherRunCheck)
	}
	waits := false
	for {
		tx, locked, result, done, err := tryBegin(ctx, job)
		if err != nil && waits && ctx.Err() != nil {
			err = fmt.Errorf("%w: %w", ErrOtherRun, err)
		}
		if err != nil || tx != nil || done {
			return tx, result, done, err
		}
		waits = true
		if !locked && mayEnd && time.Since(since) > grace {
			if mayEnd, err = endOther(ctx, job); err != nil {
				return nil, nil, false, err
			}
			since = time.Now()
		}
		select {
		case <-ctx.Done():
			return nil, nil, false, fmt.Errorf("%w: %w", ErrOtherRun, context.Cause(ctx))
		case <-time.After(otherRunCheck):
		}
	}
}

// endOther ends the session of the job's other run. may is false if it is another
// role's, whose sessions this one may not end.
func endOther(ctx context.Context, job *Job) (may bool, err error) {
	var ended int
	err = job.DB.QueryRow(ctx, endHolder, job.ID, job.Kind).Scan(&ended)
	if e, ok := errors.AsType[*pgconn.PgError](err); ok && e.Code == "42501" { // insufficient_privilege
		job.Log.Warn("another run of this job does not end, and its session is another role's; it is waited for. "+
			"GRANT pg_signal_backend TO the worker's role, and its session will be ended", "error", e.Message)
		return false, nil
	}
	if err != nil {
		return true, fmt.Errorf("end the session of another run: %w", err)
	}
	if ended > 0 {
		job.Log.Warn("another run of this job did not end; its session was, and its transaction with it")
	}
	return true, nil
}

// tryBegin begins a transaction, locks the job and looks for its record, in one
// round trip.
func tryBegin(ctx context.Context, job *Job) (tx *onceTx, locked bool, result json.RawMessage, done bool, err error) {
	conn, err := job.DB.Acquire(ctx)
	if err != nil {
		return nil, false, nil, false, err
	}
	var b pgx.Batch
	b.BeginTx(pgx.TxOptions{IsoLevel: job.isolation})
	b.Queue(lockJob, job.ID, job.Kind).QueryRow(func(row pgx.Row) error { return row.Scan(&locked) })
	// A statement of its own, so that it sees what was committed before the lock
	// was had.
	b.Queue(lookJob, job.ID, job.Kind).QueryRow(func(row pgx.Row) error {
		err := row.Scan(&result)
		done = err == nil
		if errors.Is(err, pgx.ErrNoRows) {
			return nil
		}
		return err
	})
	beginCtx, cancel := context.WithTimeout(ctx, answerBound)
	defer cancel()
	results := conn.SendBatch(beginCtx, &b)
	inner := results.Tx()
	if err := results.Close(); err != nil {
		conn.Release()
		if beginCtx.Err() != nil && ctx.Err() == nil {
			err = fmt.Errorf("%w: %w", ErrNoAnswer, err)
		}
		return nil, false, nil, false, err
	}
	tx = &onceTx{lentTx: lentTx{inner, conn}}
	if done || !locked {
		tx.rollBack()
		return nil, locked, result, done, nil
	}
	return tx, true, nil, false, nil
}

// LookDone looks for the record of a transactional job that isn't to be run any
// more, and returns its result, nil for none. Another run that is in its transaction
// still is waited for, and at last ended, as before a run.
//
// The errors are the database's, and those that wrap [ErrNoAnswer] or [ErrOtherRun].
func LookDone(ctx context.Context, job *Job) (result json.RawMessage, done bool, err error) {
	tx, result, done, err := beginOnce(ctx, job)
	if err != nil {
		return nil, false, fmt.Errorf("look whether the job is done: %w", err)
	}
	if tx != nil {
		tx.rollBack()
	}
	return result, done, nil
}

// lookDone looks for the record, and for nothing else.
func lookDone(ctx context.Context, job *Job) (result json.RawMessage, done bool, err error) {
	err = job.DB.QueryRow(ctx, lookJob, job.ID, job.Kind).Scan(&result)
	if errors.Is(err, pgx.ErrNoRows) {
		return nil, false, nil
	}
	if err != nil {
		return nil, false, fmt.Errorf("look whether the job is done: %w", err)
	}
	return result, true, nil
}

// isEnded reports whether err says that somebody has ended the session: 57P01
// admin_shutdown.
func isEnded(err error) bool {
	e, ok := errors.AsType[*pgconn.PgError](err)
	return ok && e.Code == "57P01"
}

// isRecorded reports whether err says that the job's record is there already.
func isRecorded(err error) bool {
	e, ok := errors.AsType[*pgconn.PgError](err)
	return ok && e.Code == "23505" && e.SchemaName == "carpool" && e.TableName == "jobs_done"
}
