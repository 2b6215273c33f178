package tasks

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"

	"github.com/jackc/pgx/v5"

	"github.com/carpool-go/carpool/internal/once"
)

// TxHandler is a [Handler] whose effects are those of tx. The worker begins tx,
// and commits it together with a record of the job's id in carpool.jobs_done if
// the handler returns no error; else it rolls back. However often the job is
// delivered, its effects are there once, and every delivery has the first one's
// result.
//
// That holds for what it does in tx, with [Client.EnqueueTx] among it, and for nothing
// else. It leaves it to the worker to end tx, and uses tx until it returns at the latest;
// savepoints are fine.
//
// On a first delivery tx begins with its first statement. What comes before that in the
// handler runs then although the job may be done already, which is rare: the same ID was
// enqueued again, or Redis had forgotten the job. The statement fails in that case, and
// nothing that the handler does or returns counts. Later deliveries look first.
type TxHandler[P Payload, R any] func(ctx context.Context, job *Job, tx pgx.Tx, payload P) (R, error)

// RegisterTx adds a task whose effects happen once to s, and panics as [Register] does.
// It costs a job one round trip to the database beside those of its handler, and one more
// on later deliveries.
func RegisterTx[P Payload, R any](s *Set, h TxHandler[P, R]) {
	t := register[P](s)
	t.Once = true
	t.run = func(ctx context.Context, job *Job, p Payload) ([]byte, error) {
		return job.doOnce(ctx, func(tx pgx.Tx) ([]byte, error) {
			return job.marshalResult(h(ctx, job, tx, p.(P)))
		})
	}
}

// RegisterOnce adds a task whose effects happen once to s, and panics as [Register] does.
// Its handler works for a while without the database, and then has its effects in the
// transaction of [Once], which it must call before it returns without an error. A job
// that is delivered again after that has the recorded result, and no handler is called. That
// is the result too if what the handler returns can't be one, because the job is done by then.
func RegisterOnce[P Payload, R any](s *Set, h Handler[P, R]) {
	t := register[P](s)
	t.Once = true
	t.run = func(ctx context.Context, job *Job, p Payload) ([]byte, error) {
		recorded, done, err := job.delivery().Look(ctx)
		if err != nil || done {
			return recorded, err
		}
		r, err := h(ctx, job, p.(P))
		if err != nil {
			return nil, err
		}
		if !job.delivery().Recorded() {
			return nil, Permanent(errors.New("the handler returned without having called tasks.Once"))
		}
		result, err := job.marshalResult(r, nil)
		if err != nil {
			job.Log.Warn("the job is done, but its result is the one that tasks.Once has recorded", "error", err)
			return job.recorded, nil
		}
		return result, nil
	}
}

// Once runs fn in a transaction that also records the job as done, with fn's result, and
// commits it. If an earlier delivery has recorded the job already, Once returns the result
// of that one in place of running fn. It is for the handlers of [RegisterOnce]; a handler
// calls it once, and a second call is a permanent error.
//
// The other errors are fn's, the database's, or wrap [ErrNoAnswer]. A handler returns them
// as they are.
func Once[R any](ctx context.Context, job *Job, fn func(tx pgx.Tx) (R, error)) (R, error) {
	var result R
	data, err := job.doOnce(ctx, func(tx pgx.Tx) ([]byte, error) {
		return job.marshalResult(fn(tx))
	})
	if err == nil && data != nil {
		if err := json.Unmarshal(data, &result); err != nil {
			return result, Permanent(fmt.Errorf("the recorded result of an earlier run can't be read: %w", err))
		}
	}
	return result, err
}

// ErrNoAnswer is wrapped by the error of a job's transaction whose beginning or commit got
// no answer: it may have been committed. The job is run again, which resolves it by
// looking for the record. A handler of [RegisterOnce] must not undo after this error what
// it has done elsewhere.
var ErrNoAnswer = once.ErrNoAnswer

// delivery is the job as internal/once knows it, over all runs of one delivery.
func (j *Job) delivery() *once.Job {
	if j.once == nil {
		j.once = &once.Job{DB: j.DB, ID: j.ID, Kind: j.Kind, Queue: j.Queue, First: j.Delivery == 1, Log: j.Log}
	}
	return j.once
}

// doOnce is [Once] with the result as JSON, nil for none.
func (j *Job) doOnce(ctx context.Context, fn func(tx pgx.Tx) ([]byte, error)) (json.RawMessage, error) {
	result, err := j.delivery().Do(ctx, fn)
	if err == nil {
		j.recorded = result
	}
	if _, ok := errors.AsType[*once.MisuseError](err); ok {
		err = Permanent(err)
	}
	return result, err
}
