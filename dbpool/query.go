package dbpool

import (
	"context"
	"fmt"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgtype"
)

// Exec runs a statement, as [pgx.Conn.Exec] does.
func (c *Conn) Exec(ctx context.Context, sql string, args ...any) (pgconn.CommandTag, error) {
	conn, err := c.lent()
	if err != nil {
		return pgconn.CommandTag{}, err
	}
	return conn.Exec(ctx, sql, args...)
}

// Query runs a statement that returns rows, as [pgx.Conn.Query] does. The rows must
// be closed, which reading them to their end does, before the connection is used
// for anything else.
func (c *Conn) Query(ctx context.Context, sql string, args ...any) (pgx.Rows, error) {
	conn, err := c.lent()
	if err != nil {
		return failedRows{err: err}, err
	}
	r, err := conn.Query(ctx, sql, args...)
	if err != nil {
		return r, err
	}
	return &rows{Rows: r, open: c.openResults()}, nil
}

// QueryRow runs a statement that returns one row, as [pgx.Conn.QueryRow] does. Scan
// must be called; an error of the statement is Scan's.
func (c *Conn) QueryRow(ctx context.Context, sql string, args ...any) pgx.Row {
	conn, err := c.lent()
	if err != nil {
		return failedRows{err: err}
	}
	return &row{conn.QueryRow(ctx, sql, args...), c.openResults()}
}

// SendBatch sends several statements at once, as [pgx.Conn.SendBatch] does. The
// results must be closed before the connection is used for anything else.
func (c *Conn) SendBatch(ctx context.Context, b *pgx.Batch) pgx.BatchResults {
	conn, err := c.lent()
	if err != nil {
		return pgx.FailedBatchResults(b, err)
	}
	results := conn.SendBatch(ctx, b)
	if begun := results.Tx(); begun != nil {
		c.conn.tx = begun
	}
	return &batch{results, c.openResults()}
}

// CopyFrom copies rows into a table and returns their number, as
// [pgx.Conn.CopyFrom] does.
func (c *Conn) CopyFrom(ctx context.Context, table pgx.Identifier, columns []string, src pgx.CopyFromSource) (int64, error) {
	conn, err := c.lent()
	if err != nil {
		return 0, err
	}
	return conn.CopyFrom(ctx, table, columns, src)
}

// Begin begins a transaction, as [pgx.Conn.Begin] does. Its end does not release the
// connection.
func (c *Conn) Begin(ctx context.Context) (pgx.Tx, error) { return c.BeginTx(ctx, pgx.TxOptions{}) }

// BeginTx begins a transaction with options, as [pgx.Conn.BeginTx] does. Its end
// does not release the connection.
func (c *Conn) BeginTx(ctx context.Context, opts pgx.TxOptions) (pgx.Tx, error) {
	conn, err := c.lent()
	if err != nil {
		return nil, err
	}
	t, err := conn.BeginTx(ctx, opts)
	c.conn.tx = t
	return t, err
}

// Ping acquires a connection and asks the server for an answer, whether or not the
// connection was checked before its loan.
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

// Exec runs a statement on a connection of its own, as [pgx.Conn.Exec] does.
func (p *Pool) Exec(ctx context.Context, sql string, args ...any) (pgconn.CommandTag, error) {
	var c Conn
	if err := p.acquire(ctx, &c); err != nil {
		return pgconn.CommandTag{}, err
	}
	defer c.Release()
	return c.Exec(ctx, sql, args...)
}

// Query runs a statement that returns rows on a connection of its own, as
// [pgx.Conn.Query] does. The connection is released when the rows are closed, which
// reading them to their end does.
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

// QueryRow runs a statement that returns one row on a connection of its own, as
// [pgx.Conn.QueryRow] does. Scan must be called: it returns the error, that of
// acquiring included, and releases the connection.
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

// SendBatch sends several statements at once on a connection of its own, as
// [pgx.Conn.SendBatch] does. The results must be closed, which releases the
// connection. If the batch begins a transaction, that one's end releases it.
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

// CopyFrom copies rows into a table on a connection of its own, and returns their
// number, as [pgx.Conn.CopyFrom] does.
func (p *Pool) CopyFrom(ctx context.Context, table pgx.Identifier, columns []string, src pgx.CopyFromSource) (int64, error) {
	c, err := p.Acquire(ctx)
	if err != nil {
		return 0, err
	}
	defer c.Release()
	return c.CopyFrom(ctx, table, columns, src)
}

// Begin begins a transaction on a connection of its own, which is released when the
// transaction ends. [pgx.BeginFunc] on a Pool commits or rolls back by itself.
func (p *Pool) Begin(ctx context.Context) (pgx.Tx, error) { return p.BeginTx(ctx, pgx.TxOptions{}) }

// BeginTx begins a transaction as [Pool.Begin] does, with options such as the
// isolation level.
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

// tx is a transaction that releases its connection when it ends.
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

// openResults are rows, a row or the results of a batch that were not closed yet. A
// connection that has some can't be lent again.
type openResults struct {
	conn    *Conn
	release bool // the connection was acquired for them alone
}

func (c *Conn) openResults() openResults {
	c.conn.rowsOpen.Store(true)
	return openResults{conn: c}
}

// closed notes that they were closed, and releases the connection if it was
// acquired for them alone.
func (r openResults) closed() {
	if r.conn.conn.loan.Load() != r.conn.loan {
		return // the loan has ended
	}
	r.conn.conn.rowsOpen.Store(false)
	if r.release {
		r.conn.Release()
	}
}

// rows are rows that note when they are closed.
type rows struct {
	pgx.Rows
	open openResults
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

// row is a row that notes when it is scanned, which closes it.
type row struct {
	pgx.Row
	open openResults
}

func (r *row) Scan(dest ...any) error {
	defer r.open.closed() // deferred, because a Scanner may panic
	return r.Row.Scan(dest...)
}

// batch is a batch's results that note when they are closed.
type batch struct {
	pgx.BatchResults
	open openResults
}

func (b *batch) Close() error {
	err := b.BatchResults.Close()
	b.open.closed()
	return err
}

// txBatch is the results of a batch that has begun a transaction. It leaves the
// connection to that, which releases it.
type txBatch struct {
	pgx.BatchResults
	tx *tx
}

func (b *txBatch) Tx() pgx.Tx { return b.tx }

// failedRows are the rows, or the row, of a statement that was not sent, because no
// connection was acquired or it was released before. They have the reason.
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
