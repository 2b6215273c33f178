package tasks

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/carpool-go/carpool/dbpool"
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

// once is [Once] with the result as JSON, nil for none.
func once(ctx context.Context, job *Job, fn func(tx pgx.Tx) ([]byte, error)) (json.RawMessage, error) {
	if job.recorded {
		return nil, Permanent(errors.New("tasks.Once was called twice"))
	}
	for {
		tx, result, done, err := beginOnce(ctx, job)
		if err != nil {
			return nil, fmt.Errorf("begin the job's transaction: %w", err)
		}
		if done {
			job.recorded = true
			return result, nil
		}
		result, err = tx.run(ctx, job, fn)
		if isRecorded(err) {
			continue // by another run, after this one had looked
		}
		if dbpool.IsAway(err) {
			// Perhaps another run has ended this one's session, which then goes
			// first; or the two would end each other's for ever.
			job.givesWay = true
		}
		job.recorded = err == nil
		return result, err
	}
}

const (
	// lockJob keeps a second run of the same job out for as long as the
	// transaction is open; the record alone would only stop it at its end.
	lockJob = "SELECT pg_try_advisory_xact_lock(hashtextextended('carpool job ' || $1 || ' ' || $2, 0))"
	lookJob = "SELECT result FROM carpool.jobs_done WHERE id = $1 AND kind = $2"
	// endOther ends the session that holds lockJob.
	endOther = `SELECT count(pg_terminate_backend(l.pid)) FROM pg_locks l,
		LATERAL (SELECT hashtextextended('carpool job ' || $1 || ' ' || $2, 0) AS key) k
		WHERE l.locktype = 'advisory' AND l.granted AND l.objsubid = 1 AND l.pid <> pg_backend_pid()
		AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
		AND l.classid = ((k.key >> 32) & 4294967295)::oid AND l.objid = (k.key & 4294967295)::oid`
	recordJob = "INSERT INTO carpool.jobs_done (id, kind, queue, result) VALUES ($1, $2, $3, $4)"
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
	since, grace := time.Now(), otherRunGrace
	if deadline, ok := ctx.Deadline(); ok {
		grace = min(grace, time.Until(deadline)/2)
	}
	if job.givesWay {
		time.Sleep(3 * otherRunCheck)
	}
	for {
		tx, locked, result, done, err := tryBegin(ctx, job)
		if err != nil || tx != nil || done {
			return tx, result, done, err
		}
		if !locked && time.Since(since) > grace && !job.givesWay {
			var ended int
			if err := job.DB.QueryRow(ctx, endOther, job.ID, job.Kind).Scan(&ended); err != nil {
				return nil, nil, false, fmt.Errorf("end the session of another run: %w", err)
			}
			if ended > 0 {
				job.Log.Warn("another run of this job did not end; its session was, and its transaction with it")
			}
			since = time.Now()
		}
		select {
		case <-ctx.Done():
			return nil, nil, false, fmt.Errorf("another run of this job is still in its transaction: %w", context.Cause(ctx))
		case <-time.After(otherRunCheck):
		}
	}
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
	tx = &onceTx{Tx: inner, conn: conn}
	if done || !locked {
		tx.rollBack()
		return nil, locked, result, done, nil
	}
	return tx, true, nil, false, nil
}

// LookDone looks for the record of a transactional job, and returns its result, as
// JSON, if there is one.
func LookDone(ctx context.Context, job *Job) (result []byte, done bool, err error) {
	return lookDone(ctx, job)
}

// lookDone looks for the job's record.
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

// onceTx is the transaction of a job as its handler has it.
type onceTx struct {
	pgx.Tx
	conn  *dbpool.Conn
	ended bool // by run
}

// run runs fn, and commits what it did with the job's record, or rolls back.
func (t *onceTx) run(ctx context.Context, job *Job, fn func(tx pgx.Tx) ([]byte, error)) (json.RawMessage, error) {
	defer func() {
		if !t.ended {
			t.rollBack() // fn has failed, or panicked
		}
	}()
	result, err := fn(t)
	if err != nil {
		return nil, err
	}
	if err := ctx.Err(); err != nil {
		return nil, fmt.Errorf("the handler has ended too late: %w", context.Cause(ctx))
	}
	return result, t.commit(ctx, job, result)
}

// commit records the job and commits, in one round trip.
func (t *onceTx) commit(ctx context.Context, job *Job, result json.RawMessage) error {
	var b pgx.Batch
	recorded := false
	b.Queue(recordJob, job.ID, job.Kind, job.Queue, result).Exec(func(pgconn.CommandTag) error {
		recorded = true
		return nil
	})
	b.Queue("COMMIT")
	// A context that ends amid the commit would leave open what became of it.
	commitCtx, cancel := context.WithTimeout(context.WithoutCancel(ctx), answerBound)
	defer cancel()
	err := t.conn.SendBatch(commitCtx, &b).Close()
	if err == nil {
		t.ended = true
		t.conn.Release()
		return nil
	}
	e, refused := errors.AsType[*pgconn.PgError](err)
	switch {
	case !refused && !t.conn.Conn().IsClosed():
		return fmt.Errorf("commit the job's transaction: the handler has left rows open, or still uses it: %w", err)
	case !refused || dbpool.IsAway(err):
		return fmt.Errorf("commit the job's transaction: %w: %w", ErrNoAnswer, err)
	case !recorded && e.Code == "25P02":
		return errors.New("the handler went on after a statement of its transaction had failed, and returned no error; nothing is committed")
	}
	return fmt.Errorf("commit the job's transaction: %w", err)
}

func (t *onceTx) rollBack() {
	t.ended = true
	ctx, cancel := context.WithTimeout(context.Background(), answerBound)
	defer cancel()
	_ = t.Tx.Rollback(ctx) // the pool closes a connection that is still in a transaction
	t.conn.Release()
}

// isRecorded reports whether err says that the job's record is there already.
func isRecorded(err error) bool {
	e, ok := errors.AsType[*pgconn.PgError](err)
	return ok && e.Code == "23505" && e.SchemaName == "carpool" && e.TableName == "jobs_done"
}

// errTxNotYours is what a handler gets that ends the transaction itself.
var errTxNotYours = errors.New("the job's transaction is ended by the worker: return nil to commit, an error to roll back")

func (t *onceTx) Commit(context.Context) error   { return errTxNotYours }
func (t *onceTx) Rollback(context.Context) error { return errTxNotYours }

// The statements go through the pool's connection, which serves nobody who uses
// the transaction after the handler has returned.

func (t *onceTx) Exec(ctx context.Context, sql string, args ...any) (pgconn.CommandTag, error) {
	return t.conn.Exec(ctx, sql, args...)
}

func (t *onceTx) Query(ctx context.Context, sql string, args ...any) (pgx.Rows, error) {
	return t.conn.Query(ctx, sql, args...)
}

func (t *onceTx) QueryRow(ctx context.Context, sql string, args ...any) pgx.Row {
	return t.conn.QueryRow(ctx, sql, args...)
}

func (t *onceTx) CopyFrom(ctx context.Context, table pgx.Identifier, columns []string, src pgx.CopyFromSource) (int64, error) {
	return t.conn.CopyFrom(ctx, table, columns, src)
}

func (t *onceTx) SendBatch(ctx context.Context, b *pgx.Batch) pgx.BatchResults {
	return t.conn.SendBatch(ctx, b)
}

func (t *onceTx) Begin(ctx context.Context) (pgx.Tx, error) {
	if t.conn.Conn() == nil {
		return nil, pgx.ErrTxClosed
	}
	return t.Tx.Begin(ctx)
}
