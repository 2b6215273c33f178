package delivery

import (
	"context"
	"log/slog"
	"sync"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/carpool-go/carpool/internal/asynqwire"
)

// due moves jobs that are due to their queues, by Redis' clock. Every worker looks each
// second, and when it knows that a job is due before that.
type due struct {
	rdb    redis.UniversalClient
	queues []string
	log    *slog.Logger

	mu      sync.Mutex
	soonest time.Time // a job that this process has put off is due then, by its clock; zero for none
	hinted  chan struct{}
}

const (
	// dueCheck is how often a worker looks for jobs that are due.
	dueCheck = time.Second
	// dueAgain is how long it waits at least.
	dueAgain = time.Millisecond
)

func newDue(rdb redis.UniversalClient, queues []string, log *slog.Logger) *due {
	return &due{rdb: rdb, queues: queues, log: log, hinted: make(chan struct{}, 1)}
}

// hint says that a job is due at a time, by this process's clock.
func (d *due) hint(at time.Time) {
	if time.Until(at) > dueCheck {
		return
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if !d.soonest.IsZero() && !at.Before(d.soonest) {
		return
	}
	d.soonest = at
	select {
	case d.hinted <- struct{}{}:
	default:
	}
}

func (d *due) untilHint() (wait time.Duration, ok bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return time.Until(d.soonest), !d.soonest.IsZero()
}

// run moves jobs until ctx ends.
func (d *due) run(ctx context.Context) {
	timer := time.NewTimer(0)
	defer timer.Stop()
	next := time.Now() // when the timer fires
	in := func(wait time.Duration) {
		next = time.Now().Add(wait)
		timer.Reset(wait)
	}
	for {
		select {
		case <-ctx.Done():
			return
		case <-d.hinted:
			if wait, ok := d.untilHint(); ok && wait < time.Until(next) {
				in(max(dueAgain, wait))
			}
			continue
		case <-timer.C:
		}
		d.mu.Lock()
		d.soonest = time.Time{}
		d.mu.Unlock()
		pause := dueCheck
		soonest, err := d.move(ctx)
		switch {
		case err != nil && ctx.Err() == nil:
			d.log.Debug("jobs that are due could not be moved", "error", err)
		case err == nil && soonest >= 0:
			pause = min(pause, max(dueAgain, soonest))
		}
		if wait, ok := d.untilHint(); ok {
			pause = min(pause, max(dueAgain, wait))
		}
		in(pause)
	}
}

func (d *due) move(ctx context.Context) (next time.Duration, err error) {
	ctx, cancel := context.WithTimeout(ctx, exchangeTimeout)
	defer cancel()
	return asynqwire.MoveDue(ctx, d.rdb, d.queues)
}
