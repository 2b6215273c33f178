// Package fleet shows an instance of a worker to the others, and removes what is left of
// those that died.
package fleet

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/carpool-go/carpool/admin"
	"github.com/carpool-go/carpool/dbpool"
	"github.com/carpool-go/carpool/internal/asynqwire"
	"github.com/carpool-go/carpool/internal/instance"
	"github.com/carpool-go/carpool/internal/wait"
)

// Fleet is one instance's membership in the fleet of all instances that share a Redis. Its
// heartbeat writes the instance's snapshot to Redis, where the others and operators see
// it, and its sweep removes the queues of instances that died without a word.
type Fleet struct {
	cfg Config

	ending context.Context // ends with Stop
	end    context.CancelFunc
	loops  sync.WaitGroup

	mu      sync.Mutex // is held while a snapshot is written; guards member and failing
	member  bool       // from Start to Stop
	failing bool       // the last snapshot did not reach Redis

	// missing has the instances whose snapshots were missing at the last sweep, each with
	// the time of the first sweep since which they have been. Only sweepDead uses it.
	missing map[string]time.Time
}

// Config is what a [Fleet] works with. All fields are required.
type Config struct {
	Redis redis.UniversalClient
	// Self is the part of this instance's snapshot that doesn't change. Its Name and
	// OwnQueue belong together; see internal/instance.
	Self admin.Instance
	// Running, Pool, DatabaseAway and Blocked are called for the rest of each snapshot.
	Running      func() int
	Pool         func() dbpool.Stats
	DatabaseAway func() bool
	Blocked      func() string
	Log          *slog.Logger
}

// New returns a fleet that [Fleet.Start] starts. It asks Redis nothing.
func New(cfg Config) *Fleet {
	f := &Fleet{cfg: cfg}
	f.ending, f.end = context.WithCancel(context.Background())
	return f
}

const (
	// heartbeatEvery is how often an instance writes its snapshot, and snapshotTTL how long
	// Redis keeps it: two heartbeats may be lost.
	heartbeatEvery = 5 * time.Second
	snapshotTTL    = 15 * time.Second
	// sweepEvery is how often each instance sweeps, give or take a quarter of it.
	sweepEvery = time.Minute
	// missingFor is how far apart two sweeps must be that both find an instance's snapshot
	// missing before it counts as dead.
	missingFor = 30 * time.Second
	// redisTimeout bounds one exchange with Redis, and twice as long a sweep.
	redisTimeout = 3 * time.Second
)

// Start writes the first snapshot before it returns, and the next ones until [Fleet.Stop].
// It returns nil, also while Redis is away, because a later heartbeat may reach it.
func (f *Fleet) Start() error {
	f.mu.Lock()
	f.member = true
	f.mu.Unlock()
	f.Heartbeat(f.ending)
	f.loops.Go(func() {
		for wait.For(f.ending, heartbeatEvery) == nil {
			f.Heartbeat(f.ending)
		}
	})
	f.loops.Go(func() {
		for wait.For(f.ending, sweepEvery*3/4+rand.N(sweepEvery/2)) == nil {
			ctx, cancel := context.WithTimeout(f.ending, 2*redisTimeout)
			if err := f.sweepDead(ctx, time.Now()); err != nil && f.ending.Err() == nil {
				f.cfg.Log.Warn("the queues of dead instances could not be looked for; the next minute tries again", "error", err)
			}
			cancel()
		}
	})
	return nil
}

// Stop takes this instance out of Redis, its own queue too. It is to be called when
// nothing enqueues to that queue any more, because that would make it anew. Stop may be
// called twice, and without [Fleet.Start]; it then leaves Redis as it is.
func (f *Fleet) Stop() {
	f.end()
	f.loops.Wait()
	f.mu.Lock()
	defer f.mu.Unlock()
	if !f.member {
		return
	}
	f.member = false
	ctx, cancel := context.WithTimeout(context.Background(), redisTimeout)
	defer cancel()
	err := f.cfg.Redis.Del(ctx, instance.SnapshotKey(f.cfg.Self.Name)).Err()
	if err == nil {
		_, err = f.remove(ctx, f.cfg.Self.Name)
	}
	if err != nil {
		f.cfg.Log.Warn("this instance's own queue could not be removed; another instance will", "queue", f.cfg.Self.OwnQueue, "error", err)
	}
}

// Heartbeat writes this instance's snapshot as it is now, and nothing before [Fleet.Start]
// or after [Fleet.Stop]. It logs the first of several failures in succession, and the
// success that ends them.
func (f *Fleet) Heartbeat(ctx context.Context) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if !f.member {
		return
	}
	err := f.write(ctx)
	switch {
	case ctx.Err() != nil: // which says nothing about Redis
	case err != nil && !f.failing:
		f.failing = true
		f.cfg.Log.Warn("this instance's figures could not be written; the command status doesn't show it", "error", err)
	case err == nil && f.failing:
		f.failing = false
		f.cfg.Log.Info("this instance's figures can be written again")
	}
}

func (f *Fleet) write(ctx context.Context) error {
	data, err := json.Marshal(f.snapshot())
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, redisTimeout)
	defer cancel()
	queues, err := f.queuesWithJobs(ctx)
	if err != nil {
		return err
	}
	_, err = f.cfg.Redis.Pipelined(ctx, func(p redis.Pipeliner) error {
		p.ZAdd(ctx, instance.Names, redis.Z{Score: float64(time.Now().Unix()), Member: f.cfg.Self.Name})
		p.Set(ctx, instance.SnapshotKey(f.cfg.Self.Name), data, snapshotTTL)
		// asynq lists a queue when it first enqueues to it, once in a process. If others
		// took this instance for dead, somebody removed a queue, or Redis has lost its data,
		// nobody else lists it again.
		p.SAdd(ctx, asynqwire.Queues, append(queues, f.cfg.Self.OwnQueue)...)
		return nil
	})
	return err
}

// queuesWithJobs returns those of the queues that this instance shares with others that
// have jobs in any state.
func (f *Fleet) queuesWithJobs(ctx context.Context) (names []any, err error) {
	queues := slices.Sorted(maps.Keys(f.cfg.Self.Queues))
	have := make([]*redis.IntCmd, len(queues))
	_, err = f.cfg.Redis.Pipelined(ctx, func(p redis.Pipeliner) error {
		for i, queue := range queues {
			have[i] = p.Exists(ctx, asynqwire.Jobs(queue)...)
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	for i, queue := range queues {
		if have[i].Val() > 0 {
			names = append(names, queue)
		}
	}
	return names, nil
}

func (f *Fleet) snapshot() admin.Instance {
	now := f.cfg.Self
	now.Seen = time.Now()
	now.Running, now.DatabaseAway, now.Blocked = f.cfg.Running(), f.cfg.DatabaseAway(), f.cfg.Blocked()
	s := f.cfg.Pool()
	now.Pool = admin.InstancePool{
		PoolSize: s.PoolSize, CheckedIn: s.CheckedIn, CheckedOut: s.CheckedOut,
		Overflow: s.Overflow, Invalid: s.Invalid, Waiting: s.Waiting,
	}
	return now
}

// sweepDead removes the queues of the instances that an earlier sweep, at least missingFor
// before now, and each sweep since have found missing. now is a parameter for the tests'
// sake.
func (f *Fleet) sweepDead(ctx context.Context, now time.Time) error {
	absent, err := absentInstances(ctx, f.cfg.Redis)
	if err != nil {
		return err
	}
	missing := make(map[string]time.Time)
	for _, name := range absent {
		since, before := f.missing[name]
		if !before {
			since = now
		}
		missing[name] = since
	}
	f.missing = missing
	var errs []error
	for name, since := range missing {
		if name == f.cfg.Self.Name || now.Sub(since) < missingFor {
			continue
		}
		removed, err := f.remove(ctx, name)
		switch {
		case err != nil:
			errs = append(errs, err)
		case removed:
			delete(f.missing, name)
			f.cfg.Log.Info("an instance has died without a word; its queue is removed", "instance", name, "queue", instance.Queue(name))
		}
	}
	return errors.Join(errs...)
}

// absentInstances returns the names of the instances that Redis knows, by their names or
// by their queues, and that show no sign of life.
func absentInstances(ctx context.Context, rdb redis.UniversalClient) ([]string, error) {
	names, err := rdb.ZRange(ctx, instance.Names, 0, -1).Result()
	if err != nil {
		return nil, fmt.Errorf("read the names of the instances: %w", err)
	}
	queues, err := rdb.SMembers(ctx, asynqwire.Queues).Result()
	if err != nil {
		return nil, fmt.Errorf("read the names of the queues: %w", err)
	}
	for _, queue := range queues {
		if instance.IsQueue(queue) {
			names = append(names, instance.OfQueue(queue))
		}
	}
	slices.Sort(names)
	names = slices.Compact(names)

	alive := make([]*redis.IntCmd, len(names))
	_, err = rdb.Pipelined(ctx, func(p redis.Pipeliner) error {
		for i, name := range names {
			alive[i] = p.Exists(ctx, instance.SnapshotKey(name))
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("read the figures of the instances: %w", err)
	}
	// That is the second sign of life, for instances that write no snapshot.
	served, err := asynqwire.ServedQueues(rdb)
	if err != nil {
		return nil, err
	}
	var absent []string
	for i, name := range names {
		if alive[i].Val() == 0 && !slices.Contains(served, instance.Queue(name)) {
			absent = append(absent, name)
		}
	}
	return absent, nil
}

// remove removes an instance's queue, with all that is in it, and its name, unless its
// snapshot is there. It reports whether it did.
func (f *Fleet) remove(ctx context.Context, name string) (removed bool, err error) {
	queue := instance.Queue(name)
	removed, err = asynqwire.RemoveQueue(ctx, f.cfg.Redis, queue, instance.SnapshotKey(name))
	if err != nil {
		return false, fmt.Errorf("remove the queue %s: %w", queue, err)
	}
	if !removed {
		return false, nil
	}
	if err := f.cfg.Redis.ZRem(ctx, instance.Names, name).Err(); err != nil {
		return false, fmt.Errorf("remove the name of the queue %s: %w", queue, err)
	}
	return true, nil
}
