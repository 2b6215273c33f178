package admin

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/carpool-go/carpool/internal/instance"
)

// Instance is the snapshot of one worker process, which the worker writes to Redis every
// few seconds.
type Instance struct {
	// Name is different for any two instances that live at once.
	Name string `json:"name"`
	// Version is that of the worker's program.
	Version string `json:"version"`
	Host    string `json:"host"`
	PID     int    `json:"pid"`
	// Started is when the worker started, by the clock of its host.
	Started time.Time `json:"started"`
	// Seen is when the snapshot was taken, by the clock of its host.
	Seen time.Time `json:"seen"`
	// Queues are the queues that it shares with other instances, with their weights.
	Queues map[string]int `json:"queues"`
	// OwnQueue is the queue that only this instance pulls from.
	OwnQueue string `json:"own_queue"`
	// Kinds are the kinds of job that it knows, sorted; nil for an instance of an older
	// version, whose snapshot doesn't say.
	Kinds []string `json:"kinds,omitempty"`
	// Concurrency is how many jobs it runs at most at once, without those of OwnQueue.
	Concurrency int `json:"hands"`
	// Running is how many jobs it runs, with those of OwnQueue.
	Running int `json:"running"`
	// Pool is how its pool of connections stands.
	Pool InstancePool `json:"pool"`
	// DatabaseAway is true while its jobs wait for the database to come back.
	DatabaseAway bool `json:"database_away"`
	// Blocked is why its transactional jobs can't begin although the database answers, such
	// as a missing privilege; "" if nothing is known of it.
	Blocked string `json:"blocked,omitempty"`
}

// Weights returns Queues as "critical=6,default=3", the heaviest first.
func (i Instance) Weights() string {
	names := slices.SortedFunc(maps.Keys(i.Queues), func(a, b string) int {
		return cmp.Or(i.Queues[b]-i.Queues[a], strings.Compare(a, b))
	})
	for n, name := range names {
		names[n] += "=" + strconv.Itoa(i.Queues[name])
	}
	return strings.Join(names, ",")
}

// knownKinds returns the kinds that at least one of the instances knows, sorted. ok is false
// if that can't be said: there is no instance, or one whose snapshot doesn't say.
func knownKinds(instances []Instance) (kinds []string, ok bool) {
	for _, i := range instances {
		if i.Kinds == nil {
			return nil, false
		}
		kinds = append(kinds, i.Kinds...)
	}
	slices.Sort(kinds)
	return slices.Compact(kinds), len(instances) > 0
}

// KnownKinds returns the kinds of job that the instances know that are up, sorted. ok is
// false if that can't be said: no instance is up, or one of an older version is, as during
// a deploy, whose snapshot doesn't say what it knows. The error is Redis'.
func (a *Admin) KnownKinds(ctx context.Context) (kinds []string, ok bool, err error) {
	up, _, err := readInstances(ctx, a.rdb)
	if err != nil {
		return nil, false, err
	}
	kinds, ok = knownKinds(up)
	return kinds, ok, nil
}

// InstancePool is how the pool of an instance stands, in numbers of connections as
// [dbpool.Stats] has them: the six that the record after each job has too.
type InstancePool struct {
	PoolSize   int `json:"pool_size"`
	CheckedIn  int `json:"checked_in"`
	CheckedOut int `json:"checked_out"`
	Overflow   int `json:"overflow"`
	Invalid    int `json:"invalid"`
	// Waiting is how many jobs wait for a connection.
	Waiting int `json:"waiting"`
}

// MissingInstance is an instance whose last snapshot is too old, because it has died or
// does not reach Redis.
type MissingInstance struct {
	Name string `json:"name"`
	// Seen is when it last wrote one.
	Seen time.Time `json:"seen"`
}

// readInstances reads the instances' snapshots, the oldest instance first, and who should
// have written theirs.
func readInstances(ctx context.Context, rdb redis.UniversalClient) (up []Instance, missing []MissingInstance, err error) {
	names, err := rdb.ZRangeWithScores(ctx, instance.Names, 0, -1).Result()
	if err != nil {
		return nil, nil, fmt.Errorf("read the names of the instances: %w", err)
	}
	up, missing = []Instance{}, []MissingInstance{} // for JSON, where none is []
	snapshots := make([]*redis.StringCmd, len(names))
	_, err = rdb.Pipelined(ctx, func(p redis.Pipeliner) error {
		for i, z := range names {
			snapshots[i] = p.Get(ctx, instance.SnapshotKey(z.Member.(string)))
		}
		return nil
	})
	if err != nil && !errors.Is(err, redis.Nil) {
		return nil, nil, fmt.Errorf("read the figures of the instances: %w", err)
	}
	for i, z := range names {
		name := z.Member.(string)
		data, err := snapshots[i].Bytes()
		if errors.Is(err, redis.Nil) {
			missing = append(missing, MissingInstance{name, time.Unix(int64(z.Score), 0)})
			continue
		}
		if err != nil {
			return nil, nil, fmt.Errorf("read the figures of the instances: %w", err)
		}
		var one Instance
		if err := json.Unmarshal(data, &one); err != nil {
			return nil, nil, fmt.Errorf("read the figures of the instance %s: %w", name, err)
		}
		up = append(up, one)
	}
	slices.SortFunc(up, func(a, b Instance) int {
		return cmp.Or(a.Started.Compare(b.Started), cmp.Compare(a.Name, b.Name))
	})
	return up, missing, nil
}
