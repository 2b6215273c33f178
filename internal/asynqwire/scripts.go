package asynqwire

import (
	"context"
	"errors"
	"fmt"
	"math"
	"time"

	"github.com/redis/go-redis/v9"
)

// ErrNoSuchTask is returned for a job that is not, or no longer, where it was to be
// taken from.
var ErrNoSuchTask = errors.New("the job is not there any more")

// FreeRedeliveries is the field of a job's hash that counts how often it was given back
// without using up a try.
const FreeRedeliveries = "carpool_unfetched"

// ReadMessage reads a job's message. The error is [ErrNoSuchTask] for a job that Redis
// doesn't have, that of [ParseMessage], or Redis'.
func ReadMessage(ctx context.Context, rdb redis.UniversalClient, queue, id string) (Message, error) {
	data, err := rdb.HGet(ctx, Task(queue, id), "msg").Bytes()
	if errors.Is(err, redis.Nil) {
		return Message{}, ErrNoSuchTask
	}
	if err != nil {
		return Message{}, err
	}
	return ParseMessage(data)
}

// KEYS[1] the job's hash
// ARGV[1] the result
var writeResult = redis.NewScript(`
if redis.call("HEXISTS", KEYS[1], "state") == 1 then redis.call("HSET", KEYS[1], "result", ARGV[1]) end
return 1`)

// WriteResult writes the result of a job that is still there. asynq's own ResultWriter
// would leave a hash behind for one that is not, on which its id then stumbles.
func WriteResult(ctx context.Context, rdb redis.UniversalClient, queue, id string, result []byte) error {
	return writeResult.Run(ctx, rdb, []string{Task(queue, id)}, result).Err()
}

// KEYS[1] retry
// KEYS[2] completed
// KEYS[3] the job's hash
// ARGV[1] the job's id
// ARGV[2] its message
// ARGV[3] when its retention ends, in Unix seconds
// ARGV[4] its result
var complete = redis.NewScript(`
if redis.call("ZREM", KEYS[1], ARGV[1]) == 0 then return 0 end
redis.call("HSET", KEYS[3], "msg", ARGV[2], "state", "completed", "result", ARGV[4])
redis.call("ZADD", KEYS[2], ARGV[3], ARGV[1])
return 1`)

// CompleteRetry does to a job that is to be retried what asynq does to one that is done
// and retained. A job that isn't to be retried stays as it is.
func CompleteRetry(ctx context.Context, rdb redis.UniversalClient, queue, id string, retention time.Duration, result []byte) error {
	msg, err := ReadMessage(ctx, rdb, queue, id)
	if err != nil {
		return err
	}
	now := time.Now()
	msg.LastErr, msg.LastFailedAt, msg.CompletedAt = "", 0, now.Unix()
	keys := []string{Retry(queue), Completed(queue), Task(queue, id)}
	return complete.Run(ctx, rdb, keys, id, msg.Encode(), now.Add(retention).Unix(), result).Err()
}

// KEYS[1] active
// KEYS[2] leases
// KEYS[3] retry
// KEYS[4] the job's hash
// ARGV[1] the job's id
// ARGV[2] the lease that was seen, "" for none
// ARGV[3] when it is due, in Unix seconds
// ARGV[4] its message
// ARGV[5] the free redeliveries it has had
var giveBack = redis.NewScript(`
local lease = redis.call("ZSCORE", KEYS[2], ARGV[1]) or ""
if lease ~= ARGV[2] and tonumber(lease) ~= tonumber(ARGV[2]) then return 0 end
if redis.call("LREM", KEYS[1], 0, ARGV[1]) == 0 then return 0 end
redis.call("ZREM", KEYS[2], ARGV[1])
redis.call("HSET", KEYS[4], "msg", ARGV[4], "state", "retry", "` + FreeRedeliveries + `", ARGV[5])
redis.call("ZADD", KEYS[3], ARGV[3], ARGV[1])
return 1`)

// GiveBack moves a job from active to retry, due at msg.LastFailedAt, if its lease is
// still the one that was seen. moved is false if it isn't, or if the job is not active
// any more.
func GiveBack(ctx context.Context, rdb redis.UniversalClient, queue, id, lease string, msg Message, redeliveries int) (moved bool, err error) {
	keys := []string{Active(queue), Leases(queue), Retry(queue), Task(queue, id)}
	n, err := giveBack.Run(ctx, rdb, keys, id, lease, msg.LastFailedAt, msg.Encode(), redeliveries).Int()
	return n == 1, err
}

// KEYS[1] retry or archived
// KEYS[2] the job's hash
// ARGV[1] the job's id
// ARGV[2] its message
var reword = redis.NewScript(`
if not redis.call("ZSCORE", KEYS[1], ARGV[1]) then return 0 end
redis.call("HSET", KEYS[2], "msg", ARGV[2])
return 1`)

// Reword changes the last error of a job in set, which is [Retry] or [Archived] of its
// queue; of a job that isn't there any more it changes nothing.
func Reword(ctx context.Context, rdb redis.UniversalClient, set, queue, id, lastErr string) error {
	msg, err := ReadMessage(ctx, rdb, queue, id)
	if err != nil {
		return err
	}
	msg.LastErr = lastErr
	return reword.Run(ctx, rdb, []string{set, Task(queue, id)}, id, msg.Encode()).Err()
}

// KEYS[1] archived
// KEYS[2] pending
// KEYS[3] the job's hash
// ARGV[1] the job's id
// ARGV[2] its message
// ARGV[3] the time, in Unix nanoseconds
var putBack = redis.NewScript(`
if redis.call("ZREM", KEYS[1], ARGV[1]) == 0 then return 0 end
redis.call("HSET", KEYS[3], "msg", ARGV[2], "state", "pending", "pending_since", ARGV[3])
redis.call("HDEL", KEYS[3], "` + FreeRedeliveries + `")
redis.call("LPUSH", KEYS[2], ARGV[1])
return 1`)

// PutBack moves a job from the archive to its queue, with msg for its message. The error
// is [ErrNoSuchTask] if it is not in the archive, or Redis'.
func PutBack(ctx context.Context, rdb redis.UniversalClient, queue, id string, msg Message) error {
	keys := []string{Archived(queue), Pending(queue), Task(queue, id)}
	moved, err := putBack.Run(ctx, rdb, keys, id, msg.Encode(), time.Now().UnixNano()).Int()
	if err == nil && moved == 0 {
		return ErrNoSuchTask
	}
	return err
}

// KEYS[1] the key that must be missing
// KEYS[2] pending
// KEYS[3] active
// KEYS[4] scheduled
// KEYS[5] retry
// KEYS[6] archived
// KEYS[7] completed
// KEYS[8…] the queue's other keys
// ARGV[1] what the keys of its jobs begin with
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

// RemoveQueue removes a queue with all its jobs, unless the key exists that must be
// missing. On a Redis Cluster that key must be in the queue's slot.
//
// asynq's own Inspector.DeleteQueue refuses a queue with an active job, as a process
// that was killed leaves it, and no server recovers jobs from a queue that none pulls
// from. It also leaves behind the completed jobs, which only a server of the queue would
// remove when their retention is over.
func RemoveQueue(ctx context.Context, rdb redis.UniversalClient, queue, missing string) (removed bool, err error) {
	keys := append([]string{missing}, queueKeys(queue, time.Now())...)
	n, err := removeQueue.Run(ctx, rdb, keys, Task(queue, "")).Int()
	if err != nil || n == 0 {
		return false, err
	}
	return true, rdb.SRem(ctx, Queues, queue).Err()
}

// KEYS[1] leases
// ARGV[1…] for each lease its end in Unix seconds, its job's id and its fencing token
const extendLeases = `
for i = 1, #ARGV, 3 do
	local lease = tonumber(redis.call("ZSCORE", KEYS[1], ARGV[i+1]) or 0)
	if math.floor(lease % 1 * 1e6 + 0.5) == tonumber(ARGV[i+2]) then
		redis.call("ZADD", KEYS[1], string.format("%d.%06d", ARGV[i], ARGV[i+2]), ARGV[i+1])
	end
end
return 0`

// Lease is a lease to be extended.
type Lease struct {
	ID    string
	Until any // its end, in Unix seconds, as asynq has it
	Token int // its fencing token
}

// ExtendLeases is the command that extends each lease that has its fencing token still.
func ExtendLeases(ctx context.Context, leasesKey string, leases []Lease) *redis.Cmd {
	args := []any{"eval", extendLeases, 1, leasesKey}
	for _, l := range leases {
		args = append(args, l.Until, l.ID, l.Token)
	}
	return redis.NewCmd(ctx, args...)
}

// MaxToken is the largest fencing token: tokens are a lease's microseconds, which asynq
// leaves at 0.
const MaxToken = 999_999

// LeaseWithToken is the score of a lease that ends at until, in Unix seconds, and has a
// fencing token.
func LeaseWithToken(until int64, token int) string { return fmt.Sprintf("%d.%06d", until, token) }

// TokenOf returns the fencing token of a lease, 0 for one of a worker that gives none.
func TokenOf(lease float64) int {
	_, fraction := math.Modf(lease)
	return int(math.Round(fraction * 1e6))
}

// KEYS[1] the job's hash
// KEYS[2] active
// KEYS[3] leases
// KEYS[4] retry
// ARGV[1] the job's id
// ARGV[2] its message
// ARGV[3] when it is due, in Unix seconds
const postpone = `
if redis.call("LREM", KEYS[2], 0, ARGV[1]) == 0 then return redis.error_reply("NOT FOUND") end
redis.call("ZREM", KEYS[3], ARGV[1])
redis.call("ZADD", KEYS[4], ARGV[3], ARGV[1])
redis.call("HSET", KEYS[1], "msg", ARGV[2], "state", "retry")
return redis.status_reply("OK")`

// Postpone is the command that moves a job from active to retry, due at until. It is
// asynq's own script for that, without the statistics of failures. The keys are given as
// asynq's command has them.
func Postpone(ctx context.Context, taskKey, activeKey, leasesKey, retryKey, id string, msg []byte, until time.Time) *redis.Cmd {
	return redis.NewCmd(ctx, "eval", postpone, 4, taskKey, activeKey, leasesKey, retryKey, id, msg, until.Unix())
}
