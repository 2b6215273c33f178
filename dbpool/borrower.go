package dbpool

import (
	"context"
	"maps"
	"sync"
	"time"
)

// Borrower is one user of the pool, such as a job: what it takes from the pool
// is charged to it.
type Borrower struct {
	name string
	pool *Pool

	mu    sync.Mutex // guards what follows
	holds map[*member]uint64
	usage Usage
}

// Usage is what a borrower did to the pool.
type Usage struct {
	// Acquires counts the connections taken, Queries the statements sent.
	Acquires, Queries int
	// Wait is the time spent acquiring, Held the time connections were held.
	Wait, Held time.Duration
	// Leaked counts the connections that [Borrower.End] had to take back.
	Leaked int
	// Died counts the connections that broke, or that their server gave up, while
	// they were lent.
	Died int
}

type borrowerKey struct{}

// Track returns a context with which acquires are charged to a borrower of this
// name. The name shows in leak reports and timeout errors. [Borrower.End] must
// be called.
func (p *Pool) Track(ctx context.Context, name string) (context.Context, *Borrower) {
	b := &Borrower{name: name, pool: p}
	return context.WithValue(ctx, borrowerKey{}, b), b
}

// String is the borrower's name, "" for a nil Borrower.
func (b *Borrower) String() string {
	if b == nil {
		return ""
	}
	return b.name
}

func (b *Borrower) took(m *member, wait time.Duration) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.holds == nil {
		b.holds = make(map[*member]uint64, 1)
	}
	b.holds[m] = m.loan.Load()
	b.usage.Acquires++
	b.usage.Wait += wait
}

// waitedInVain charges the time of an acquire that failed.
func (b *Borrower) waitedInVain(wait time.Duration) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.usage.Wait += wait
}

func (b *Borrower) gave(m *member, held time.Duration) {
	b.mu.Lock()
	defer b.mu.Unlock()
	delete(b.holds, m)
	b.usage.Held += held
	b.usage.Queries += m.queries
}

func (b *Borrower) lost() {
	if b == nil {
		return
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.usage.Died++
}

// rollBack ends the open transaction. A pgx.Tx that is still around then says
// that it is closed.
func (m *member) rollBack() {
	ctx, cancel := context.WithTimeout(context.Background(), rollbackBound)
	defer cancel()
	if m.tx != nil && m.tx.Rollback(ctx) == nil {
		return
	}
	if _, err := m.conn.Exec(ctx, "ROLLBACK"); err != nil {
		m.broken = true
	}
}

// rollbackBound is how long rolling back a forgotten transaction may take.
const rollbackBound = 5 * time.Second

// End takes back what the borrower did not give back, logs it, and returns what
// the borrower did to the pool. An open transaction is rolled back; a connection
// on which rows were left open is closed. The borrower's code must have ended.
func (b *Borrower) End() Usage {
	b.mu.Lock()
	left := maps.Clone(b.holds)
	b.mu.Unlock()
	for m, loan := range left {
		if !m.loan.CompareAndSwap(loan, 0) {
			continue // given back meanwhile
		}
		b.mu.Lock()
		b.usage.Leaked++
		b.mu.Unlock()
		pg := m.conn.PgConn()
		m.rowsOpen.Store(pg.IsBusy())
		transaction := pg.TxStatus() != 'I'
		b.pool.mu.Lock()
		attrs := append(m.holder(time.Now()), "open_transaction", transaction)
		b.pool.mu.Unlock()
		b.pool.log.Warn("a connection was not given back; it is taken back", attrs...)
		if transaction && !pg.IsBusy() && !pg.IsClosed() {
			queries := m.queries
			m.rollBack()
			m.queries = queries
		}
		m.rowsOpen.Store(false)
		b.pool.giveBack(m, closedLeaked)
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.usage
}
