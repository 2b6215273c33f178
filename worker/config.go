package worker

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"slices"
	"strings"
	"time"

	"github.com/carpool-go/carpool/dbpool"
	"github.com/carpool-go/carpool/internal/asynqwire"
	"github.com/carpool-go/carpool/internal/instance"
	"github.com/carpool-go/carpool/internal/limit"
	"github.com/carpool-go/carpool/outbound"
	"github.com/carpool-go/carpool/scheduler"
	"github.com/carpool-go/carpool/tasks"
	"github.com/carpool-go/carpool/worker/internal/delivery"
)

// Config says how a worker runs. RedisURL and Pool are required.
type Config struct {
	// RedisURL is the Redis that holds the queues, as [tasks.OpenRedis] takes it. Required.
	RedisURL string
	// Pool is the pool of connections that jobs share; begin with [dbpool.DefaultConfig].
	// Its Logger is the worker's if it is nil. Required.
	Pool dbpool.Config
	// Groups are the kinds of job that the worker runs, besides those that every worker
	// has. A group with the methods Start(context.Context) error and Stop() has them called
	// around the run. Start's context ends when the worker is to stop, while jobs may still
	// run; Stop is called when none does any more.
	Groups []tasks.Group
	// Schedules are entries that the worker brings along, besides carpool's own.
	Schedules []scheduler.Entry
	// Queues are those to pull from, with their weights, 1 to [MaxWeight]; nil means
	// critical=6, default=3, low=1.
	Queues map[string]int
	// Concurrency is how many jobs run at once, up to [MaxConcurrency]; 0 means 10.
	Concurrency int
	// ShutdownTimeout is how long jobs may go on when the worker is to stop, before their
	// contexts end and they are pushed back; 0 means 25 s, less none.
	ShutdownTimeout time.Duration
	// StartupTimeout is how long servers that are down are waited for at the start; 0 means
	// 60 s, less not at all.
	StartupTimeout time.Duration
	// ValidateEvery is the time between two validations of the pool, 1 s at least; 0 means a
	// minute.
	ValidateEvery time.Duration
	// MaxPayload is how many bytes of JSON a job's payload may have, and its result, from
	// [LeastMaxPayload] to [MostMaxPayload]; 0 means [tasks.DefaultMaxPayload]. The worker
	// writes it to the database when it starts, for carpool.enqueue and the outbox; of
	// several workers the one that starts last counts there.
	MaxPayload int
	// OutboundAllow are addresses that jobs may call although they are not public, as
	// [outbound.New] takes them; "" is none.
	OutboundAllow string
	// HealthAddr is where /livez and /readyz are served while the worker starts, runs and
	// stops, as host:port; "" is nowhere. /livez is answered with 200; /readyz with 200 while
	// both servers answer and jobs are fetched, and else with 503.
	HealthAddr string
	// Burst has the worker work off what is queued and due, and then stop.
	Burst bool
	// Name begins the name of the instance, which a random part makes unique; "" is the
	// host's name.
	Name string
	// Version is the program's, for the log and the status; "" is shown as such.
	Version string
	// Logger takes what the worker logs; nil is [slog.Default].
	Logger *slog.Logger
}

const (
	// MaxConcurrency is more jobs at once than one process does well.
	MaxConcurrency = 10_000
	// MaxWeight is the largest weight of a queue.
	MaxWeight = 1000
	// LeastMaxPayload and MostMaxPayload bound [Config.MaxPayload]. A payload is in a
	// worker's memory several times.
	LeastMaxPayload = 1 << 10
	MostMaxPayload  = 16 << 20
)

func (c Config) withDefaults() Config {
	if c.Queues == nil {
		c.Queues = map[string]int{"critical": 6, "default": 3, "low": 1}
	}
	c.Concurrency = cmp.Or(c.Concurrency, 10)
	c.ShutdownTimeout = max(0, cmp.Or(c.ShutdownTimeout, 25*time.Second))
	c.StartupTimeout = max(0, cmp.Or(c.StartupTimeout, time.Minute))
	c.ValidateEvery = cmp.Or(c.ValidateEvery, time.Minute)
	c.MaxPayload = cmp.Or(c.MaxPayload, tasks.DefaultMaxPayload)
	if c.Logger == nil {
		c.Logger = slog.Default()
	}
	if c.Pool.Logger == nil {
		c.Pool.Logger = c.Logger
	}
	return c
}

// Validate reports every fault at once, a line each that begins with the name of the
// field. It never shows a URL, which may hold a password.
func (c Config) Validate() error {
	c = c.withDefaults()
	var faults []error
	add := func(format string, args ...any) { faults = append(faults, fmt.Errorf(format, args...)) }
	if rdb, err := tasks.OpenRedis(c.RedisURL); err != nil {
		add("RedisURL: %s", strings.TrimPrefix(err.Error(), "tasks: redis URL: "))
	} else {
		_ = rdb.Close()
	}
	if err := c.Pool.Validate(); err != nil {
		add("Pool: %s", strings.TrimPrefix(err.Error(), "dbpool: "))
	}
	set, err := Kinds(c.Groups...)
	if err != nil {
		add("Groups: %w", err)
	}
	names := make(map[string]bool)
	for _, e := range ownSchedules() {
		names[e.Name] = true
	}
	for _, e := range c.Schedules {
		if err := e.Validate(); err != nil {
			for fault := range strings.SplitSeq(err.Error(), "\n") {
				add("Schedules: entry %.100q: %s", e.Name, fault)
			}
			continue
		}
		if names[e.Name] {
			add("Schedules: entry %.100q: name: there are two of it", e.Name)
		}
		names[e.Name] = true
		if data, err := json.Marshal(e.Payload); err != nil {
			add("Schedules: entry %.100q: payload: %w", e.Name, err)
		} else if err := limit.Check(len(data), c.MaxPayload); err != nil {
			add("Schedules: entry %.100q: payload: %w", e.Name, err)
		}
		if set == nil {
			continue
		}
		if _, err := set.Lookup(e.Payload.Kind()); err != nil {
			add("Schedules: entry %.100q: kind: %w", e.Name, err)
		}
	}
	if len(c.Queues) == 0 {
		add("Queues: there is none; nil means the default ones")
	}
	for _, queue := range slices.Sorted(maps.Keys(c.Queues)) {
		if !asynqwire.IsQueueName(queue) {
			add("Queues: %q is no queue's name: 1 to 100 letters, digits, and _ . : -", queue)
		}
		if strings.HasPrefix(queue, instance.QueuePrefix) {
			add("Queues: %q: names that begin with %s are the instances' own", queue, instance.QueuePrefix)
		}
		if weight := c.Queues[queue]; weight < 1 || weight > MaxWeight {
			add("Queues: %q has the weight %d, which is not from 1 to %d", queue, weight, MaxWeight)
		}
	}
	if c.Concurrency < 1 || c.Concurrency > MaxConcurrency {
		add("Concurrency: %d is not from 1 to %d", c.Concurrency, MaxConcurrency)
	}
	if c.ValidateEvery < time.Second {
		add("ValidateEvery: %s is less than 1s", c.ValidateEvery)
	}
	if c.MaxPayload < LeastMaxPayload || c.MaxPayload > MostMaxPayload {
		add("MaxPayload: %d is not from %d to %d bytes", c.MaxPayload, LeastMaxPayload, MostMaxPayload)
	}
	if _, _, err := net.SplitHostPort(c.HealthAddr); c.HealthAddr != "" && err != nil {
		add("HealthAddr: %q is not host:port", c.HealthAddr)
	}
	if _, err := outbound.New(c.OutboundAllow); err != nil {
		add("OutboundAllow: %w", err)
	}
	return errors.Join(faults...)
}

// stopGrace is what stopping may take beyond the time that jobs are given. It is
// needed when Redis doesn't answer.
const stopGrace = 5 * time.Second

// StopsWithin is how long after the end of its context [Run] has returned, if no handler
// ignores the end of its own, the servers answer, and the groups' Stop takes no time.
func (c Config) StopsWithin() time.Duration {
	return c.withDefaults().ShutdownTimeout + delivery.EndingGrace + stopGrace
}
