package once

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/jackc/pgerrcode"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/carpool-go/carpool/dbpool"
	"github.com/carpool-go/carpool/internal/wait"
)

// jobTx is the transaction of a job.
type jobTx struct {
	lentTx
	xid   *string // its id, in Postgres
	ended bool    // by run
}

// run runs fn, and commits what it did with the job's record, or rolls back.
func (t *jobTx) run(ctx context.Context, job *Job, fn func(tx pgx.Tx) ([]byte, error)) (json.RawMessage, error) {
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
func (t *jobTx) commit(ctx context.Context, job *Job, result json.RawMessage) error {
	if t.conn.Conn().IsClosed() {
		return errors.New("the transaction's connection is closed, and the handler has returned no error: a statement that was broken off closes it")
	}
	var b pgx.Batch
	recorded := queueCommit(&b, job, t.xid, result)
	commitCtx, cancel := outlast(ctx, answerBound)
	defer cancel()
	return t.committed(t.conn.SendBatch(commitCtx, &b).Close(), recorded)
}

// queueCommit queues the job's record and COMMIT. The record has been written once recorded
// is true. It is refused in another transaction than xid; nil allows any.
func queueCommit(b *pgx.Batch, job *Job, xid *string, result json.RawMessage) (recorded *bool) {
	recorded = new(bool)
	b.Queue(recordJob, job.ID, job.Kind, job.Queue, result, xid).Exec(func(pgconn.CommandTag) error {
		*recorded = true
		return nil
	})
	b.Queue("COMMIT")
	return recorded
}

// errWentOn is the failure of a handler that passes over one of its statements'.
var errWentOn = errors.New("the handler went on after a statement of its transaction had failed, and returned no error; nothing is committed")

// committed ends the transaction if it is committed, and says else why it isn't.
func (t *jobTx) committed(err error, recorded *bool) error {
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
	case !*recorded && e.Code == pgerrcode.NotNullViolation && e.TableName == "jobs_done":
		return &MisuseError{errTxNotYours}
	case !*recorded && e.Code == pgerrcode.InFailedSQLTransaction:
		return errWentOn
	}
	return fmt.Errorf("commit the job's transaction: %w", err)
}

// outlast returns a context that ends some time after ctx. A commit may take as
// long as its job, with deferred triggers, or a standby that is to have it too; one
// that is broken off leaves open what became of it.
func outlast(ctx context.Context, by time.Duration) (context.Context, context.CancelFunc) {
	longer, cancel := context.WithCancel(context.WithoutCancel(ctx))
	stop := context.AfterFunc(ctx, func() {
		if wait.For(longer, by) == nil {
			cancel()
		}
	})
	return longer, func() { stop(); cancel() }
}

func (t *jobTx) rollBack() {
	t.ended = true
	ctx, cancel := context.WithTimeout(context.Background(), answerBound)
	defer cancel()
	_ = t.Tx.Rollback(ctx) // the pool closes a connection that is still in a transaction
	t.conn.Release()
}

// errTxNotYours is what a handler gets that ends the transaction itself.
var errTxNotYours = errors.New("the job's transaction is ended by the worker, not by COMMIT or ROLLBACK: return nil to commit, an error to roll back")

func (t *jobTx) Commit(context.Context) error   { return errTxNotYours }
func (t *jobTx) Rollback(context.Context) error { return errTxNotYours }

// lentTx is a transaction, or a savepoint in one, for as long as its connection is
// lent. pgx's own doesn't learn of a COMMIT that is sent in a batch: who uses it
// after the handler has returned would be in the transaction of the connection's
// next borrower. A released connection says that it is.
type lentTx struct {
	pgx.Tx
	conn *dbpool.Conn
}

func (t *lentTx) over() bool { return t.conn.Conn() == nil }

func (t *lentTx) Begin(ctx context.Context) (pgx.Tx, error) {
	if t.over() {
		return nil, pgx.ErrTxClosed
	}
	savepoint, err := t.Tx.Begin(ctx)
	if err != nil {
		return nil, err
	}
	return &lentTx{savepoint, t.conn}, nil
}

func (t *lentTx) Commit(ctx context.Context) error {
	if t.over() {
		return pgx.ErrTxClosed
	}
	return t.Tx.Commit(ctx)
}

func (t *lentTx) Rollback(ctx context.Context) error {
	if t.over() {
		return pgx.ErrTxClosed
	}
	return t.Tx.Rollback(ctx)
}

func (t *lentTx) Exec(ctx context.Context, sql string, args ...any) (pgconn.CommandTag, error) {
	if t.over() {
		return t.conn.Exec(ctx, sql, args...)
	}
	return t.Tx.Exec(ctx, sql, args...)
}

func (t *lentTx) Query(ctx context.Context, sql string, args ...any) (pgx.Rows, error) {
	if t.over() {
		return t.conn.Query(ctx, sql, args...)
	}
	return t.Tx.Query(ctx, sql, args...)
}

func (t *lentTx) QueryRow(ctx context.Context, sql string, args ...any) pgx.Row {
	if t.over() {
		return t.conn.QueryRow(ctx, sql, args...)
	}
	return t.Tx.QueryRow(ctx, sql, args...)
}

func (t *lentTx) CopyFrom(ctx context.Context, table pgx.Identifier, columns []string, src pgx.CopyFromSource) (int64, error) {
	if t.over() {
		return t.conn.CopyFrom(ctx, table, columns, src)
	}
	return t.Tx.CopyFrom(ctx, table, columns, src)
}

func (t *lentTx) SendBatch(ctx context.Context, b *pgx.Batch) pgx.BatchResults {
	if t.over() {
		return t.conn.SendBatch(ctx, b)
	}
	return t.Tx.SendBatch(ctx, b)
}

func (t *lentTx) Prepare(ctx context.Context, name, sql string) (*pgconn.StatementDescription, error) {
	if t.over() {
		return nil, pgx.ErrTxClosed
	}
	return t.Tx.Prepare(ctx, name, sql)
}

func (t *lentTx) LargeObjects() pgx.LargeObjects {
	if t.over() {
		return closedTx().LargeObjects()
	}
	return t.Tx.LargeObjects()
}

// closedTx returns a transaction whose methods return [pgx.ErrTxClosed].
func closedTx() pgx.Tx {
	var b pgx.Batch
	b.BeginTx(pgx.TxOptions{})
	return pgx.FailedBatchResults(&b, pgx.ErrTxClosed).Tx()
}

// Conn is nil when the transaction is over.
func (t *lentTx) Conn() *pgx.Conn { return t.conn.Conn() }
