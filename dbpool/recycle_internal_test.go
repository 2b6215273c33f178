package dbpool

import (
	"log/slog"
	"testing"
	"time"

	"github.com/carpool-go/carpool/internal/testservers"
)

func TestPool_RecyclingNeverEmptiesThePool(t *testing.T) {
	t.Parallel()
	cfg := DefaultConfig(testservers.Postgres(t))
	cfg.Logger = slog.New(slog.DiscardHandler)
	p, err := Open(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.Close)
	take := func() (cs []*Conn) {
		for range 10 {
			c, err := p.Acquire(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			cs = append(cs, c)
		}
		return cs
	}
	giveBack := func(cs []*Conn) {
		for _, c := range cs {
			c.Release()
		}
	}
	giveBack(take())
	// All of them are too old at once, as after a machine's sleep.
	p.mu.Lock()
	for _, c := range p.idle {
		c.recycleAt = time.Now().Add(-time.Second)
	}
	p.mu.Unlock()
	began := time.Now()
	giveBack(take())
	if _, err := p.Validate(t.Context()); err != nil {
		t.Fatal(err)
	}
	n := p.Stats().Counts.ClosedRecycled
	if took := time.Since(began); n < 1 || n > 1+uint64(took/p.recycleGap()) {
		t.Errorf("%d of 10 were recycled in %s", n, took)
	}
}
