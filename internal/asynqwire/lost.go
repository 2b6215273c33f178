package asynqwire

import (
	"context"
	"errors"
	"fmt"
	"math"
	"slices"
	"strings"
	"time"

	"github.com/hibiken/asynq"
	"github.com/redis/go-redis/v9"
)

// A job is lost when its id is still in a list or sorted set of its queue, and its data is
// gone: the key of its hash was evicted or deleted by hand, has no message any more, or
// holds something else. asynq's own scripts put a new hash without a message in the place
// of one that is missing, and fail at one that is something else, for all jobs of all
// queues behind it.

// ErrLost is returned for a job that is lost.
var ErrLost = errors.New("its data is gone from Redis; its key was evicted, deleted or overwritten")

// States are the names of the states of jobs, in the order of [Jobs]. Each is also the end
// of the key of its list or sorted set.
func States() []string {
	return []string{"pending", "active", "scheduled", "retry", "archived", "completed"}
}

func isList(state string) bool { return state == "pending" || state == "active" }

// LostJob is what there is of a job that is lost.
type LostJob struct {
	ID, State string
	// Score is its place in the sorted set of its state, 0 in a list.
	Score float64
}

// lostPage is how many jobs are looked at in one exchange with Redis.
const lostPage = 1000

// FindLost returns the jobs of a queue that are lost, among the first of each state: the
// next to be fetched or due, those that were archived first. most is how many of each
// state it looks at, -1 for all. A list that is something else has none. It reads
// lengths, no messages. The error is Redis'.
func FindLost(ctx context.Context, rdb redis.UniversalClient, queue string, most int, states ...string) ([]LostJob, error) {
	if len(states) == 0 {
		states = States()
	}
	listed, err := listJobs(ctx, rdb, queue, most, states)
	if err != nil {
		return nil, err
	}
	var lost []LostJob
	for page := range slices.Chunk(listed, lostPage) {
		lengths := make([]*redis.IntCmd, len(page))
		if err := Pipelined(ctx, rdb, func(p redis.Pipeliner) {
			for i, job := range page {
				lengths[i] = p.HStrLen(ctx, Task(queue, job.ID), "msg")
			}
		}); err != nil {
			return nil, err
		}
		for i, job := range page {
			if lengths[i].Val() == 0 { // also where something else has the key
				lost = append(lost, job)
			}
		}
	}
	if len(lost) == 0 {
		return nil, nil
	}
	// A job that ended meanwhile is not lost: it has left its list with its hash.
	if listed, err = listJobs(ctx, rdb, queue, most, states); err != nil {
		return nil, err
	}
	still := make(map[LostJob]bool, len(listed))
	for _, job := range listed {
		still[job] = true
	}
	return slices.DeleteFunc(lost, func(job LostJob) bool { return !still[job] }), nil
}

// listJobs returns what the lists and sorted sets of these states have.
func listJobs(ctx context.Context, rdb redis.UniversalClient, queue string, most int, states []string) (jobs []LostJob, err error) {
	end := int64(most) - 1
	if most < 0 {
		end = -1
	}
	lists, sets := make(map[string]*redis.StringSliceCmd), make(map[string]*redis.ZSliceCmd)
	if err := Pipelined(ctx, rdb, func(p redis.Pipeliner) {
		for _, state := range states {
			if isList(state) { // whose first is at the right end
				lists[state] = p.LRange(ctx, key(queue, state), -end-1, -1)
			} else {
				sets[state] = p.ZRangeWithScores(ctx, key(queue, state), 0, end)
			}
		}
	}); err != nil {
		return nil, err
	}
	for _, state := range states {
		if list := lists[state]; list != nil {
			for _, id := range list.Val() {
				jobs = append(jobs, LostJob{ID: id, State: state})
			}
			continue
		}
		for _, z := range sets[state].Val() {
			jobs = append(jobs, LostJob{ID: z.Member.(string), State: state, Score: z.Score})
		}
	}
	return jobs, nil
}

// Pipelined sends commands in one exchange. The error is the first of theirs, but for a
// key that is missing or something else than the command takes.
func Pipelined(ctx context.Context, rdb redis.UniversalClient, send func(redis.Pipeliner)) error {
	pipe := rdb.Pipeline()
	send(pipe)
	cmds, _ := pipe.Exec(ctx) // whose error is that of one of them
	for _, cmd := range cmds {
		if err := cmd.Err(); err != nil && !errors.Is(err, redis.Nil) && !IsWrongType(err) {
			return err
		}
	}
	return nil
}

// IsWrongType reports whether err says that a key holds something else than the command
// works on.
func IsWrongType(err error) bool { return redis.HasErrorPrefix(err, "WRONGTYPE") }

// KEYS[1] pending
// KEYS[2] active
// KEYS[3] scheduled
// KEYS[4] retry
// KEYS[5] archived
// KEYS[6] completed
// KEYS[7] leases
// KEYS[8] the job's hash
// ARGV[1] the job's id
// ARGV[2] when the lease of an active job must have ended, in Unix seconds
var forget = redis.NewScript(`
local kind = redis.call("TYPE", KEYS[8]).ok
if kind == "hash" and redis.call("HSTRLEN", KEYS[8], "msg") > 0 then return 0 end
if kind ~= "hash" then
	local lease = redis.pcall("ZSCORE", KEYS[7], ARGV[1])
	if type(lease) == "string" and tonumber(lease) > tonumber(ARGV[2]) then return 0 end
end
local removed = 0
for i = 1, 6 do
	local n
	if i <= 2 then
		n = redis.pcall("LREM", KEYS[i], 0, ARGV[1])
	else
		n = redis.pcall("ZREM", KEYS[i], ARGV[1])
	end
	if type(n) == "number" then removed = removed + n end
end
redis.pcall("ZREM", KEYS[7], ARGV[1])
if kind == "hash" then redis.call("DEL", KEYS[8]) end
return removed`)

// Forget removes what is left of a job that is lost, but for a key in the place of its hash
// that is something else, which somebody else may need. removed is false for a job that is
// not lost, or not there, or may run: it is active, its lease has not ended some time ago,
// and its key has gone, as asynq's scripts put a hash without a message in the place of one
// that was missing before it could be run. The error is Redis'.
func Forget(ctx context.Context, rdb redis.UniversalClient, queue, id string) (removed bool, err error) {
	return forgetLost(ctx, rdb, queue, id, time.Now().Add(-leaseOver).Unix())
}

// leaseOver is how long a lease must have ended before nobody holds it, whoever's clock is
// right. It is asynq's own allowance for clocks that differ.
const leaseOver = 30 * time.Second

// ForgetActive is [Forget] for an active job whose lease is known to be over.
func ForgetActive(ctx context.Context, rdb redis.UniversalClient, queue, id string) error {
	_, err := forgetLost(ctx, rdb, queue, id, math.MaxInt64)
	return err
}

func forgetLost(ctx context.Context, rdb redis.UniversalClient, queue, id string, leaseEnded int64) (removed bool, err error) {
	keys := append(Jobs(queue), Leases(queue), Task(queue, id))
	n, err := forget.Run(ctx, rdb, keys, id, leaseEnded).Int()
	return n > 0, err
}

// GetTask is the GetTaskInfo of asynq's Inspector, but for a job that is lost: the error is
// [ErrLost] then, if there is something in the place of its hash. asynq describes an empty
// job, or fails.
func GetTask(ctx context.Context, rdb redis.UniversalClient, inspector *asynq.Inspector, queue, id string) (*asynq.TaskInfo, error) {
	info, err := inspector.GetTaskInfo(queue, id)
	if err == nil {
		if info.ID != id {
			return nil, ErrLost
		}
		return info, nil
	}
	if errors.Is(err, asynq.ErrTaskNotFound) || errors.Is(err, asynq.ErrQueueNotFound) {
		return nil, err
	}
	if isUnreadable(err) {
		return nil, ErrLost
	}
	if _, readErr := ReadMessage(ctx, rdb, queue, id); errors.Is(readErr, ErrMessage) || IsWrongType(readErr) {
		return nil, ErrLost
	}
	return nil, err
}

// isUnreadable reports whether err says that asynq can't make sense of a job that Redis has.
// It has no error of its own for that.
func isUnreadable(err error) bool {
	return strings.Contains(err.Error(), "could not decode task message") || strings.Contains(err.Error(), "is not supported task state")
}

// Listed returns the state of a job whose hash is missing, by the list or sorted set that
// still has its id; "" if none has. It searches the whole list of the pending ones. The
// error is Redis'.
func Listed(ctx context.Context, rdb redis.UniversalClient, queue, id string) (state string, err error) {
	states := States()
	found := make([]redis.Cmder, len(states))
	if err := Pipelined(ctx, rdb, func(p redis.Pipeliner) {
		for i, state := range states {
			if isList(state) {
				found[i] = p.LPos(ctx, key(queue, state), id, redis.LPosArgs{})
			} else {
				found[i] = p.ZScore(ctx, key(queue, state), id)
			}
		}
	}); err != nil {
		return "", err
	}
	for i, cmd := range found {
		if cmd.Err() == nil {
			return states[i], nil
		}
	}
	return "", nil
}

// QueueState is how a queue stands.
type QueueState struct {
	// Jobs are the numbers of its jobs by their state: those of [States], and "aggregating",
	// of jobs that plain clients of asynq have put into groups.
	Jobs map[string]int
	// Latency is how long the oldest pending job has waited; 0 if there is none, or if that
	// is lost.
	Latency time.Duration
	Paused  bool
	// Lost are those of its jobs that [FindLost] finds.
	Lost []LostJob
	// Unreadable are the keys that should be a list or a sorted set of jobs, and are
	// something else.
	Unreadable []string
}

// ReadQueue reads how a queue stands, also one that asynq's Inspector can't describe because
// jobs of it are lost. lookAt is how many of the jobs of each state are looked at to find
// those. The error is Redis'.
func ReadQueue(ctx context.Context, rdb redis.UniversalClient, queue string, lookAt int) (*QueueState, error) {
	states := States()
	counts := make([]*redis.IntCmd, len(states))
	var paused *redis.IntCmd
	var oldest, grouped, aggregated *redis.StringSliceCmd
	if err := Pipelined(ctx, rdb, func(p redis.Pipeliner) {
		for i, state := range states {
			if isList(state) {
				counts[i] = p.LLen(ctx, key(queue, state))
			} else {
				counts[i] = p.ZCard(ctx, key(queue, state))
			}
		}
		oldest = p.LRange(ctx, Pending(queue), -1, -1)
		paused = p.Exists(ctx, Paused(queue))
		grouped = p.SMembers(ctx, groups(queue))
		aggregated = p.ZRange(ctx, aggregations(queue), 0, -1)
	}); err != nil {
		return nil, fmt.Errorf("count its jobs: %w", err)
	}
	q := &QueueState{Jobs: make(map[string]int), Paused: paused.Val() > 0}
	for i, state := range states {
		q.Jobs[state] = int(counts[i].Val())
		if counts[i].Err() != nil {
			q.Unreadable = append(q.Unreadable, key(queue, state))
		}
	}
	sets := aggregated.Val()
	for _, name := range grouped.Val() {
		sets = append(sets, group(queue, name))
	}
	var err error
	if q.Jobs["aggregating"], err = countAll(ctx, rdb, sets); err != nil {
		return nil, fmt.Errorf("count the jobs of its groups: %w", err)
	}
	for _, id := range oldest.Val() {
		since, err := rdb.HGet(ctx, Task(queue, id), "pending_since").Int64()
		if err == nil {
			q.Latency = max(0, time.Since(time.Unix(0, since)))
		}
	}
	if q.Lost, err = FindLost(ctx, rdb, queue, lookAt); err != nil {
		return nil, fmt.Errorf("look for its jobs' data: %w", err)
	}
	return q, nil
}

// countAll returns how many members sorted sets have together.
func countAll(ctx context.Context, rdb redis.UniversalClient, sets []string) (n int, err error) {
	if len(sets) == 0 {
		return 0, nil
	}
	counts := make([]*redis.IntCmd, len(sets))
	err = Pipelined(ctx, rdb, func(p redis.Pipeliner) {
		for i, set := range sets {
			counts[i] = p.ZCard(ctx, set)
		}
	})
	for _, count := range counts {
		n += int(count.Val())
	}
	return n, err
}
