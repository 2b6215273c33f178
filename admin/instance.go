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

// Instance is the snapshot of one worker process, which it writes to Redis every few
// seconds.
type Instance struct {
	// Name is different for any two instances that live at once.
	Name    string `json:"name"`
	Version string `json:"version"`
	Host    string `json:"host"`
	PID     int    `json:"pid"`
	// Started, and Seen, when the snapshot was taken, are by the instance's clock.
	Started time.Time `json:"started"`
	Seen    time.Time `json:"seen"`
	// Queues are those it shares with others, with their weights; OwnQueue is
	// the one that only it pulls from.
	Queues   map[string]int `json:"queues"`
	OwnQueue string         `json:"own_queue"`
	// Concurrency is how many jobs it runs at most at once, without those of OwnQueue;
	// Running is how many it runs, with them.
	Concurrency int `json:"hands"`
	Running     int `json:"running"`
	Fetchers    int `json:"fetchers"`
	// Pool is how its pool of connections stands.
	Pool InstancePool `json:"pool"`
	// DatabaseAway is true while its jobs wait for the database to come back.
	DatabaseAway bool `json:"database_away"`
}

// Weights are the shared queues as "critical=6,default=3", the heaviest first.
func (i Instance) Weights() string {
	names := slices.SortedFunc(maps.Keys(i.Queues), func(a, b string) int {
		return cmp.Or(i.Queues[b]-i.Queues[a], strings.Compare(a, b))
	})
	for n, name := range names {
		names[n] += "=" + strconv.Itoa(i.Queues[name])
	}
	return strings.Join(names, ",")
}

// InstancePool is of a pool's statistics what the record after each job has too.
type InstancePool struct {
	PoolSize   int `json:"pool_size"`
	CheckedIn  int `json:"checked_in"`
	CheckedOut int `json:"checked_out"`
	Overflow   int `json:"overflow"`
	Invalid    int `json:"invalid"`
	Waiting    int `json:"waiting"`
}

// MissingInstance is one that has not written its snapshot in time.
type MissingInstance struct {
	Name string `json:"name"`
	// Seen is when it last did.
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
