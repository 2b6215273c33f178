package delivery

import (
	"context"
	"errors"
	"log/slog"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/carpool-go/carpool/dbpool"
	"github.com/carpool-go/carpool/internal/wait"
)

// Breaker is the circuit breaker of the database: while that is away it is open, the
// slots of this process keep the jobs they have, and these go on the moment a probe
// finds the database back.
//
// One slot stays free for jobs that need no database. A job that would wait with
// the last slot is handed back to Redis instead, for a few seconds.
type Breaker struct {
	db    *dbpool.Pool
	slots int
	log   *slog.Logger

	mu      sync.Mutex    // guards what follows
	away    chan struct{} // is closed when the database is back; nil while it is there
	waiting int
	outages map[string]int // by job: outages in a row while it ran
	blocked error          // why jobs can't begin; nil if none is known
	warned  time.Time      // when that was logged last

	probing sync.WaitGroup
	ctx     context.Context // of the probe
	cancel  context.CancelFunc
}

const (
	probeEvery = 250 * time.Millisecond
	probeBound = 2 * time.Second
	// lastSlotWait is how long a job keeps the last slot before it gives it back.
	// It bounds how fast jobs are fetched only to be handed back.
	lastSlotWait = 100 * time.Millisecond
)

// errLastSlot is why a job does not wait for the database.
var errLastSlot = errors.New("every other slot waits for the database too")

func newBreaker(db *dbpool.Pool, slots int, log *slog.Logger) *Breaker {
	b := &Breaker{db: db, slots: slots, log: log}
	b.ctx, b.cancel = context.WithCancel(context.Background())
	return b
}

// Start does nothing: the breaker probes once it is open.
func (b *Breaker) Start() error { return nil }

// open opens the breaker for an error that says that the database is away.
func (b *Breaker) open(err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.away != nil || b.ctx.Err() != nil {
		return
	}
	b.away = make(chan struct{})
	b.log.Warn("the database is away; jobs that need it wait", "error", err)
	b.probing.Go(b.probe)
}

// IsOpen reports whether jobs wait for the database.
func (b *Breaker) IsOpen() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.away != nil
}

// wait returns nil at once while the database is there, and else when it is back.
// It returns errLastSlot if the job must give its slot back, and the context's cause
// when that is done.
func (b *Breaker) wait(ctx context.Context) error {
	b.mu.Lock()
	back := b.away
	if back == nil {
		b.mu.Unlock()
		return nil
	}
	last := b.waiting >= b.slots-1
	b.waiting++
	b.mu.Unlock()
	defer func() {
		b.mu.Lock()
		b.waiting--
		b.mu.Unlock()
	}()
	var giveUp <-chan time.Time
	if last {
		giveUp = time.After(lastSlotWait)
	}
	select {
	case <-back:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-giveUp:
		return errLastSlot
	}
}

// maxCounted bounds of how many jobs outages are counted.
const maxCounted = 10_000

// countOutage counts an outage that came while a job ran, and returns how many have in a
// row.
func (b *Breaker) countOutage(id string) int {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.outages == nil || len(b.outages) >= maxCounted {
		b.outages = make(map[string]int)
	}
	b.outages[id]++
	return b.outages[id]
}

// clearOutages forgets the outages of a job that has ended in another way.
func (b *Breaker) clearOutages(id string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	delete(b.outages, id)
}

// blockedAgain is how often it is logged that jobs can't begin.
const blockedAgain = time.Minute

// block notes why jobs can't begin although the database answers, such as a missing
// privilege, and logs it now and then.
func (b *Breaker) block(err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.blocked = err
	if time.Since(b.warned) < blockedAgain {
		return
	}
	b.warned = time.Now()
	b.log.Warn("transactional jobs can't begin, and wait; the worker's role needs the rights on schema carpool, and the database carpool's tables: run the command migrate", "error", err)
}

// unblock notes that a transactional job has ended well.
func (b *Breaker) unblock() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.blocked, b.warned = nil, time.Time{}
}

// Blocked is why jobs can't begin although the database answers; "" if nothing is known
// of it.
func (b *Breaker) Blocked() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.blocked == nil {
		return ""
	}
	return b.blocked.Error()
}

// probe asks the database until it answers, and takes writes: a failover leads
// through a server that doesn't.
func (b *Breaker) probe() {
	since := time.Now()
	for b.ctx.Err() == nil {
		if b.answers(b.ctx) == nil {
			b.mu.Lock()
			b.log.Info("the database is back", "away_for", time.Since(since).Round(time.Millisecond).String(), "jobs_waiting", b.waiting)
			close(b.away)
			b.away = nil
			b.mu.Unlock()
			return
		}
		_ = wait.For(b.ctx, probeEvery/2+rand.N(probeEvery))
	}
}

// errNoWrites is why a database that answers is of no use.
var errNoWrites = errors.New("it takes no writes")

// fullPatience is how long [Breaker.Check] waits for a connection when jobs have them all.
const fullPatience = 500 * time.Millisecond

// Check reports how the database is: fault is "" if jobs can use it, and else says in words
// without a name or an address what is wrong with it, of which err tells more. It takes a
// connection for the time of one answer. When jobs have them all it waits in line for a
// moment, and then takes the database for well: jobs that hold connections for long and a
// server that has fallen silent can't be told apart, until the jobs' statements fail and
// open the breaker.
func (b *Breaker) Check(ctx context.Context) (fault string, err error) {
	b.mu.Lock()
	away, blocked := b.away != nil, b.blocked
	b.mu.Unlock()
	switch {
	case away:
		return "it is away; jobs that need it wait", nil
	case blocked != nil:
		return "it answers, but transactional jobs can't begin; the log says why", blocked
	}
	full := b.allLent()
	if full {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, fullPatience)
		defer cancel()
	}
	switch err := b.answers(ctx); {
	case err == nil || full && b.allLent():
		return "", nil
	case errors.Is(err, errNoWrites):
		return "it answers, but " + errNoWrites.Error(), nil
	default:
		return "it does not answer; the log says why", err
	}
}

// allLent reports whether jobs have all the connections that the pool may open.
func (b *Breaker) allLent() bool {
	cfg := b.db.Config()
	return b.db.Stats().CheckedOut >= cfg.Size+cfg.MaxOverflow
}

// answers returns nil if the database answers, in a short time, that it takes
// writes.
func (b *Breaker) answers(ctx context.Context) error {
	ctx, cancel := context.WithTimeoutCause(ctx, probeBound, errors.New("no answer within "+probeBound.String()))
	defer cancel()
	var readOnly bool
	err := b.db.QueryRow(ctx, "SELECT current_setting('transaction_read_only')::bool").Scan(&readOnly)
	if err == nil && readOnly {
		return errNoWrites
	}
	return err
}

// Stop ends the probe. Jobs that wait are released by their contexts.
func (b *Breaker) Stop() {
	b.mu.Lock()
	b.cancel() // under the lock, so that no probe begins after it
	b.mu.Unlock()
	b.probing.Wait()
}
