package main

import (
	"context"
	"fmt"
	"log/slog"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/carpool-go/carpool/internal/asynqkey"
)

// rescue gives jobs back to their queues whose worker died.
//
// A worker that lives extends the lease of each job it runs every 5 s, by 30 s.
// A lease that has stayed the same for longer than that is over, by its holder's
// own clock as well: asynq ends the run of a worker that finds its lease over.
// asynq's own recoverer does the same a minute or two after the worker's death; it
// allows for clocks that differ, where rescue only watches how long nothing
// happens by its own, it never finds a job that is active without a lease, and it
// counts a try for a job that has not begun. ackHook keeps it from finding any.
// (Upstream, the recoverer's interval and its allowance would be settings.)
type rescue struct {
	rdb    redis.UniversalClient
	queues []string
	log    *slog.Logger
	still  time.Duration // how long a lease must have stayed the same

	seen   map[string]lease     // of active jobs, by queue and id
	looked time.Time            // when seen was seen
	warned map[string]time.Time // when it was last warned: of a queue's archive that is nearly full, of a job
	cancel context.CancelFunc
	done   sync.WaitGroup
}

// lease is what was seen of an active job's lease.
type lease struct {
	until string        // as Redis has it; "" for none
	still time.Duration // how long it has been seen to stay the same
	was   time.Time     // when it was last seen to be another
}

const (
	rescueEvery = 3 * time.Second
	// leaseStill is asynq's lease and a little more.
	leaseStill = 32 * time.Second
	// overStill is a heartbeat and a little more.
	overStill = 7 * time.Second
)

func startRescue(rdb redis.UniversalClient, queues []string, still time.Duration, log *slog.Logger) *rescue {
	ctx, cancel := context.WithCancel(context.Background())
	r := &rescue{rdb: rdb, queues: queues, log: log, still: still, seen: make(map[string]lease), warned: make(map[string]time.Time), cancel: cancel}
	r.done.Go(func() { r.run(ctx) })
	return r
}

func (r *rescue) stop() {
	r.cancel()
	r.done.Wait()
}

func (r *rescue) run(ctx context.Context) {
	every := min(rescueEvery, r.still/4)
	tick := time.NewTicker(every)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		// While Redis is away no lease is extended, so that time doesn't count.
		now, found := time.Now(), make(map[string]lease)
		passed := min(now.Sub(r.looked), 2*every)
		if err := r.lookAll(ctx, passed, found); err != nil {
			if ctx.Err() == nil {
				r.log.Debug("the leases could not be looked at", "error", err)
			}
			continue
		}
		r.seen, r.looked = found, now
	}
}

func (r *rescue) lookAll(ctx context.Context, passed time.Duration, found map[string]lease) error {
	for _, queue := range r.queues {
		if err := r.look(ctx, queue, passed, found); err != nil {
			return fmt.Errorf("queue %s: %w", queue, err)
		}
	}
	return nil
}

// look notes the leases of a queue's active jobs in found, and rescues those jobs
// whose lease has stayed the same for too long.
func (r *rescue) look(ctx context.Context, queue string, passed time.Duration, found map[string]lease) error {
	pipe := r.rdb.Pipeline()
	active := pipe.LRange(ctx, asynqkey.List(queue, "active"), 0, -1)
	leases := pipe.ZRangeWithScores(ctx, asynqkey.List(queue, "lease"), 0, -1)
	archived := pipe.ZCard(ctx, asynqkey.List(queue, "archived"))
	if _, err := pipe.Exec(ctx); err != nil {
		return err
	}
	if n := archived.Val(); n >= archiveWarning && time.Since(r.warned[queue]) > time.Hour {
		r.warned[queue] = time.Now()
		r.log.Warn("the archive of a queue is nearly full, and asynq then drops the oldest jobs; see: worker archive ls",
			"queue", queue, "archived", n, "limit", archiveLimit)
	}
	until := make(map[string]string)
	for _, z := range leases.Val() {
		until[z.Member.(string)] = strconv.FormatFloat(z.Score, 'f', -1, 64)
	}
	for _, id := range active.Val() {
		key := queue + " " + id
		now := lease{until: until[id]}
		if before, ok := r.seen[key]; ok {
			now.was = r.looked
			if before.until == now.until {
				now.was, now.still = before.was, before.still+passed
			}
		}
		if isLongOver(now.until) && now.still > overStill {
			now.still = r.still // no worker was there to watch it for longer
		}
		found[key] = now
		if now.still < r.still {
			continue
		}
		why, err := r.giveBack(ctx, queue, id, now)
		if err != nil {
			return err
		}
		if why != "" {
			r.log.Warn("a job was given back to its queue: "+why, slog.Group("job", "id", id, "queue", queue))
		}
		delete(found, key)
	}
	return nil
}

// isLongOver reports whether a lease ended so long ago, by this clock, as asynq's
// recoverer allows for clocks that differ.
func isLongOver(until string) bool {
	seconds, err := strconv.ParseFloat(until, 64)
	return err == nil && time.Since(time.Unix(int64(seconds), 0)) > leaseStill
}

// giveBackScript moves a job from active to retry, due at once, if its lease is
// still the one that was seen.
var giveBackScript = redis.NewScript(`
local lease = redis.call("ZSCORE", KEYS[2], ARGV[1]) or ""
if lease ~= ARGV[2] and tonumber(lease) ~= tonumber(ARGV[2]) then return 0 end
if redis.call("LREM", KEYS[1], 0, ARGV[1]) == 0 then return 0 end
redis.call("ZREM", KEYS[2], ARGV[1])
redis.call("HSET", KEYS[4], "msg", ARGV[4], "state", "retry", "` + freeField + `", ARGV[5])
redis.call("ZADD", KEYS[3], ARGV[3], ARGV[1])
return 1`)

// unfetched is the last error of a job that was given back without a sign that
// it had begun.
const unfetched = "the answer to its fetch was lost, or its worker died before another one saw it run"

// freeField is the field of a job's hash that counts how often it was given back
// without using up a try.
const freeField = "carpool_unfetched"

// giveBack gives a job back, and returns why; "" if its worker was faster.
//
// That uses up a try, or a job that kills its workers would go on doing so. But a
// job whose lease was never extended has most likely not begun: one lost answer of
// Redis leaves it so. That costs nothing, once, and once more for each try.
func (r *rescue) giveBack(ctx context.Context, queue, id string, seen lease) (why string, err error) {
	hash, err := r.rdb.HMGet(ctx, asynqkey.Task(queue, id), "msg", freeField).Result()
	if err != nil {
		return "", fmt.Errorf("read job %s: %w", id, err)
	}
	data, ok := hash[0].(string)
	if !ok { // an id without its job
		pipe := r.rdb.Pipeline()
		pipe.LRem(ctx, asynqkey.List(queue, "active"), 0, id)
		pipe.ZRem(ctx, asynqkey.List(queue, "lease"), id)
		_, err := pipe.Exec(ctx)
		return "", err
	}
	msg, err := parseMessage([]byte(data))
	if err != nil {
		if key := queue + " " + id; time.Since(r.warned[key]) > time.Hour {
			r.warned[key] = time.Now()
			r.log.Warn("a job can't be given back", slog.Group("job", "id", id, "queue", queue), "error", err)
		}
		return "", nil
	}
	free, _ := hash[1].(string)
	passes, _ := strconv.Atoi(free)
	extended := !seen.was.IsZero() && seen.was.Unix() > msg.lastFailedAt // by this delivery's worker
	if extended || passes > msg.retried || isUnended(msg.lastErr) {
		msg.retried++
		msg.lastErr = crashed
	} else {
		passes++
		msg.lastErr = unfetched
	}
	msg.lastFailedAt = time.Now().Unix()
	keys := []string{asynqkey.List(queue, "active"), asynqkey.List(queue, "lease"), asynqkey.List(queue, "retry"), asynqkey.Task(queue, id)}
	moved, err := giveBackScript.Run(ctx, r.rdb, keys, id, seen.until, msg.lastFailedAt, msg.encode(), passes).Int()
	if err != nil || moved == 0 {
		return "", err
	}
	return msg.lastErr, nil
}

func sortedNames(queues map[string]int) []string {
	names := make([]string, 0, len(queues))
	for name := range queues {
		names = append(names, name)
	}
	slices.Sort(names)
	return names
}
