// Package delivery is what surrounds asynq in a worker: the executor that every job runs
// in, the circuit breaker of the database, the servers with what they lack (acknowledgements
// that arrive, leases that are fenced), and the rescue of jobs whose workers died. It knows
// no kind of job by its name.
package delivery

import (
	"context"
	"log/slog"
	"maps"
	"slices"
	"time"

	"github.com/hibiken/asynq"
	"github.com/redis/go-redis/v9"

	"github.com/carpool-go/carpool/dbpool"
	"github.com/carpool-go/carpool/internal/unique"
	"github.com/carpool-go/carpool/tasks"
)

// Config is what a [Delivery] works with. All fields but MaxPayload are required.
type Config struct {
	Tasks *tasks.Set
	Redis redis.UniversalClient
	// ServersRedis is a client for asynq's servers alone, since a hook on it changes what
	// they say.
	ServersRedis redis.UniversalClient
	DB           *dbpool.Pool
	// Queues are those that instances share, with their weights; OwnQueue is the
	// instance's own.
	Queues   map[string]int
	OwnQueue string
	// Concurrency is how many jobs of Queues run at once, and Fetchers how many servers
	// share them.
	Concurrency, Fetchers int
	ShutdownTimeout       time.Duration
	// MaxPayload is that of the client that handlers get; see [tasks.Client].
	MaxPayload int
	// BaseContext is the parent of the contexts of jobs.
	BaseContext context.Context
	Log         *slog.Logger
}

// Delivery is the parts of the delivery. Each has Start and Stop.
type Delivery struct {
	Breaker  *Breaker
	Executor *Executor
	Rescue   *Rescue
	Servers  *Servers
}

// New makes the parts, without starting them.
func New(cfg Config) *Delivery {
	breaker := newBreaker(cfg.DB, cfg.Concurrency, cfg.Log)
	ending, end := context.WithCancelCause(context.Background())
	client := tasks.NewClient(cfg.Redis)
	client.MaxPayload = cfg.MaxPayload
	executor := &Executor{
		tasks: cfg.Tasks, rdb: cfg.Redis, client: client, locks: unique.NewLocks(cfg.Redis),
		inspector: asynq.NewInspectorFromRedisClient(cfg.Redis),
		db:        cfg.DB, breaker: breaker, acks: newAckHook(), log: cfg.Log, ending: ending, end: end,
	}
	cfg.ServersRedis.AddHook(executor.acks)
	queues := append(slices.Sorted(maps.Keys(cfg.Queues)), cfg.OwnQueue)
	return &Delivery{
		Breaker:  breaker,
		Executor: executor,
		Rescue:   newRescue(cfg.Redis, queues, leaseStill, cfg.Log),
		Servers:  &Servers{cfg: cfg, executor: executor},
	}
}
