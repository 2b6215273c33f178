package dbpool

import (
	"context"
	"errors"
	"fmt"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgtype"
)

// ErrReleased is returned by a [Conn] that was given back.
var ErrReleased = errors.New("dbpool: the connection was given back")

// Conn is a lent connection. Like a pgx.Conn it is for one goroutine at a time.
type Conn struct {
	member *member
	loan   uint64
}

// Release gives the connection back. Releasing twice is safe. A connection that
// broke, or has an open transaction or open rows, is closed.
func (c *Conn) Release() {
	if c.member.loan.CompareAndSwap(c.loan, 0) {
		c.member.pool.giveBack(c.member, closedUnfit)
	}
}

func (c *Conn) conn() (*pgx.Conn, error) {
	if c.member.loan.Load() != c.loan {
		return nil, ErrReleased
	}
	return c.member.conn, nil
}

// Conn returns the connection itself, for what this type doesn't have. It must
// not be used after Release. It is nil if Release was called.
func (c *Conn) Conn() *pgx.Conn {
	conn, err := c.conn()
	if err != nil {
		return nil
	}
	return conn
}

// Exec is [pgx.Conn.Exec].
func (c *Conn) Exec(ctx context.Context, sql string, args ...any) (pgconn.CommandTag, error) {
	conn, err := c.conn()
	if err != nil {
		return pgconn.CommandTag{}, err
	}
	return conn.Exec(ctx, sql, args...)
}

// Query is [pgx.Conn.Query].
func (c *Conn) Query(ctx context.Context, sql string, args ...any) (pgx.Rows, error) {
	conn, err := c.conn()
	if err != nil {
		return failedRows{err: err}, err
	}
	r, err := conn.Query(ctx, sql, args...)
	if err != nil {
		return r, err
	}
	return &rows{Rows: r, open: c.open()}, nil
}

// QueryRow is [pgx.Conn.QueryRow].
func (c *Conn) QueryRow(ctx context.Context, sql string, args ...any) pgx.Row {
	conn, err := c.conn()
	if err != nil {
		return failedRows{err: err}
	}
	return &row{conn.QueryRow(ctx, sql, args...), c.open()}
}

// SendBatch is [pgx.Conn.SendBatch].
func (c *Conn) SendBatch(ctx context.Context, b *pgx.Batch) pgx.BatchResults {
	conn, err := c.conn()
	if err != nil {
		return pgx.FailedBatchResults(b, err)
	}
	results := conn.SendBatch(ctx, b)
	if begun := results.Tx(); begun != nil {
		c.member.tx = begun
	}
	return &batch{results, c.open()}
}

// CopyFrom is [pgx.Conn.CopyFrom].
func (c *Conn) CopyFrom(ctx context.Context, table pgx.Identifier, columns []string, src pgx.CopyFromSource) (int64, error) {
	conn, err := c.conn()
	if err != nil {
		return 0, err
	}
	return conn.CopyFrom(ctx, table, columns, src)
}

// Begin is [pgx.Conn.Begin].
func (c *Conn) Begin(ctx context.Context) (pgx.Tx, error) { return c.BeginTx(ctx, pgx.TxOptions{}) }

// BeginTx is [pgx.Conn.BeginTx].
func (c *Conn) BeginTx(ctx context.Context, opts pgx.TxOptions) (pgx.Tx, error) {
	conn, err := c.conn()
	if err != nil {
		return nil, err
	}
	t, err := conn.BeginTx(ctx, opts)
	c.member.tx = t
	return t, err
}

// Ping acquires a connection and asks the server for an answer.
func (p *Pool) Ping(ctx context.Context) error {
	c, err := p.Acquire(ctx)
	if err != nil {
		return err
	}
	defer c.Release()
	if err := c.Conn().Ping(ctx); err != nil {
		return fmt.Errorf("dbpool: ping: %w", err)
	}
	return nil
}

// Exec acquires a connection for one [pgx.Conn.Exec].
func (p *Pool) Exec(ctx context.Context, sql string, args ...any) (pgconn.CommandTag, error) {
	var c Conn
	if err := p.acquire(ctx, &c); err != nil {
		return pgconn.CommandTag{}, err
	}
	defer c.Release()
	return c.Exec(ctx, sql, args...)
}

// Query acquires a connection for one [pgx.Conn.Query]. It is given back when
// the rows are closed, which reading them to their end does.
func (p *Pool) Query(ctx context.Context, sql string, args ...any) (pgx.Rows, error) {
	c, err := p.Acquire(ctx)
	if err != nil {
		return failedRows{err: err}, err
	}
	r, err := c.Query(ctx, sql, args...)
	if err != nil {
		c.Release()
		return failedRows{err: err}, err
	}
	r.(*rows).open.release = true
	return r, nil
}

// QueryRow acquires a connection for one [pgx.Conn.QueryRow]. It is given back by
// Scan, which must be called; acquire's error is Scan's too.
func (p *Pool) QueryRow(ctx context.Context, sql string, args ...any) pgx.Row {
	c, err := p.Acquire(ctx)
	if err != nil {
		return failedRows{err: err}
	}
	r := c.QueryRow(ctx, sql, args...)
	if r, ok := r.(*row); ok {
		r.open.release = true
	}
	return r
}

// SendBatch acquires a connection for one [pgx.Conn.SendBatch]. It is given back
// when the results are closed, which must be done; if the batch begins a
// transaction, when that ends.
func (p *Pool) SendBatch(ctx context.Context, b *pgx.Batch) pgx.BatchResults {
	c, err := p.Acquire(ctx)
	if err != nil {
		return pgx.FailedBatchResults(b, err)
	}
	results := c.SendBatch(ctx, b)
	if begun := results.Tx(); begun != nil {
		return &txBatch{results, &tx{begun, c}}
	}
	if r, ok := results.(*batch); ok {
		r.open.release = true
	}
	return results
}

// CopyFrom acquires a connection for one [pgx.Conn.CopyFrom].
func (p *Pool) CopyFrom(ctx context.Context, table pgx.Identifier, columns []string, src pgx.CopyFromSource) (int64, error) {
	c, err := p.Acquire(ctx)
	if err != nil {
		return 0, err
	}
	defer c.Release()
	return c.CopyFrom(ctx, table, columns, src)
}

// Begin acquires a connection and begins a transaction, which gives it back when
// it ends.
func (p *Pool) Begin(ctx context.Context) (pgx.Tx, error) { return p.BeginTx(ctx, pgx.TxOptions{}) }

// BeginTx is [Pool.Begin] with options.
func (p *Pool) BeginTx(ctx context.Context, opts pgx.TxOptions) (pgx.Tx, error) {
	c, err := p.Acquire(ctx)
	if err != nil {
		return nil, err
	}
	t, err := c.BeginTx(ctx, opts)
	if err != nil {
		c.Release()
		return nil, err
	}
	return &tx{t, c}, nil
}

// tx gives its connection back when it ends.
type tx struct {
	pgx.Tx
	conn *Conn
}

func (t *tx) Commit(ctx context.Context) error {
	err := t.Tx.Commit(ctx)
	t.conn.Release()
	return err
}

func (t *tx) Rollback(ctx context.Context) error {
	err := t.Tx.Rollback(ctx)
	t.conn.Release()
	return err
}

// results are rows, a row or a batch's results that are not closed yet.
type results struct {
	conn    *Conn
	release bool // the connection was acquired for them
}

func (c *Conn) open() results {
	c.member.rowsOpen.Store(true)
	return results{conn: c}
}

// closed notes that they are closed, and gives the connection back if it was
// acquired for them.
func (r results) closed() {
	if r.conn.member.loan.Load() != r.conn.loan {
		return // it is somebody else's by now
	}
	r.conn.member.rowsOpen.Store(false)
	if r.release {
		r.conn.Release()
	}
}

type rows struct {
	pgx.Rows
	open results
}

func (r *rows) Close() {
	r.Rows.Close()
	r.open.closed()
}

func (r *rows) Next() bool {
	if r.Rows.Next() {
		return true
	}
	r.Close()
	return false
}

func (r *rows) Scan(dest ...any) error {
	err := r.Rows.Scan(dest...)
	if err != nil {
		r.Close()
	}
	return err
}

func (r *rows) Values() ([]any, error) {
	values, err := r.Rows.Values()
	if err != nil {
		r.Close()
	}
	return values, err
}

type row struct {
	pgx.Row
	open results
}

func (r *row) Scan(dest ...any) error {
	defer r.open.closed() // also when a Scanner panics
	return r.Row.Scan(dest...)
}

type batch struct {
	pgx.BatchResults
	open results
}

func (b *batch) Close() error {
	err := b.BatchResults.Close()
	b.open.closed()
	return err
}

// txBatch leaves the connection to the transaction that the batch has begun.
type txBatch struct {
	pgx.BatchResults
	tx *tx
}

func (b *txBatch) Tx() pgx.Tx { return b.tx }

// failedRows are what there is when no connection could be acquired.
type failedRows struct {
	pgx.Rows
	err error
}

func (failedRows) Close()                                       {}
func (r failedRows) Err() error                                 { return r.err }
func (failedRows) CommandTag() pgconn.CommandTag                { return pgconn.CommandTag{} }
func (failedRows) FieldDescriptions() []pgconn.FieldDescription { return nil }
func (failedRows) Next() bool                                   { return false }
func (r failedRows) Scan(...any) error                          { return r.err }
func (r failedRows) Values() ([]any, error)                     { return nil, r.err }
func (failedRows) RawValues() [][]byte                          { return nil }
func (failedRows) Conn() *pgx.Conn                              { return nil }
func (failedRows) TypeMap() *pgtype.Map                         { return nil }
