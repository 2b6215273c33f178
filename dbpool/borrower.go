package dbpool

import (
	"context"
	"maps"
	"sync"
	"time"
)

// Borrower is one user of the pool, such as a job. It is made by [Pool.Track], is
// charged with what is done under its context, and ends with [Borrower.End]. It is
// safe for concurrent use, but for End.
type Borrower struct {
	name string
	pool *Pool

	mu    sync.Mutex // guards what follows
	loans map[*conn]uint64
	usage Usage
}

// Usage is what a borrower did to the pool. It is returned by [Borrower.End].
type Usage struct {
	// Acquires counts the connections acquired.
	Acquires int
	// Queries counts the statements sent, those of batches and BEGIN and COMMIT
	// included.
	Queries int
	// Wait is the time spent in acquiring, whether it succeeded or failed.
	Wait time.Duration
	// Held is the time for which connections were held, added up.
	Held time.Duration
	// Leaked counts the connections that End had to take back.
	Leaked int
	// Died counts the connections that broke, or that their server gave up, while
	// the borrower held them.
	Died int
}

type borrowerKey struct{}

// Track returns a borrower and a context that charges it with every connection
// acquired under it. The name shows in leak reports and in a [TimeoutError]; it
// need not be unique. [Borrower.End] must be called.
func (p *Pool) Track(ctx context.Context, name string) (context.Context, *Borrower) {
	b := &Borrower{name: name, pool: p}
	return context.WithValue(ctx, borrowerKey{}, b), b
}

// String returns the borrower's name, "" for a nil Borrower.
func (b *Borrower) String() string {
	if b == nil {
		return ""
	}
	return b.name
}

func (b *Borrower) addLoan(c *conn, wait time.Duration) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.loans == nil {
		b.loans = make(map[*conn]uint64, 1)
	}
	b.loans[c] = c.loan.Load()
	b.usage.Acquires++
	b.usage.Wait += wait
}

func (b *Borrower) endLoan(c *conn, held time.Duration) {
	b.mu.Lock()
	defer b.mu.Unlock()
	delete(b.loans, c)
	b.usage.Held += held
	b.usage.Queries += c.queries
}

// addWait charges the borrower with the time of an acquire that failed.
func (b *Borrower) addWait(wait time.Duration) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.usage.Wait += wait
}

// addDeath charges the borrower, nil for none, with a connection that broke.
func (b *Borrower) addDeath() {
	if b == nil {
		return
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.usage.Died++
}

// End takes back the connections that the borrower still holds, logs each with the
// stack that acquired it, and returns what the borrower did to the pool. It rolls
// back an open transaction; it closes a connection on which rows were left open.
// The borrower's code must have ended, because it would find the connections
// released.
func (b *Borrower) End() Usage {
	b.mu.Lock()
	left := maps.Clone(b.loans)
	b.mu.Unlock()
	for c, loan := range left {
		if !c.loan.CompareAndSwap(loan, 0) {
			continue // released meanwhile
		}
		b.mu.Lock()
		b.usage.Leaked++
		b.mu.Unlock()
		pg := c.pgx.PgConn()
		c.rowsOpen.Store(pg.IsBusy())
		transaction := pg.TxStatus() != 'I'
		b.pool.mu.Lock()
		attrs := append(c.holderAttrs(time.Now()), "open_transaction", transaction)
		b.pool.mu.Unlock()
		b.pool.log.Warn("a connection was not given back; it is taken back", attrs...)
		if transaction && !pg.IsBusy() && !pg.IsClosed() {
			queries := c.queries
			c.rollBack()
			c.queries = queries // without the ROLLBACK, because that is the pool's
		}
		c.rowsOpen.Store(false)
		b.pool.release(c, closedLeaked)
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.usage
}
