package once

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/jackc/pgerrcode"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
)

// firstTx is the transaction of a job's first delivery. It begins with the handler's first
// statement: BEGIN, the lock and the look go to the database in the same round trip.
// Statements that are sent together can't be conditional, but an error keeps the server
// from running those behind it; so the lock that isn't had and the record that is there are
// errors here.
//
// The statements that can't be sent behind others begin the transaction by themselves.
type firstTx struct {
	ctx context.Context // of the run, for what is given none
	job *Job

	tx *jobTx // nil until it has begun
	// err is why it can't begin: errOtherHolds, errIsDone, or whatever else comes before it. It
	// wins over all that the handler returns.
	err error
	// failed is set when the first statement has failed before the database saw it. The
	// transaction is a failed one then, as if the database had.
	failed bool
	over   bool // the handler has returned
}

// What the first round trip finds that keeps the handler from going on.
var (
	errOtherHolds = fmt.Errorf("%w: %w", ErrNotBegun, ErrOtherRun)
	errIsDone     = fmt.Errorf("%w: it is done already", ErrNotBegun)
)

// runFirst runs fn in a transaction that begins with its first statement. With again nothing
// has come of it: the job is another run's, or done.
func (j *Job) runFirst(ctx context.Context, fn func(tx pgx.Tx) ([]byte, error)) (result json.RawMessage, again bool, err error) {
	t := &firstTx{ctx: ctx, job: j}
	result, ofHandler, err := t.run(fn)
	switch {
	case t.err == errOtherHolds, t.err == errIsDone, isRecorded(err):
		return nil, true, nil
	case t.err != nil:
		return nil, false, t.err
	case ofHandler:
		return j.unlessDone(ctx, err)
	}
	return result, false, err
}

// unlessDone returns the error of a handler, unless the job has a record all the same: that
// has been looked for after whatever the handler did before its first statement, or in a
// snapshot that was older than the lock.
func (j *Job) unlessDone(ctx context.Context, err error) (json.RawMessage, bool, error) {
	lookCtx, cancel := context.WithTimeout(context.WithoutCancel(ctx), answerBound)
	defer cancel()
	_, done, lookErr := j.Look(lookCtx)
	switch {
	case done:
		return nil, true, nil
	case lookErr == nil:
		return nil, false, err
	case ctx.Err() == nil && lookCtx.Err() != nil:
		lookErr = fmt.Errorf("%w: %w", ErrNoAnswer, lookErr)
	}
	return nil, false, fmt.Errorf("%w; whether an earlier delivery was done is not known: %w", err, lookErr)
}

// run runs fn, and commits what it did with the job's record, or rolls back. ofHandler tells
// whether the error is fn's.
func (t *firstTx) run(fn func(tx pgx.Tx) ([]byte, error)) (result json.RawMessage, ofHandler bool, err error) {
	defer func() {
		t.over = true
		if t.tx != nil && !t.tx.ended {
			t.tx.rollBack()
		}
		if t.err != nil { // what has no error to return may have panicked for it
			_ = recover()
		}
	}()
	result, err = fn(t)
	switch {
	case t.err != nil:
		return nil, false, t.err
	case err != nil:
		return nil, true, err
	case t.ctx.Err() != nil:
		return nil, true, fmt.Errorf("the handler has ended too late: %w", context.Cause(t.ctx))
	case t.failed:
		return nil, true, errWentOn
	case t.tx != nil:
		return result, false, t.tx.commit(t.ctx, t.job, result)
	}
	return result, false, t.commitAtOnce(result)
}

// commitAtOnce does all that there is to do for a handler that has made no statement.
func (t *firstTx) commitAtOnce(result json.RawMessage) error {
	var b pgx.Batch
	recorded := queueCommit(&b, t.job, result)
	commitCtx, cancel := outlast(t.ctx, answerBound)
	defer cancel()
	results, err := t.send(commitCtx, &b)
	if err != nil {
		return err
	}
	return t.tx.committed(results.Close(), recorded)
}

// begin returns the transaction, which it begins by itself if it has not begun.
func (t *firstTx) begin(ctx context.Context) (pgx.Tx, error) {
	if err := t.unfit(); err != nil {
		return nil, err
	}
	if t.tx == nil {
		c, err := t.job.tryClaim(ctx)
		switch {
		case err != nil:
			t.err = fmt.Errorf("%w: %w", ErrNotBegun, err)
		case c.heldByOther:
			t.err = errOtherHolds
		case c.done:
			t.err = errIsDone
		default:
			t.tx = c.mine
		}
	}
	return t.tx, t.err
}

// unfit returns what a statement gets that can't be sent any more.
func (t *firstTx) unfit() error {
	switch {
	case t.over && t.tx == nil:
		return pgx.ErrTxClosed
	case t.err != nil:
		return t.err
	case t.failed:
		return &pgconn.PgError{
			Severity: "ERROR", Code: pgerrcode.InFailedSQLTransaction,
			Message: "current transaction is aborted, commands ignored until end of transaction block",
		}
	}
	return nil
}

// isFirst reports whether a statement is to be sent behind the beginning.
func (t *firstTx) isFirst() bool { return t.tx == nil && t.unfit() == nil }

// send sends the queries of b behind the beginning, and returns their results. The error is
// t.err, or that of a query which the database has not seen.
func (t *firstTx) send(ctx context.Context, b *pgx.Batch) (*firstResults, error) {
	conn, err := t.job.DB.Acquire(ctx)
	if err != nil {
		t.err = fmt.Errorf("%w: %w", ErrNotBegun, err)
		return nil, t.err
	}
	var all pgx.Batch
	all.BeginTx(pgx.TxOptions{IsoLevel: t.job.Isolation})
	all.Queue(lockJob, t.job.ID, t.job.Kind)
	all.Queue(refuseDone, t.job.ID, t.job.Kind)
	for _, query := range b.QueuedQueries {
		q := *query // pgx writes to those it sends
		all.QueuedQueries = append(all.QueuedQueries, &q)
	}
	batchCtx, cancel := context.WithCancel(ctx)
	bound := time.AfterFunc(answerBound, cancel)
	results := &firstResults{conn.SendBatch(batchCtx, &all), cancel}
	_, err = results.Exec()
	if err == nil {
		_, err = results.Exec()
	}
	answered := bound.Stop() // refuseDone has the server answer however long the query takes
	if err == nil {
		_, err = results.Exec()
	}
	if err == nil {
		t.tx = &jobTx{lentTx: lentTx{results.BatchResults.Tx(), conn}}
		return results, nil
	}
	_ = results.Close()
	tx := &jobTx{lentTx: lentTx{results.BatchResults.Tx(), conn}}
	pg := conn.Conn().PgConn()
	unseen := !pg.IsClosed() && pg.TxStatus() == 'I'
	tx.rollBack()
	return nil, t.notBegun(ctx, err, unseen, answered)
}

// notBegun decides what it means that the first round trip has failed: unseen, if it left the
// connection outside of a transaction; answered, if that was in time. It returns what the
// statement gets.
func (t *firstTx) notBegun(ctx context.Context, err error, unseen, answered bool) error {
	e, said := errors.AsType[*pgconn.PgError](err)
	preprocessing, unsent := errors.AsType[pgx.ErrPreprocessingBatch](err)
	switch {
	case said && e.Code == stateOtherHolds:
		t.err = errOtherHolds
	case said && e.Code == stateIsDone:
		t.err = errIsDone
	// In the simple protocol a query that can't be parsed keeps those before it from running.
	case unseen && (unsent || !said || e.Code == pgerrcode.SyntaxError):
		if _, err := t.begin(ctx); err != nil {
			return err
		}
		t.failed = true
		if unsent {
			return preprocessing.Unwrap()
		}
		return err
	case !answered && ctx.Err() == nil:
		t.err = fmt.Errorf("%w: %w: %w", ErrNotBegun, ErrNoAnswer, err)
	default:
		t.err = fmt.Errorf("%w: %w", ErrNotBegun, err)
	}
	return t.err
}

// firstResults are what the handler's own queries come to, of those that were sent with the
// first.
type firstResults struct {
	pgx.BatchResults
	end context.CancelFunc
}

func (r *firstResults) Close() error {
	err := r.BatchResults.Close()
	r.end()
	return err
}

// Tx is nil, because the transaction is the job's.
func (r *firstResults) Tx() pgx.Tx { return nil }

func (t *firstTx) Begin(ctx context.Context) (pgx.Tx, error) {
	tx, err := t.begin(ctx)
	if err != nil {
		return nil, err
	}
	return tx.Begin(ctx)
}

func (t *firstTx) Commit(context.Context) error   { return errTxNotYours }
func (t *firstTx) Rollback(context.Context) error { return errTxNotYours }

func (t *firstTx) CopyFrom(ctx context.Context, table pgx.Identifier, columns []string, src pgx.CopyFromSource) (int64, error) {
	tx, err := t.begin(ctx)
	if err != nil {
		return 0, err
	}
	return tx.CopyFrom(ctx, table, columns, src)
}

func (t *firstTx) Prepare(ctx context.Context, name, sql string) (*pgconn.StatementDescription, error) {
	tx, err := t.begin(ctx)
	if err != nil {
		return nil, err
	}
	return tx.Prepare(ctx, name, sql)
}

// LargeObjects are of no use if the transaction can't begin; t.err has the reason.
func (t *firstTx) LargeObjects() pgx.LargeObjects {
	tx, err := t.begin(t.ctx)
	if err != nil {
		return pgx.LargeObjects{}
	}
	return tx.LargeObjects()
}

// Conn is nil if the transaction can't begin, or is over; t.err has the reason.
func (t *firstTx) Conn() *pgx.Conn {
	tx, err := t.begin(t.ctx)
	if err != nil {
		return nil
	}
	return tx.Conn()
}

func (t *firstTx) Exec(ctx context.Context, sql string, args ...any) (pgconn.CommandTag, error) {
	if !t.isFirst() || !canFollow(args) || len(args) == 0 { // without arguments it may be several statements
		tx, err := t.begin(ctx)
		if err != nil {
			return pgconn.CommandTag{}, err
		}
		return tx.Exec(ctx, sql, args...)
	}
	results, err := t.sendOne(ctx, sql, args)
	if err != nil {
		return pgconn.CommandTag{}, err
	}
	tag, err := results.Exec()
	return tag, cmp.Or(err, results.Close())
}

func (t *firstTx) Query(ctx context.Context, sql string, args ...any) (pgx.Rows, error) {
	if !t.isFirst() || !canFollow(args) {
		tx, err := t.begin(ctx)
		if err != nil {
			return pgx.FailedBatchResults(&pgx.Batch{}, err).Query()
		}
		return tx.Query(ctx, sql, args...)
	}
	results, err := t.sendOne(ctx, sql, args)
	if err != nil {
		return pgx.FailedBatchResults(&pgx.Batch{}, err).Query()
	}
	rows, err := results.Query()
	if err != nil {
		_ = results.Close()
		return rows, err
	}
	return &firstRows{Rows: rows, results: results}, nil
}

func (t *firstTx) QueryRow(ctx context.Context, sql string, args ...any) pgx.Row {
	if !t.isFirst() || !canFollow(args) {
		tx, err := t.begin(ctx)
		if err != nil {
			return pgx.FailedBatchResults(&pgx.Batch{}, err).QueryRow()
		}
		return tx.QueryRow(ctx, sql, args...)
	}
	results, err := t.sendOne(ctx, sql, args)
	if err != nil {
		return pgx.FailedBatchResults(&pgx.Batch{}, err).QueryRow()
	}
	return firstRow{results.QueryRow(), results}
}

func (t *firstTx) SendBatch(ctx context.Context, b *pgx.Batch) pgx.BatchResults {
	if !t.isFirst() || b.Len() == 0 {
		tx, err := t.begin(ctx)
		if err != nil {
			return pgx.FailedBatchResults(b, err)
		}
		return tx.SendBatch(ctx, b)
	}
	results, err := t.send(ctx, b)
	if err != nil {
		return pgx.FailedBatchResults(b, err)
	}
	return results
}

func (t *firstTx) sendOne(ctx context.Context, sql string, args []any) (*firstResults, error) {
	var b pgx.Batch
	b.Queue(sql, args...)
	return t.send(ctx, &b)
}

// canFollow reports whether a statement with these arguments can be sent behind others. Those
// that begin with an option of pgx's own can't.
func canFollow(args []any) bool {
	if len(args) == 0 {
		return true
	}
	switch args[0].(type) {
	case pgx.QueryExecMode, pgx.QueryResultFormats, pgx.QueryResultFormatsByOID:
		return false
	}
	return true
}

// firstRows are the rows of a first statement. Their end is the batch's.
type firstRows struct {
	pgx.Rows
	results *firstResults
	err     error // of the batch's end
	closed  bool
}

func (r *firstRows) Close() {
	r.Rows.Close()
	if !r.closed {
		r.closed = true
		r.err = r.results.Close()
	}
}

func (r *firstRows) Err() error { return cmp.Or(r.Rows.Err(), r.err) }

func (r *firstRows) Next() bool {
	if r.Rows.Next() {
		return true
	}
	r.Close()
	return false
}

func (r *firstRows) Scan(dest ...any) error {
	err := r.Rows.Scan(dest...)
	if err != nil {
		r.Close()
	}
	return err
}

func (r *firstRows) Values() ([]any, error) {
	values, err := r.Rows.Values()
	if err != nil {
		r.Close()
	}
	return values, err
}

// firstRow is the row of a first statement.
type firstRow struct {
	pgx.Row
	results *firstResults
}

func (r firstRow) Scan(dest ...any) (err error) {
	defer func() { err = cmp.Or(err, r.results.Close()) }() // deferred, because a Scanner may panic
	return r.Row.Scan(dest...)
}
