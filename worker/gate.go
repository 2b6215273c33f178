package main

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

// gate is where jobs wait while the database is away: the hands of this process
// hold what they have, and go on the moment a probe finds it back.
//
// One hand stays free for jobs that need no database. A job that would wait with
// the last hand is handed back to Redis instead, for a few seconds.
type gate struct {
	db    *dbpool.Pool
	hands int
	log   *slog.Logger

	mu      sync.Mutex    // guards what follows
	away    chan struct{} // closed when the database is back; nil while it is there
	waiting int
	blamed  map[string]int // by job: outages in a row while it ran
	stopped bool

	probing sync.WaitGroup
	ctx     context.Context // of the probe
	cancel  context.CancelFunc
}

const (
	probeEvery = 250 * time.Millisecond
	probeBound = 2 * time.Second
	// lastHandWait is how long a job keeps the last hand before it gives it back.
	// It bounds how fast jobs are fetched only to be handed back.
	lastHandWait = 100 * time.Millisecond
)

// errLastHand is why a job does not wait at the gate.
var errLastHand = errors.New("every other hand waits for the database too")

func newGate(db *dbpool.Pool, hands int, log *slog.Logger) *gate {
	g := &gate{db: db, hands: hands, log: log}
	g.ctx, g.cancel = context.WithCancel(context.Background())
	return g
}

// shut is told of an error that says that the database is away.
func (g *gate) shut(err error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.away != nil || g.stopped {
		return
	}
	g.away = make(chan struct{})
	g.log.Warn("the database is away; jobs that need it wait", "error", err)
	g.probing.Go(g.probe)
}

// isShut reports whether jobs wait for the database.
func (g *gate) isShut() bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.away != nil
}

// wait returns nil at once while the database is there, and else when it is back.
// It returns errLastHand if the job must give its hand back, and the context's cause
// when that is done.
func (g *gate) wait(ctx context.Context) error {
	g.mu.Lock()
	back := g.away
	if back == nil {
		g.mu.Unlock()
		return nil
	}
	last := g.waiting >= g.hands-1
	g.waiting++
	g.mu.Unlock()
	defer func() {
		g.mu.Lock()
		g.waiting--
		g.mu.Unlock()
	}()
	var handBack <-chan time.Time
	if last {
		handBack = time.After(lastHandWait)
	}
	select {
	case <-back:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-handBack:
		return errLastHand
	}
}

// maxBlamed bounds what is remembered.
const maxBlamed = 10_000

// blame counts the outages in a row that came while a job ran.
func (g *gate) blame(id string) int {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.blamed == nil || len(g.blamed) >= maxBlamed {
		g.blamed = make(map[string]int)
	}
	g.blamed[id]++
	return g.blamed[id]
}

// forgive forgets them, when the job has ended in another way.
func (g *gate) forgive(id string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	delete(g.blamed, id)
}

// probe asks the database until it answers, and takes writes: a failover leads
// through a server that doesn't.
func (g *gate) probe() {
	since := time.Now()
	for g.ctx.Err() == nil {
		if g.answers(g.ctx) == nil {
			g.mu.Lock()
			g.log.Info("the database is back", "away_for", time.Since(since).Round(time.Millisecond).String(), "jobs_waiting", g.waiting)
			close(g.away)
			g.away = nil
			g.mu.Unlock()
			return
		}
		_ = wait.For(g.ctx, probeEvery/2+rand.N(probeEvery))
	}
}

// answers returns nil if the database answers, in a short time, that it takes
// writes.
func (g *gate) answers(ctx context.Context) error {
	ctx, cancel := context.WithTimeoutCause(ctx, probeBound, errors.New("no answer within "+probeBound.String()))
	defer cancel()
	var readOnly bool
	err := g.db.QueryRow(ctx, "SELECT current_setting('transaction_read_only')::bool").Scan(&readOnly)
	if err == nil && readOnly {
		return errors.New("it takes no writes")
	}
	return err
}

// stop ends the probe. Who waits is released by their contexts.
func (g *gate) stop() {
	g.mu.Lock()
	g.stopped = true
	g.mu.Unlock()
	g.cancel()
	g.probing.Wait()
}
