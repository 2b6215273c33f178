// Package scheduler runs what goes by the clock.
package scheduler

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/carpool-go/carpool/tasks"
)

// Config is what a [Scheduler] works with. All fields are required.
type Config struct {
	Client *tasks.Client
	// Queue is the instance's own queue, from which only it pulls.
	Queue string
	// ValidateEvery is the time between two validations of the instance's
	// pool.
	ValidateEvery time.Duration
	Log           *slog.Logger
}

// Scheduler enqueues pool:validate for one instance, on the instance's own
// queue: a job on a shared queue would validate whichever pool took it.
type Scheduler struct {
	cfg    Config
	cancel context.CancelFunc
	done   sync.WaitGroup
}

// Start starts a scheduler; [Scheduler.Stop] ends it. The first validation is
// due at once.
func Start(cfg Config) (*Scheduler, error) {
	if cfg.Client == nil || cfg.Queue == "" || cfg.ValidateEvery <= 0 || cfg.Log == nil {
		return nil, errors.New("scheduler: Client, Queue, ValidateEvery and Log must be set")
	}
	ctx, cancel := context.WithCancel(context.Background())
	s := &Scheduler{cfg: cfg, cancel: cancel}
	s.done.Go(func() { s.run(ctx) })
	return s, nil
}

// Stop ends the scheduler and waits until it has. Stopping twice is safe.
func (s *Scheduler) Stop() {
	s.cancel()
	s.done.Wait()
}

func (s *Scheduler) run(ctx context.Context) {
	tick := time.NewTicker(s.cfg.ValidateEvery)
	defer tick.Stop()
	for {
		if err := s.validate(ctx); err != nil && ctx.Err() == nil {
			s.cfg.Log.Warn("the pool's validation could not be enqueued; the next tick tries again", "error", err)
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

// validate enqueues one validation. While the last one has not been run, the
// unique key keeps further ones from piling up behind it.
func (s *Scheduler) validate(ctx context.Context) error {
	_, err := s.cfg.Client.Enqueue(ctx, tasks.PoolValidate{}, &tasks.EnqueueOptions{
		Queue: s.cfg.Queue, UniqueKey: s.cfg.Queue,
	})
	if _, duplicate := errors.AsType[*tasks.DuplicateError](err); duplicate {
		return nil
	}
	if err != nil {
		return fmt.Errorf("scheduler: %w", err)
	}
	return nil
}
