package dbpool_test

import (
	"context"
	"errors"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/carpool-go/carpool/dbpool"
	"github.com/carpool-go/carpool/internal/testservers"
)

// faults numbers the faults of a storm, so that a failure can be told from one
// that the pool could have spared its caller.
type faults struct{ begun, ended atomic.Int64 }

// calm returns a function that reports whether no fault has struck since.
func (f *faults) calm() func() bool {
	ended, begun := f.ended.Load(), f.begun.Load()
	return func() bool { return begun == ended && f.begun.Load() == begun }
}

func (f *faults) strike(do func()) {
	f.begun.Add(1)
	do()
	f.ended.Add(1)
}

func TestPool_NoJobSuffersFromAFaultThatWasOverBeforeIt(t *testing.T) {
	t.Parallel()
	const callers, rounds = 12, 150
	databaseURL := testservers.Postgres(t)
	direct, err := pgx.Connect(t.Context(), databaseURL)
	if err != nil {
		t.Fatal(err)
	}
	defer direct.Close(context.Background())
	proxied, proxy := testservers.ThroughProxy(t, databaseURL)
	p := openOn(t, proxied, func(c *dbpool.Config) {
		c.Size, c.MaxOverflow, c.OverflowIdle = 3, 2, 0
		c.Recycle = 300 * time.Millisecond
	})

	var storm faults
	var calmOnes, clean atomic.Int64
	var jobs sync.WaitGroup
	for range callers {
		jobs.Go(func() {
			for range rounds {
				calm := storm.calm()
				err := job(t.Context(), p)
				if !calm() {
					continue
				}
				calmOnes.Add(1)
				if err == nil {
					clean.Add(1)
				} else if !errors.Is(err, context.DeadlineExceeded) {
					t.Errorf("in a calm: %v", err)
				}
			}
		})
	}
	over := make(chan struct{})
	go func() { jobs.Wait(); close(over) }()
	for {
		select {
		case <-over:
			t.Logf("%d jobs without a fault, %d clean; %+v", calmOnes.Load(), clean.Load(), p.Stats())
			return
		case <-time.After(time.Duration(20+rand.IntN(100)) * time.Millisecond):
		}
		storm.strike(func() {
			switch rand.IntN(3) {
			case 0:
				proxy.Reset()
			case 1:
				killOthers(t, direct)
			case 2:
				proxy.Refuse()
				proxy.Reset()
				proxy.Heal()
			}
		})
	}
}

// job uses the pool as jobs do, well and badly.
func job(ctx context.Context, p *dbpool.Pool) error {
	ctx, b := p.Track(ctx, "job")
	defer b.End()
	switch rand.IntN(9) {
	case 0: // gives up early
		ctx, cancel := context.WithTimeout(ctx, time.Duration(rand.IntN(3000))*time.Microsecond)
		defer cancel()
		_, err := p.Exec(ctx, "SELECT pg_sleep(0.001)")
		return err
	case 1:
		return pgx.BeginFunc(ctx, p, func(tx pgx.Tx) error { _, err := tx.Exec(ctx, "SELECT 1"); return err })
	case 2: // forgets its connection
		c, err := p.Acquire(ctx)
		if err != nil {
			return err
		}
		_, err = c.Exec(ctx, "SELECT 1")
		return err
	case 3: // forgets rows
		_, err := p.Query(ctx, "SELECT generate_series(1, 20000)")
		return err
	case 4: // forgets a transaction
		_, err := p.Begin(ctx)
		return err
	case 5:
		_, err := p.Validate(ctx)
		return err
	default:
		c, err := p.Acquire(ctx)
		if err != nil {
			return err
		}
		defer c.Release()
		if rand.IntN(4) == 0 {
			time.Sleep(time.Duration(rand.IntN(3)) * time.Millisecond)
		}
		_, err = c.Exec(ctx, "SELECT 1")
		return err
	}
}
