package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"runtime/debug"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/google/uuid"
	"github.com/hibiken/asynq"
	"github.com/jackc/pgerrcode"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/redis/go-redis/v9"

	"github.com/carpool-go/carpool/dbpool"
	"github.com/carpool-go/carpool/internal/schema"
	"github.com/carpool-go/carpool/scheduler"
	"github.com/carpool-go/carpool/tasks"
	"github.com/carpool-go/carpool/tasks/maintenance"
)

type runSettings struct {
	redisSettings    `embed:""`
	databaseSettings `embed:""`
	startupSettings  `embed:""`
	logSettings      `embed:""`
	poolSettings     `embed:""`
	workerSettings   `embed:""`
	taskSettings     `embed:""`
}

type runCmd struct {
	Burst bool `help:"Work off what is queued and due, then exit: for a cron job that pays for nothing else."`
	runSettings
}

// Run is `worker run`: it owns the process from its configuration to its exit.
func (r *runCmd) Run(kinds kindsOf) error {
	cfg, err := r.config()
	if err != nil {
		return err
	}
	level, format := new(faults).log(r.logSettings)
	log := newLogger(os.Stderr, level, format)
	redis.SetLogger(redisLog{log})

	ctx, cancel := untilSignal(log, cfg.shutdownTimeout+endingGrace+stopGrace)
	defer cancel()
	err = r.work(ctx, cfg, kinds, log)
	switch {
	case err == nil:
		log.Info("worker stopped")
		return nil
	case ctx.Err() != nil:
		log.Info("stopped before it had started", "error", err)
		return nil
	default:
		log.Error("the worker has failed", "error", err)
		return errLogged
	}
}

// errLogged is the error of a command that has logged what went wrong.
var errLogged = errors.New("the error was logged")

// stopGrace is what stopping may take beyond the time that jobs are given. It is
// needed when Redis doesn't answer.
const stopGrace = 5 * time.Second

// untilSignal returns a context that ends with the first SIGTERM or SIGINT. The
// second one ends the process, and so does the limit, before the platform does
// with SIGKILL and without a word.
func untilSignal(log *slog.Logger, limit time.Duration) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancel(context.Background())
	signals := make(chan os.Signal, 2)
	signal.Notify(signals, syscall.SIGTERM, syscall.SIGINT)
	go func() {
		sig := <-signals
		log.Info("stopping: no more jobs are fetched, those that run may finish", "signal", sig.String())
		cancel()
		why := "a second signal"
		select {
		case <-signals:
		case <-time.After(limit):
			why = "no end within " + limit.String()
		}
		log.Warn("stopped at once; jobs that ran are run again when their leases are over", "because_of", why)
		os.Exit(exitFailed)
	}()
	return ctx, cancel
}

func (r *runCmd) work(ctx context.Context, cfg config, kinds kindsOf, log *slog.Logger) error {
	rdb, err := tasks.OpenRedis(cfg.redisURL)
	if err != nil {
		return err
	}
	defer rdb.Close()
	cfg.pool.Logger = log
	db, err := dbpool.Open(ctx, cfg.pool)
	if err != nil {
		return err
	}
	defer db.Close()
	if err := waitFor(ctx, cfg.startupTimeout, log,
		server{"REDIS_URL", func(ctx context.Context) error { return rdb.Ping(ctx).Err() }},
		server{"DATABASE_URL", db.Ping},
		server{"DATABASE_URL", func(ctx context.Context) error { return schema.Check(ctx, db) }},
	); err != nil {
		return err
	}
	warnOfEviction(ctx, rdb, log)
	warnOfBudget(ctx, db, log)

	upkeep := &maintenance.Tasks{Redis: rdb}
	set := kinds(&cfg.builtin, upkeep)
	if err := tasks.RecordKinds(ctx, db, set); err != nil {
		return err
	}

	name := instanceName()
	queue := instanceQueue(name)
	client := tasks.NewClient(rdb)
	inspector := asynq.NewInspectorFromRedisClient(rdb)
	ending, end := context.WithCancelCause(context.Background())
	defer end(nil)
	gate := newGate(db, cfg.concurrency, log)
	defer gate.stop()
	f := &frame{tasks: set, rdb: rdb, client: client, inspector: inspector, db: db, gate: gate, acks: newAckHook(), log: log, ending: ending}
	defer f.behind.Wait()
	defer end(errEnding)

	host, _ := os.Hostname()
	fleet := &fleet{
		rdb: rdb, log: log, running: f.runs.len, pool: db.Stats, away: gate.isShut,
		self: instance{
			Name: name, Version: version(), Host: host, PID: os.Getpid(), Started: time.Now().UTC(),
			Queues: cfg.queues, OwnQueue: queue, Hands: cfg.concurrency, Fetchers: cfg.fetchers,
		},
	}
	fleet.start()
	defer fleet.stop()
	upkeep.AfterValidate = fleet.beat
	relay, err := newRelay(relayConfig{db: cfg.pool, set: set, client: client, log: log})
	if err != nil {
		return err
	}
	defer relay.Stop()
	if err := relay.Start(); err != nil {
		return err
	}
	rescue := startRescue(rdb, append(sortedNames(cfg.queues), queue), leaseStill, log)
	defer rescue.stop()

	if !r.Burst {
		clock, err := scheduler.Start(scheduler.Config{
			DB: db, Tasks: set, Redis: rdb, Entries: entries(),
			Client: client, Queue: queue, ValidateEvery: cfg.validateEvery, Log: log,
		})
		if err != nil {
			return err
		}
		defer clock.Stop()
	}

	serversRedis, err := tasks.OpenRedis(cfg.redisURL)
	if err != nil {
		return err
	}
	defer serversRedis.Close()
	serversRedis.AddHook(f.acks)
	servers, err := startServers(serversRedis, cfg, f, queue, end, log)
	if err != nil {
		return err
	}
	defer servers.stop()
	log.Info("worker started", "version", version(), "instance", name,
		"queues", r.Queues, "concurrency", cfg.concurrency, "fetchers", cfg.fetchers,
		"pool_size", cfg.pool.Size, "max_overflow", cfg.pool.MaxOverflow)

	if r.Burst {
		untilIdle(ctx, relay, inspector, cfg.queues, f, log)
	} else {
		<-ctx.Done()
	}
	return nil
}

// entries are the schedules that every worker brings along.
func entries() []scheduler.Entry {
	return []scheduler.Entry{
		{Name: "carpool-prune", Cron: "17 * * * *", Payload: maintenance.Prune{}, Overlap: scheduler.OverlapSkip},
	}
}

// untilIdle returns when nothing is queued, due or running, once what was in the
// outbox has come to the queues; or when ctx is done. It wants to see that twice,
// since a job that was just fetched is for a moment neither queued nor running.
func untilIdle(ctx context.Context, relay *relay, inspector *asynq.Inspector, queues map[string]int, f *frame, log *slog.Logger) {
	select {
	case <-ctx.Done():
		return
	case <-relay.caughtUp:
	}
	tick := time.NewTicker(2 * idleCheck)
	defer tick.Stop()
	for seen := 0; seen < 2; {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		nothing, err := idle(inspector, queues)
		switch {
		case err != nil:
			log.Warn("the queues could not be looked at", "error", err)
			seen = 0
		case nothing && f.runs.len() == 0:
			seen++
		default:
			seen = 0
		}
	}
}

// server is one that the worker can't do without.
type server struct {
	variable string // that names it
	check    func(context.Context) error
}

// waitFor waits until every server's check passes, in turn. A deploy starts
// things in any order. It doesn't wait for one that refuses the user.
func waitFor(ctx context.Context, timeout time.Duration, log *slog.Logger, servers ...server) error {
	giveUp := time.Now().Add(timeout)
	for _, s := range servers {
		for wait := 250 * time.Millisecond; ; wait = min(2*wait, 5*time.Second) {
			tryCtx, cancel := context.WithTimeout(ctx, 5*time.Second)
			err := s.check(tryCtx)
			cancel()
			if err == nil {
				break
			}
			if keepsOut(err) {
				return fmt.Errorf("%s: the server refuses this user or password: %w", s.variable, err)
			}
			left := time.Until(giveUp)
			if left <= 0 {
				return fmt.Errorf("%s: not ready after %s: %w", s.variable, timeout, err)
			}
			log.Warn("waiting for the server of "+s.variable, "error", err, "giving_up_in", left.Round(time.Second).String())
			select {
			case <-ctx.Done():
				return context.Cause(ctx)
			case <-time.After(min(wait, left)):
			}
		}
	}
	return nil
}

// keepsOut reports whether a server lets this user, or this password, not in.
func keepsOut(err error) bool {
	if e, ok := errors.AsType[*pgconn.PgError](err); ok {
		return e.Code == pgerrcode.InvalidPassword || e.Code == pgerrcode.InvalidAuthorizationSpecification
	}
	return redis.HasErrorPrefix(err, "WRONGPASS") || redis.HasErrorPrefix(err, "NOAUTH")
}

// warnOfEviction says so if Redis is set to drop keys when its memory is full:
// the keys are jobs.
func warnOfEviction(ctx context.Context, rdb redis.UniversalClient, log *slog.Logger) {
	memory, err := rdb.Info(ctx, "memory").Result()
	if err != nil {
		return // not every hosted Redis shows it
	}
	for line := range strings.Lines(memory) {
		policy, ok := strings.CutPrefix(strings.TrimSpace(line), "maxmemory_policy:")
		if ok && policy != "noeviction" {
			log.Warn("Redis may drop jobs when its memory is full; set its maxmemory-policy to noeviction", "maxmemory_policy", policy)
		}
	}
}

// warnOfBudget says so if the database can't hold this instance twice, as it must
// during a deploy. How many instances there are, one of them can't know.
func warnOfBudget(ctx context.Context, db *dbpool.Pool, log *slog.Logger) {
	budget, err := db.Budget(ctx)
	if err != nil {
		return // a pooler, or a role that may not look, doesn't tell
	}
	budget.PerInstance++ // the relay's
	if warning := budget.Warning(1); warning != "" {
		log.Warn("the database may run out of connections", "why", warning)
	}
}

// instanceName is the same for as long as the process lives and different for
// any two that live at once.
func instanceName() string {
	host, _ := os.Hostname()
	name := cmp.Or(os.Getenv("RENDER_INSTANCE_ID"), host, "worker")
	return name + "-" + uuid.NewString()[:8]
}

// buildVersion is set by -ldflags "-X main.buildVersion=…".
var buildVersion string

func version() string {
	if buildVersion != "" {
		return buildVersion
	}
	if info, ok := debug.ReadBuildInfo(); ok {
		if i := slices.IndexFunc(info.Settings, func(s debug.BuildSetting) bool { return s.Key == "vcs.revision" }); i >= 0 {
			return info.Settings[i].Value[:12]
		}
	}
	return "development"
}
