package worker

import (
	"context"
	"errors"
	"log/slog"
	"sync"
	"time"

	"github.com/carpool-go/carpool/internal/wait"
	"github.com/carpool-go/carpool/tasks"
	"github.com/carpool-go/carpool/tasks/maintenance"
)

// validationClock enqueues pool:validate for its own instance, on the instance's own
// queue, because a job on a shared queue would validate whichever pool took it. Each
// instance has one, so it needs no agreement with the others, and no table.
type validationClock struct {
	client *tasks.Client
	queue  string        // from which only this instance pulls
	every  time.Duration // the time between two validations
	log    *slog.Logger

	cancel  context.CancelFunc // nil before Start
	running sync.WaitGroup
}

// Start enqueues the first validation at once, and the others until Stop. That Redis
// is away is no error: the next tick tries again.
func (c *validationClock) Start() error {
	ctx, cancel := context.WithCancel(context.Background())
	c.cancel = cancel
	c.running.Go(func() {
		for ctx.Err() == nil {
			if err := c.enqueue(ctx); err != nil && ctx.Err() == nil {
				c.log.Warn("the pool's validation could not be enqueued; the next tick tries again", "error", err)
			}
			_ = wait.For(ctx, c.every)
		}
	})
	return nil
}

// Stop ends the clock and waits until it has ended. It may be called twice, and
// without Start.
func (c *validationClock) Stop() {
	if c.cancel != nil {
		c.cancel()
	}
	c.running.Wait()
}

// enqueue enqueues one validation. While the last one has not been run, the unique
// key keeps further ones from piling up behind it.
func (c *validationClock) enqueue(ctx context.Context) error {
	_, err := c.client.Enqueue(ctx, maintenance.PoolValidate{}, &tasks.EnqueueOptions{Queue: c.queue, UniqueKey: c.queue})
	if _, duplicate := errors.AsType[*tasks.DuplicateError](err); duplicate {
		return nil
	}
	return err
}
