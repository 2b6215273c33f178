// Package scheduler runs what goes by the clock. Every instance runs one; which
// of them enqueues a tick is decided, for each tick once, by a row in Postgres.
package scheduler

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/carpool-go/carpool/dbpool"
	"github.com/carpool-go/carpool/internal/wait"
	"github.com/carpool-go/carpool/tasks"
	"github.com/carpool-go/carpool/tasks/maintenance"
)

// Config is what a [Scheduler] works with. All fields but Entries are required.
type Config struct {
	// DB has the entries, how far each is, and the outbox to which their jobs
	// go.
	DB *dbpool.Pool
	// Tasks are the kinds that this program knows.
	Tasks *tasks.Set
	// Entries are those that the program brings along. They are written to
	// carpool.schedules at the start, unless the table has another entry of the
	// same name, which then counts.
	Entries []Entry
	// Redis is asked whether jobs have ended, and is told what asynqmon's page
	// shows.
	Redis redis.UniversalClient

	Client *tasks.Client
	// Queue is the instance's own queue, from which only it pulls.
	Queue string
	// ValidateEvery is the time between two validations of the instance's
	// pool.
	ValidateEvery time.Duration
	Log           *slog.Logger

	// For tests: the clock in SQL, the longest time between two looks at it, and
	// what is called while an entry's row is locked.
	clock     string
	lookEvery time.Duration
	locked    func(ctx context.Context, entry string)
}

// Scheduler enqueues the entries of carpool.schedules, together with those of
// the other instances; and pool:validate for its own instance, on the instance's
// own queue: a job on a shared queue would validate whichever pool took it.
type Scheduler struct {
	cfg       Config
	code      map[string]definition
	read      map[string]readEntry // by name
	outage    outage
	page      *page
	redisAway error // what Redis said in this look, if it can't be asked
	cancel    context.CancelFunc
	done      sync.WaitGroup
}

// Start starts a scheduler; [Scheduler.Stop] ends it. The first validation is
// due at once. The error names the entry and the field that are wrong; servers
// that are away are none, they are waited for.
func Start(cfg Config) (*Scheduler, error) {
	s, err := prepare(cfg)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(context.Background())
	s.cancel = cancel
	s.done.Go(func() { s.validateOwnPool(ctx) })
	s.done.Go(func() { s.goByTheClock(ctx) })
	s.done.Go(func() { s.page.run(ctx) })
	return s, nil
}

func prepare(cfg Config) (*Scheduler, error) {
	if cfg.DB == nil || cfg.Tasks == nil || cfg.Redis == nil || cfg.Client == nil || cfg.Queue == "" || cfg.ValidateEvery <= 0 || cfg.Log == nil {
		return nil, errors.New("scheduler: DB, Tasks, Redis, Client, Queue, ValidateEvery and Log must be set")
	}
	code := make(map[string]definition, len(cfg.Entries))
	for _, e := range cfg.Entries {
		if err := e.Validate(); err != nil {
			return nil, fmt.Errorf("scheduler: entry %.100q: %w", e.Name, err)
		}
		if _, err := cfg.Tasks.Lookup(e.Payload.Kind()); err != nil {
			return nil, fmt.Errorf("scheduler: entry %.100q: kind: %w", e.Name, err)
		}
		if _, twice := code[e.Name]; twice {
			return nil, fmt.Errorf("scheduler: entry %.100q: name: there are two of it", e.Name)
		}
		d, err := e.definition()
		if err != nil {
			return nil, fmt.Errorf("scheduler: entry %.100q: %w", e.Name, err)
		}
		code[e.Name] = d
	}
	if cfg.clock == "" {
		cfg.clock = "clock_timestamp()"
	}
	if cfg.lookEvery == 0 {
		cfg.lookEvery = lookEvery
	}
	return &Scheduler{
		cfg: cfg, code: code,
		read:   make(map[string]readEntry),
		outage: outage{log: cfg.Log},
		page:   newPage(cfg.Redis, cfg.Log),
	}, nil
}

// Stop ends the scheduler and waits until it has. Stopping twice is safe.
func (s *Scheduler) Stop() {
	s.cancel()
	s.done.Wait()
}

func (s *Scheduler) validateOwnPool(ctx context.Context) {
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
	_, err := s.cfg.Client.Enqueue(ctx, maintenance.PoolValidate{}, &tasks.EnqueueOptions{
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

const (
	// lookEvery is the longest time between two looks at the table, and so until
	// a change takes effect.
	lookEvery = time.Second
	// lookTimeout bounds one look, whatever the servers do.
	lookTimeout = 15 * time.Second
)

func (s *Scheduler) goByTheClock(ctx context.Context) {
	registered := false
	for ctx.Err() == nil {
		next, err := s.cfg.lookEvery, error(nil)
		if !registered {
			if err = s.register(ctx); err == nil {
				registered = true
			}
		}
		if registered {
			next, err = s.look(ctx)
		}
		if ctx.Err() != nil {
			return
		}
		s.outage.note(err)
		_ = wait.For(ctx, next)
	}
}

// outage logs when the scheduler can't work and when it can again, and nothing
// in between.
type outage struct {
	log   *slog.Logger
	since time.Time // zero: there is none
}

func (o *outage) note(err error) {
	switch {
	case err != nil && o.since.IsZero():
		o.since = time.Now()
		o.log.Warn("the scheduler waits: Postgres does not serve it", "error", err)
	case err == nil && !o.since.IsZero():
		o.log.Info("the scheduler goes on", "after", time.Since(o.since).Round(time.Millisecond).String())
		o.since = time.Time{}
	}
}
