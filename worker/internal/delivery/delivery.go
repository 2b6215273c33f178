// Package delivery is what surrounds asynq in a worker: the executor that every job runs
// in, the circuit breaker of the database, the servers with the client that answers for
// Redis (fetches in groups, leases that are fenced, ends that arrive), and the rescue of
// jobs whose workers died. It knows no kind of job by its name.
package delivery

import (
	"context"
	"log/slog"
	"maps"
	"slices"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/carpool-go/carpool/dbpool"
	"github.com/carpool-go/carpool/internal/unique"
	"github.com/carpool-go/carpool/tasks"
)

// Config is what a [Delivery] works with. All fields but MaxPayload are required.
type Config struct {
	Tasks *tasks.Set
	Redis redis.UniversalClient
	// ServersRedis is a client for what is asked for asynq's servers, and LooksRedis one
	// for what waits in Redis for jobs, a connection for each queue. The delivery closes
	// LooksRedis when it stops, which is the only way to end that waiting.
	ServersRedis, LooksRedis redis.UniversalClient
	DB                       *dbpool.Pool
	// Queues are those that instances share, with their weights; OwnQueue is the
	// instance's own.
	Queues   map[string]int
	OwnQueue string
	// Concurrency is how many jobs of Queues run at once.
	Concurrency     int
	ShutdownTimeout time.Duration
	// MaxPayload is that of the client that handlers get; see [tasks.Client].
	MaxPayload int
	// BaseContext is the parent of the contexts of jobs.
	BaseContext context.Context
	// Fail is called with what keeps the delivery from going on. It returns at once.
	Fail func(error)
	Log  *slog.Logger
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
	queues := append(slices.Sorted(maps.Keys(cfg.Queues)), cfg.OwnQueue)
	jobs := &held{rdb: cfg.ServersRedis, log: cfg.Log, jobs: make(map[string]*heldJob)}
	later := newDue(cfg.ServersRedis, queues, cfg.Log)
	told := newEnds(cfg.ServersRedis, jobs, later, cfg.Log)
	client := tasks.NewClient(cfg.Redis)
	client.MaxPayload = cfg.MaxPayload
	executor := &Executor{
		tasks: cfg.Tasks, rdb: cfg.Redis, client: client, locks: unique.NewLocks(cfg.Redis),
		db: cfg.DB, breaker: breaker, held: jobs, ends: told, log: cfg.Log, retryDelay: retryDelay, ending: ending, end: end,
	}
	return &Delivery{
		Breaker:  breaker,
		Executor: executor,
		Rescue:   newRescue(cfg.Redis, queues, leaseStill, cfg.Log),
		Servers:  newServers(cfg, executor, jobs, told, later),
	}
}
