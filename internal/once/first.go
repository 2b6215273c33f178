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

	"github.com/carpool-go/carpool/dbpool"
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
	failed  bool
	commits bool // what is sent with the beginning ends with COMMIT
	over    bool // the handler has returned
}

// errAlone says that a statement has to be sent by itself, because nothing has come of
// sending it behind the beginning.
var errAlone = errors.New("the statement is to be sent by itself")

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
	returned := false
	defer func() {
		t.over = true
		if t.tx != nil && !t.tx.ended {
			t.tx.rollBack()
		}
		if !returned && t.err == nil && t.isDone() {
			t.err = errIsDone
		}
		if t.err != nil { // what has no error to return may have panicked for it
			_ = recover()
		}
	}()
	result, err = fn(t)
	returned = true
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

// isDone looks for the job's record on behalf of a handler that has panicked.
func (t *firstTx) isDone() bool {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(t.ctx), answerBound)
	defer cancel()
	_, done, _ := t.job.Look(ctx)
	return done
}

// commitAtOnce does all that there is to do for a handler that has made no statement.
func (t *firstTx) commitAtOnce(result json.RawMessage) error {
	t.commits = true
	var b pgx.Batch
	recorded := queueCommit(&b, t.job, nil, result)
	commitCtx, cancel := outlast(t.ctx, answerBound)
	defer cancel()
	results, err := t.send(commitCtx, &b)
	switch {
	case err == errAlone:
		if _, err := t.begin(t.ctx); err != nil {
			return err
		}
		return t.tx.commit(t.ctx, t.job, result)
	case err != nil && (t.tx == nil || t.failed):
		return err
	case err != nil:
		return t.tx.committed(err, recorded)
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
// t.err, errAlone, or that of a query.
func (t *firstTx) send(ctx context.Context, b *pgx.Batch) (*firstResults, error) {
	conn, err := t.job.DB.Acquire(charged{ctx, t.ctx})
	if err != nil {
		t.err = fmt.Errorf("%w: %w", ErrNotBegun, err)
		return nil, t.err
	}
	lent := false
	defer func() {
		if !lent {
			conn.Release() // what encodes an argument may have panicked
		}
	}()
	var all pgx.Batch
	all.BeginTx(pgx.TxOptions{IsoLevel: t.job.Isolation})
	all.Queue(beginRun, t.job.ID, t.job.Kind)
	for _, query := range b.QueuedQueries {
		q := *query // pgx writes to those it sends
		all.QueuedQueries = append(all.QueuedQueries, &q)
	}
	batchCtx, cancel := context.WithCancel(ctx)
	defer func() {
		if !lent {
			cancel()
		}
	}()
	bound := time.AfterFunc(answerBound, cancel)
	results := &firstResults{conn.SendBatch(batchCtx, &all), cancel}
	prepared := batchCtx.Err() == nil
	_, err = results.Exec()
	answered := bound.Stop() // beginRun has the server send its answer to BEGIN, however long the query takes
	begun := err == nil
	var xid *string
	if begun {
		err = results.QueryRow().Scan(&xid)
	}
	tx := &jobTx{lentTx: lentTx{results.BatchResults.Tx(), conn}, xid: xid}
	if err == nil {
		lent = true
		t.tx = tx
		return results, nil
	}
	_ = results.Close()
	pg := conn.Conn().PgConn()
	_, said := errors.AsType[*pgconn.PgError](err) // then beginRun has failed: without that it has returned the id
	if begun && !said && pg.IsClosed() {
		lent = true
		t.tx = tx // it has begun, and what has broken it off is the query's error
		cancel()
		return nil, err
	}
	unseen := !pg.IsClosed() && pg.TxStatus() == 'I'
	tx.rollBack()
	if !prepared && ctx.Err() == nil {
		return nil, t.prepareAlone(ctx, err)
	}
	return nil, t.notBegun(ctx, err, unseen, answered)
}

// prepareAlone begins the transaction by itself, after a query was not prepared in time: it
// may wait for a lock, for which it has all the time of its context.
func (t *firstTx) prepareAlone(ctx context.Context, err error) error {
	_, beginErr := t.begin(ctx)
	switch {
	case beginErr == nil:
		return errAlone
	case beginErr == errOtherHolds, beginErr == errIsDone:
		return beginErr
	}
	t.err = fmt.Errorf("%w: %w: %w", beginErr, ErrNoAnswer, err)
	return t.err
}

// notBegun decides what it means that the first round trip has failed: unseen, if it left the
// connection outside of a transaction; answered, if that was in time. It returns what the
// statement gets.
func (t *firstTx) notBegun(ctx context.Context, err error, unseen, answered bool) error {
	e, said := errors.AsType[*pgconn.PgError](err)
	if _, unsent := errors.AsType[pgx.ErrPreprocessingBatch](err); unsent {
		unseen = true // also where pgx has closed the connection, as it does over an argument that it can't encode
	}
	switch {
	case said && e.Code == stateOtherHolds:
		t.err = errOtherHolds
	case said && e.Code == stateIsDone:
		t.err = errIsDone
	case unseen && said: // a query that can't be parsed, by which the server fails the transaction once it has begun
		return errAlone
	case unseen: // one that can't be sent
		if _, err := t.begin(ctx); err != nil {
			return err
		}
		t.failed = true
		return err
	case t.commits && (!said || dbpool.IsAway(err)):
		t.err = fmt.Errorf("commit the job's transaction: %w: %w", ErrNoAnswer, err)
	case !answered && ctx.Err() == nil:
		t.err = fmt.Errorf("%w: %w: %w", ErrNotBegun, ErrNoAnswer, err)
	default:
		t.err = fmt.Errorf("%w: %w", ErrNotBegun, err)
	}
	return t.err
}

// charged is the context of a statement by which the run is charged with the connection,
// whatever context the handler has made up for it.
type charged struct {
	context.Context
	run context.Context
}

func (c charged) Value(key any) any {
	if value := c.Context.Value(key); value != nil {
		return value
	}
	return c.run.Value(key)
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

// LargeObjects return an error if the transaction can't begin; t.err has the reason.
func (t *firstTx) LargeObjects() pgx.LargeObjects {
	tx, err := t.begin(t.ctx)
	if err != nil {
		return closedTx().LargeObjects()
	}
	return tx.LargeObjects()
}

// Conn is nil if the transaction can't begin, or is over; t.err has the reason.
func (t *firstTx) Conn() *pgx.Conn {
	tx, err := t.begin(t.ctx)
	switch {
	case t.failed: // nothing of it will be committed
		return t.tx.Conn()
	case err != nil:
		return nil
	}
	return tx.Conn()
}

func (t *firstTx) Exec(ctx context.Context, sql string, args ...any) (pgconn.CommandTag, error) {
	if t.isFirst() && canFollow(args) && len(args) > 0 { // without arguments it may be several statements
		results, err := t.sendOne(ctx, sql, args)
		if err == nil {
			tag, err := results.Exec()
			return tag, cmp.Or(err, results.Close())
		}
		if err != errAlone {
			return pgconn.CommandTag{}, err
		}
	}
	tx, err := t.begin(ctx)
	if err != nil {
		return pgconn.CommandTag{}, err
	}
	return tx.Exec(ctx, sql, args...)
}

func (t *firstTx) Query(ctx context.Context, sql string, args ...any) (pgx.Rows, error) {
	if t.isFirst() && canFollow(args) {
		results, err := t.sendOne(ctx, sql, args)
		if err == nil {
			rows, err := results.Query()
			if err != nil {
				_ = results.Close()
				return rows, err
			}
			return &firstRows{Rows: rows, results: results}, nil
		}
		if err != errAlone {
			return pgx.FailedBatchResults(&pgx.Batch{}, err).Query()
		}
	}
	tx, err := t.begin(ctx)
	if err != nil {
		return pgx.FailedBatchResults(&pgx.Batch{}, err).Query()
	}
	return tx.Query(ctx, sql, args...)
}

func (t *firstTx) QueryRow(ctx context.Context, sql string, args ...any) pgx.Row {
	if t.isFirst() && canFollow(args) {
		results, err := t.sendOne(ctx, sql, args)
		if err == nil {
			return firstRow{results.QueryRow(), results}
		}
		if err != errAlone {
			return pgx.FailedBatchResults(&pgx.Batch{}, err).QueryRow()
		}
	}
	tx, err := t.begin(ctx)
	if err != nil {
		return pgx.FailedBatchResults(&pgx.Batch{}, err).QueryRow()
	}
	return tx.QueryRow(ctx, sql, args...)
}

func (t *firstTx) SendBatch(ctx context.Context, b *pgx.Batch) pgx.BatchResults {
	begins := pgx.FailedBatchResults(b, nil).Tx() != nil // which a transaction doesn't take
	if t.isFirst() && b.Len() > 0 && !begins {
		results, err := t.send(ctx, b)
		if err == nil {
			return results
		}
		if err != errAlone {
			return pgx.FailedBatchResults(b, err)
		}
	}
	tx, err := t.begin(ctx)
	if err != nil {
		return pgx.FailedBatchResults(b, err)
	}
	return tx.SendBatch(ctx, b)
}

// sendOne is send for one query, whose error doesn't speak of a batch.
func (t *firstTx) sendOne(ctx context.Context, sql string, args []any) (*firstResults, error) {
	var b pgx.Batch
	b.Queue(sql, args...)
	results, err := t.send(ctx, &b)
	if e, ok := errors.AsType[pgx.ErrPreprocessingBatch](err); ok && t.failed {
		err = e.Unwrap()
	}
	return results, err
}

// canFollow reports whether a statement with these arguments can be sent behind others. Those
// that have an option of pgx's own can't; one that rewrites the statement is none.
func canFollow(args []any) bool {
	for _, arg := range args {
		switch arg.(type) {
		case pgx.QueryExecMode, pgx.QueryResultFormats, pgx.QueryResultFormatsByOID:
			return false
		case pgx.QueryRewriter:
		default:
			return true
		}
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
