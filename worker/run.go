package worker

import (
	"cmp"
	"context"
	"fmt"
	"os"
	"slices"
	"time"

	"github.com/carpool-go/carpool/admin"
	"github.com/carpool-go/carpool/dbpool"
	"github.com/carpool-go/carpool/internal/instance"
	"github.com/carpool-go/carpool/internal/limit"
	"github.com/carpool-go/carpool/internal/schema"
	"github.com/carpool-go/carpool/internal/startup"
	"github.com/carpool-go/carpool/outbound"
	"github.com/carpool-go/carpool/scheduler"
	"github.com/carpool-go/carpool/tasks"
	"github.com/carpool-go/carpool/tasks/maintenance"
	"github.com/carpool-go/carpool/worker/internal/delivery"
	"github.com/carpool-go/carpool/worker/internal/doctor"
	"github.com/carpool-go/carpool/worker/internal/fleet"
	"github.com/carpool-go/carpool/worker/internal/relay"
)

// part is what runs beside the jobs. Stop may be called twice, and without Start. A server
// that is away is no error of Start.
type part interface {
	Start() error
	Stop()
}

// Run runs a worker until ctx ends, or with [Config.Burst] until nothing is left to do, and
// then stops it gracefully: it fetches no more jobs, lets those that run finish for the
// shutdown timeout, and pushes the rest back to their queues without using up a try. It
// returns when that is done, see [Config.StopsWithin].
//
// Before it starts it waits for both servers, and fails if they are not ready in time, or
// refuse it. The error is nil if it ran. Else it is that of [Config.Validate], names the
// server that was not ready or the group that did not start, is the cause of ctx's end if
// that came first, or says how many due jobs a burst has left because they can't be fetched.
func Run(ctx context.Context, c Config) error {
	if err := c.Validate(); err != nil {
		return fmt.Errorf("worker: the configuration is wrong: %w", err)
	}
	c = c.withDefaults()
	log := c.Logger
	running, stopped := context.WithCancelCause(ctx)
	defer stopped(nil)
	well, err := listenHealth(c.HealthAddr, log) // first, so that it tells of the start
	if err != nil {
		return err
	}
	defer well.Close()
	guard, err := outbound.New(c.OutboundAllow)
	if err != nil {
		return err
	}
	rdb, err := tasks.OpenRedis(c.RedisURL)
	if err != nil {
		return err
	}
	defer rdb.Close()
	serversRedis, err := tasks.OpenRedis(c.RedisURL)
	if err != nil {
		return err
	}
	defer serversRedis.Close()
	looksRedis, err := tasks.OpenRedis(c.RedisURL)
	if err != nil {
		return err
	}
	defer looksRedis.Close()
	db, err := dbpool.Open(ctx, c.Pool)
	if err != nil {
		return err
	}
	defer db.Close()
	if err := startup.Wait(ctx, c.StartupTimeout, log,
		startup.Server{Variable: "REDIS_URL", URL: c.RedisURL, Check: well.awaiting("Redis", func(ctx context.Context) error { return doctor.CheckScripts(ctx, rdb) })},
		startup.Server{Variable: "DATABASE_URL", URL: c.Pool.URL, Check: well.awaiting("the database", db.Ping)},
		startup.Server{Variable: "DATABASE_URL", URL: c.Pool.URL, Check: well.awaiting("carpool's tables in the database, which the command migrate makes",
			func(ctx context.Context) error { return schema.Check(ctx, db) })},
	); err != nil {
		return err
	}
	well.notReady("it starts")
	warnOfEviction(ctx, rdb, log)
	warnOfBudget(ctx, db, c.Pool, log)

	// The heartbeat shows what a validation has found at once.
	var members *fleet.Fleet
	set, err := kinds(&maintenance.Tasks{
		Redis:         rdb,
		AfterValidate: func(ctx context.Context) { members.Heartbeat(ctx) },
	}, c.Groups)
	if err != nil {
		return err
	}
	if err := tasks.RecordKinds(ctx, db, set); err != nil {
		return err
	}
	if err := limit.Record(ctx, db, c.MaxPayload); err != nil {
		return fmt.Errorf("worker: %w", err)
	}

	host, _ := os.Hostname()
	name := instance.NewName(cmp.Or(c.Name, host))
	queue := instance.Queue(name)
	jobs := delivery.New(delivery.Config{
		Tasks: set, Redis: rdb, ServersRedis: serversRedis, LooksRedis: looksRedis, DB: db,
		Queues: c.Queues, OwnQueue: queue, Concurrency: c.Concurrency,
		ShutdownTimeout: c.ShutdownTimeout, MaxPayload: c.MaxPayload,
		BaseContext: outbound.NewContext(context.Background(), guard),
		Fail:        stopped,
		Log:         log,
	})
	self := admin.Instance{
		Name: name, Version: c.Version, Host: host, PID: os.Getpid(), Started: time.Now().UTC(),
		Queues: c.Queues, OwnQueue: queue, Kinds: set.Kinds(), Concurrency: c.Concurrency,
	}
	members = fleet.New(fleet.Config{
		Redis: rdb, Self: self, Running: jobs.Executor.Running, Pool: db.Stats, DatabaseAway: jobs.Breaker.IsOpen, Blocked: jobs.Breaker.Blocked, Log: log,
	})
	outboxRelay, err := relay.New(relay.Config{
		DB: c.Pool, Tasks: set, Redis: rdb, Log: log, FleetKinds: admin.New(rdb, nil).KnownKinds,
	})
	if err != nil {
		return err
	}
	clock, err := scheduler.New(scheduler.Config{
		DB: db, Tasks: set, Redis: rdb, Entries: append(ownSchedules(), c.Schedules...), MaxPayload: c.MaxPayload, Log: log,
	})
	if err != nil {
		return err
	}

	var validations, ticks part = &validationClock{client: tasks.NewClient(rdb), queue: queue, every: c.ValidateEvery, log: log}, clock
	if c.Burst { // what goes by the clock is for workers that stay
		validations, ticks = nothing{}, nothing{}
	}
	lost := newLostJobs(rdb, c.Queues, log)
	// In the order of the shutdown; they are started in the reverse order.
	parts := []part{
		jobs.Servers,                 // fetch no more, and wait for the jobs that run, which need all that follows
		newGroups(running, c.Groups), // no handler of theirs runs any more
		validations,                  // enqueue to the instance's own queue, which goes with the fleet
		ticks,                        // are other instances' from now on
		lost,                         // looks at the queues by itself
		jobs.Rescue,                  // would give back what this worker has just pushed back
		outboxRelay,                  // moves what the jobs and the ticks have enqueued until now
		jobs.Executor,                // waits for what the end of jobs began, such as the last step of a cancel
		members,                      // take the instance out of Redis, when nothing of it writes there any more
		jobs.Breaker,                 // is asked by the heartbeat until then
	}
	for i, p := range slices.Backward(parts) {
		if err := p.Start(); err != nil {
			stopped(err)
			stop(parts[i:])
			return err
		}
	}
	defer stop(parts)
	defer stopped(nil) // first, so that the groups know
	well.ready(rdb, jobs)
	defer well.notReady("it stops")
	log.Info("worker started", "version", c.Version, "instance", name,
		"queues", self.Weights(), "concurrency", c.Concurrency,
		"pool_size", c.Pool.Size, "max_overflow", c.Pool.MaxOverflow)

	if c.Burst {
		if err := drain(running, outboxRelay, rdb, c.Queues, jobs.Servers, lost, log); err != nil {
			return err
		}
	} else {
		<-running.Done()
	}
	if err := context.Cause(running); err != nil && ctx.Err() == nil {
		return fmt.Errorf("worker: %w", err)
	}
	return nil
}

// nothing is the part in the place of one that isn't wanted.
type nothing struct{}

func (nothing) Start() error { return nil }
func (nothing) Stop()        {}

func stop(parts []part) {
	for _, p := range parts {
		p.Stop()
	}
}

// ownSchedules are the entries that every worker brings along.
func ownSchedules() []scheduler.Entry {
	return []scheduler.Entry{
		{Name: "carpool-prune", Cron: "17 * * * *", Payload: maintenance.Prune{}, Overlap: scheduler.OverlapSkip},
	}
}
