// Package scheduler enqueues jobs by the clock.
//
// An [Entry] is a job and when it is due, by a cron expression in a time zone. Some
// entries come with the program; others are added while it runs, to the table
// carpool.schedules. The package is for both: for a program that writes its entries
// down, and for one that manages the table with [Add], [List], [SetEnabled],
// [Remove] and [RunNow], as the command line does.
//
// A [Scheduler] is a part of a worker, which starts one by itself. Every instance
// has one; which of them enqueues a tick is decided, for each tick once, by a row in
// Postgres. What becomes of ticks that nobody was there for, and of those whose
// previous job still runs, is the entry's to say: see [Missed] and [Overlap].
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
	"github.com/carpool-go/carpool/internal/limit"
	"github.com/carpool-go/carpool/internal/wait"
	"github.com/carpool-go/carpool/tasks"
)

// Config is what a [Scheduler] works with. All fields but Entries are required.
type Config struct {
	// DB has the entries, how far each is, and the outbox to which their jobs
	// go.
	DB *dbpool.Pool
	// Redis is asked whether jobs have ended, and is told what asynqmon's page
	// shows.
	Redis redis.UniversalClient
	// Tasks are the kinds that this program knows. Entries of other kinds are left
	// to the other instances.
	Tasks *tasks.Set
	// Entries are those that the program brings along. They are written to
	// carpool.schedules at the start, unless the table has another entry of the
	// same name, which then counts.
	Entries []Entry
	// MaxPayload is how many bytes of JSON the payload of one of Entries may have; 0 means
	// [tasks.DefaultMaxPayload].
	MaxPayload int
	// Log gets what can't be run, what was left out, and when Postgres is away.
	Log *slog.Logger

	// For tests: the clock in SQL, the longest time between two looks at it, and
	// what is called while an entry's row is locked.
	clock     string
	lookEvery time.Duration
	locked    func(ctx context.Context, entry string)
}

// Scheduler enqueues what is due of the entries of carpool.schedules, together with
// those of the other instances. [New] makes one.
type Scheduler struct {
	cfg     Config
	code    map[string]definition // the program's own entries, by name
	page    *page
	cancel  context.CancelFunc // nil before Start
	running sync.WaitGroup

	// What follows belongs to the goroutine that looks.
	read      map[string]readEntry // by name
	outage    outage
	redisAway error // what Redis said in this look, if it can't be asked
}

// New returns a scheduler that [Scheduler.Start] starts. Its error says which fields
// of cfg must be set, or names the entry that is wrong and the field of it; an entry
// whose kind cfg.Tasks doesn't have is wrong too.
func New(cfg Config) (*Scheduler, error) {
	if cfg.DB == nil || cfg.Tasks == nil || cfg.Redis == nil || cfg.Log == nil {
		return nil, errors.New("scheduler: DB, Tasks, Redis and Log must be set")
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
		if err := limit.Check(len(d.payload), cfg.MaxPayload); err != nil {
			return nil, fmt.Errorf("scheduler: entry %.100q: payload: %w", e.Name, err)
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
		page:   newPage(cfg.Redis, cfg.Log),
		read:   make(map[string]readEntry),
		outage: outage{log: cfg.Log},
	}, nil
}

// Start begins to enqueue what is due, until [Scheduler.Stop]. A server that is
// away is no error: it is waited for. The error is always nil.
func (s *Scheduler) Start() error {
	ctx, cancel := context.WithCancel(context.Background())
	s.cancel = cancel
	s.running.Go(func() { s.goByTheClock(ctx) })
	s.running.Go(func() { s.page.run(ctx) })
	return nil
}

// Stop ends the scheduler and waits until it has ended. A tick that is under way is
// enqueued or not, as Postgres decides, and not lost: the next look of any instance
// finds it. Stop may be called twice, and without Start.
func (s *Scheduler) Stop() {
	if s.cancel != nil {
		s.cancel()
	}
	s.running.Wait()
}

const (
	// lookEvery is the longest time between two looks at the table, and so until
	// a change takes effect.
	lookEvery = time.Second
	// lookTimeout bounds one look, whatever the servers do.
	lookTimeout = 15 * time.Second
)

// goByTheClock writes the program's entries to the table, as soon as Postgres takes
// them, and looks at the table until ctx ends.
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
