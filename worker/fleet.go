package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/hibiken/asynq"
	"github.com/redis/go-redis/v9"

	"github.com/carpool-go/carpool/dbpool"
	"github.com/carpool-go/carpool/internal/asynqkey"
)

// fleet is what one instance has to do with the others: it shows them its
// figures in Redis, and removes the queues of those that died without a word.
//
// Its fields are set before start and not changed afterwards.
type fleet struct {
	rdb redis.UniversalClient
	// self is what doesn't change of this instance's figures.
	self instance
	// running, pool and away are asked for the rest each time.
	running func() int
	pool    func() dbpool.Stats
	away    func() bool
	log     *slog.Logger

	ending context.Context
	end    context.CancelFunc
	loops  sync.WaitGroup

	mu      sync.Mutex // is held while the figures are written
	stopped bool
	failing bool // the last figures did not reach Redis

	// missing has the instances whose figures were missing at the last look,
	// with the time of the first look of which that is true. Only look uses it.
	missing map[string]time.Time
}

// instance is one worker process as it shows itself in Redis, and as `worker
// status --json` prints it.
type instance struct {
	// Name is different for any two processes that live at once.
	Name    string `json:"name"`
	Version string `json:"version"`
	Host    string `json:"host"`
	PID     int    `json:"pid"`
	// Started and Seen, when the figures were taken, are by the instance's clock.
	Started time.Time `json:"started"`
	Seen    time.Time `json:"seen"`
	// Queues are those it shares with others, with their weights; OwnQueue is
	// the one that only it pulls from.
	Queues   map[string]int `json:"queues"`
	OwnQueue string         `json:"own_queue"`
	// Hands is how many jobs it runs at most at once, without those of OwnQueue;
	// Running is how many it runs, with them.
	Hands    int `json:"hands"`
	Running  int `json:"running"`
	Fetchers int `json:"fetchers"`
	// Pool is how its pool of connections stands.
	Pool instancePool `json:"pool"`
	// DatabaseAway is true while its jobs wait for the database to come back.
	DatabaseAway bool `json:"database_away"`
}

// instancePool is of [dbpool.Stats] what the record after each job has too.
type instancePool struct {
	PoolSize   int `json:"pool_size"`
	CheckedIn  int `json:"checked_in"`
	CheckedOut int `json:"checked_out"`
	Overflow   int `json:"overflow"`
	Invalid    int `json:"invalid"`
	Waiting    int `json:"waiting"`
}

const (
	// beatEvery is how often an instance writes its figures, and figuresTTL how
	// long they are there without being written again: two may be lost.
	beatEvery  = 5 * time.Second
	figuresTTL = 15 * time.Second
	// lookEvery is how often each instance looks for dead ones, give or take a
	// quarter of it.
	lookEvery = time.Minute
	// missingFor is how far apart two looks must be that both find an instance's
	// figures missing before it counts as dead.
	missingFor = 30 * time.Second
	// fleetTimeout bounds one exchange with Redis.
	fleetTimeout = 3 * time.Second
)

// instancesKey is a sorted set of the names of all instances, with the time when
// each last wrote its figures, so that nobody has to scan for them.
const instancesKey = "carpool:instances"

// figuresKey is where an instance's figures are. The braces put it where Redis
// Cluster has the instance's own queue, so that one script can read the one and
// remove the other.
func figuresKey(name string) string { return "carpool:instance:{" + instanceQueue(name) + "}" }

const instanceQueuePrefix = "instance-"

// instanceQueue is the queue that only this instance pulls from.
func instanceQueue(name string) string { return instanceQueuePrefix + name }

// start writes the first figures before it returns, and goes on until stop. That
// Redis doesn't answer is no error: it may tomorrow.
func (f *fleet) start() {
	f.ending, f.end = context.WithCancel(context.Background())
	f.beat(f.ending)
	f.loops.Go(func() {
		for f.sleep(beatEvery) {
			f.beat(f.ending)
		}
	})
	f.loops.Go(func() {
		for f.sleep(lookEvery*3/4 + rand.N(lookEvery/2)) {
			ctx, cancel := context.WithTimeout(f.ending, 2*fleetTimeout)
			if err := f.look(ctx, time.Now()); err != nil && f.ending.Err() == nil {
				f.log.Warn("the queues of dead instances could not be looked for; the next minute tries again", "error", err)
			}
			cancel()
		}
	})
}

// sleep returns false once the fleet is stopped.
func (f *fleet) sleep(d time.Duration) bool {
	select {
	case <-f.ending.Done():
		return false
	case <-time.After(d):
		return true
	}
}

// stop takes this instance out of Redis, its own queue too. It is to be called
// when nothing runs and nothing is enqueued any more; nothing is written after it.
func (f *fleet) stop() {
	f.end()
	f.loops.Wait()
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.stopped {
		return
	}
	f.stopped = true
	ctx, cancel := context.WithTimeout(context.Background(), fleetTimeout)
	defer cancel()
	err := f.rdb.Del(ctx, figuresKey(f.self.Name)).Err()
	if err == nil {
		_, err = f.remove(ctx, f.self.Name)
	}
	if err != nil {
		f.log.Warn("this instance's own queue could not be removed; another instance will", "queue", f.self.OwnQueue, "error", err)
	}
}

// beat writes this instance's figures as they are now. Failing to is logged once,
// until it works again.
func (f *fleet) beat(ctx context.Context) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.stopped {
		return
	}
	err := f.write(ctx)
	switch {
	case ctx.Err() != nil:
	case err != nil && !f.failing:
		f.failing = true
		f.log.Warn("this instance's figures could not be written; `worker status` doesn't show it", "error", err)
	case err == nil && f.failing:
		f.failing = false
		f.log.Info("this instance's figures can be written again")
	}
}

func (f *fleet) write(ctx context.Context) error {
	data, err := json.Marshal(f.figures())
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, fleetTimeout)
	defer cancel()
	_, err = f.rdb.Pipelined(ctx, func(p redis.Pipeliner) error {
		p.ZAdd(ctx, instancesKey, redis.Z{Score: float64(time.Now().Unix()), Member: f.self.Name})
		p.Set(ctx, figuresKey(f.self.Name), data, figuresTTL)
		// asynq lists a queue when it first enqueues to it, once in a process. If
		// others took this instance for dead, nobody else lists it again.
		p.SAdd(ctx, asynqQueues, f.self.OwnQueue)
		return nil
	})
	return err
}

func (f *fleet) figures() instance {
	now := f.self
	now.Seen = time.Now()
	now.Running, now.DatabaseAway = f.running(), f.away()
	s := f.pool()
	now.Pool = instancePool{
		PoolSize: s.PoolSize, CheckedIn: s.CheckedIn, CheckedOut: s.CheckedOut,
		Overflow: s.Overflow, Invalid: s.Invalid, Waiting: s.Waiting,
	}
	return now
}

// look removes the queues of instances whose figures were missing before, at
// least missingFor ago, and still are.
func (f *fleet) look(ctx context.Context, now time.Time) error {
	absent, err := absentInstances(ctx, f.rdb)
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
		if name == f.self.Name || now.Sub(since) < missingFor {
			continue
		}
		removed, err := f.remove(ctx, name)
		switch {
		case err != nil:
			errs = append(errs, err)
		case removed:
			delete(f.missing, name)
			f.log.Info("an instance has died without a word; its queue is removed", "instance", name, "queue", instanceQueue(name))
		}
	}
	return errors.Join(errs...)
}

// absentInstances are those that Redis knows, by their names or by their queues,
// and that show no sign of life.
func absentInstances(ctx context.Context, rdb redis.UniversalClient) ([]string, error) {
	names, err := rdb.ZRange(ctx, instancesKey, 0, -1).Result()
	if err != nil {
		return nil, fmt.Errorf("read the names of the instances: %w", err)
	}
	queues, err := rdb.SMembers(ctx, asynqQueues).Result()
	if err != nil {
		return nil, fmt.Errorf("read the names of the queues: %w", err)
	}
	for _, queue := range queues {
		if instanceQueueName.MatchString(queue) {
			names = append(names, strings.TrimPrefix(queue, instanceQueuePrefix))
		}
	}
	slices.Sort(names)
	names = slices.Compact(names)

	alive := make([]*redis.IntCmd, len(names))
	_, err = rdb.Pipelined(ctx, func(p redis.Pipeliner) error {
		for i, name := range names {
			alive[i] = p.Exists(ctx, figuresKey(name))
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("read the figures of the instances: %w", err)
	}
	served, err := servedQueues(rdb)
	if err != nil {
		return nil, err
	}
	var absent []string
	for i, name := range names {
		if alive[i].Val() == 0 && !served[instanceQueue(name)] {
			absent = append(absent, name)
		}
	}
	return absent, nil
}

// instanceQueueName matches the queues whose names are made from an
// [instanceName], and not a queue of the user's that only begins like them.
var instanceQueueName = regexp.MustCompile(`^` + instanceQueuePrefix + `.+-[0-9a-f]{8}$`)

// servedQueues are those that asynq says a server of its own pulls from. It is the
// second sign of life, of instances that write no figures.
func servedQueues(rdb redis.UniversalClient) (map[string]bool, error) {
	servers, err := asynq.NewInspectorFromRedisClient(rdb).Servers()
	if err != nil {
		return nil, fmt.Errorf("read asynq's servers: %w", err)
	}
	served := make(map[string]bool)
	for _, server := range servers {
		for queue := range server.Queues {
			served[queue] = true
		}
	}
	return served, nil
}

// remove removes an instance's queue, with all that is in it, and its name, if
// its figures are still missing.
func (f *fleet) remove(ctx context.Context, name string) (removed bool, err error) {
	queue := instanceQueue(name)
	keys := []string{figuresKey(name)}
	for _, key := range []string{"pending", "active", "scheduled", "retry", "archived", "completed", "lease", "paused", "processed", "failed"} {
		keys = append(keys, asynqkey.List(queue, key))
	}
	for day := range statsDays {
		date := time.Now().UTC().AddDate(0, 0, 1-day).Format(time.DateOnly)
		keys = append(keys, asynqkey.List(queue, "processed:"+date), asynqkey.List(queue, "failed:"+date))
	}
	gone, err := removeQueue.Run(ctx, f.rdb, keys, asynqkey.Task(queue, "")).Int()
	if err != nil {
		return false, fmt.Errorf("remove the queue %s: %w", queue, err)
	}
	if gone == 0 {
		return false, nil
	}
	_, err = f.rdb.Pipelined(ctx, func(p redis.Pipeliner) error {
		p.SRem(ctx, asynqQueues, queue)
		p.ZRem(ctx, instancesKey, name)
		return nil
	})
	if err != nil {
		return false, fmt.Errorf("remove the name of the queue %s: %w", queue, err)
	}
	return true, nil
}

const (
	// asynqQueues is asynq's set of the names of all queues.
	asynqQueues = "asynq:queues"
	// statsDays is how long asynq keeps its figures of a day, 90 days, and a day
	// on either side for clocks that differ.
	statsDays = 92
)

// removeQueue removes a queue if the figures of its instance are missing, KEYS[1].
// The other keys are asynq's, those with jobs first: the lists, the sorted sets.
//
// asynq's own Inspector.DeleteQueue refuses a queue with an active job, as a
// process that was killed leaves it, and no server recovers jobs from a queue that
// none pulls from. It also leaves behind the completed jobs, which only a server of
// the queue would remove when their retention is over.
var removeQueue = redis.NewScript(`
if redis.call("EXISTS", KEYS[1]) == 1 then return 0 end
for i = 2, 7 do
	local ids
	if i <= 3 then
		ids = redis.call("LRANGE", KEYS[i], 0, -1)
	else
		ids = redis.call("ZRANGE", KEYS[i], 0, -1)
	end
	for _, id in ipairs(ids) do redis.call("DEL", ARGV[1] .. id) end
end
for i = 2, #KEYS do redis.call("DEL", KEYS[i]) end
return 1`)

// missingInstance is one that has not written its figures in time.
type missingInstance struct {
	Name string `json:"name"`
	// Seen is when it last did.
	Seen time.Time `json:"seen"`
}

// readFleet reads the instances' figures, the oldest instance first, and who
// should have written theirs.
func readFleet(ctx context.Context, rdb redis.UniversalClient) (fleet []instance, missing []missingInstance, err error) {
	names, err := rdb.ZRangeWithScores(ctx, instancesKey, 0, -1).Result()
	if err != nil {
		return nil, nil, fmt.Errorf("read the names of the instances: %w", err)
	}
	fleet, missing = []instance{}, []missingInstance{} // for JSON, where none is []
	figures := make([]*redis.StringCmd, len(names))
	_, err = rdb.Pipelined(ctx, func(p redis.Pipeliner) error {
		for i, z := range names {
			figures[i] = p.Get(ctx, figuresKey(z.Member.(string)))
		}
		return nil
	})
	if err != nil && !errors.Is(err, redis.Nil) {
		return nil, nil, fmt.Errorf("read the figures of the instances: %w", err)
	}
	for i, z := range names {
		name := z.Member.(string)
		data, err := figures[i].Bytes()
		if errors.Is(err, redis.Nil) {
			missing = append(missing, missingInstance{name, time.Unix(int64(z.Score), 0)})
			continue
		}
		if err != nil {
			return nil, nil, fmt.Errorf("read the figures of the instances: %w", err)
		}
		var one instance
		if err := json.Unmarshal(data, &one); err != nil {
			return nil, nil, fmt.Errorf("read the figures of the instance %s: %w", name, err)
		}
		fleet = append(fleet, one)
	}
	slices.SortFunc(fleet, func(a, b instance) int {
		return cmp.Or(a.Started.Compare(b.Started), cmp.Compare(a.Name, b.Name))
	})
	return fleet, missing, nil
}
