package asynqwire

import (
	"context"
	"errors"
	"strconv"
	"time"

	"github.com/redis/go-redis/v9"
)

// ErrNoSuchTask is returned for a job that is not, or no longer, where it was to be
// taken from.
var ErrNoSuchTask = errors.New("the job is not there any more")

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

// KEYS[1] active
// KEYS[2] leases
// KEYS[3] retry
// KEYS[4] the job's hash
// ARGV[1] the job's id
// ARGV[2] the lease that was seen, "" for none
// ARGV[3] when it is due, in Unix seconds
// ARGV[4] its message
// ARGV[5] the free redeliveries it has had
// ARGV[6] why its last attempt had no end, "" if nothing is known of one
var giveBack = redis.NewScript(`
local lease = redis.call("ZSCORE", KEYS[2], ARGV[1]) or ""
if lease ~= ARGV[2] and tonumber(lease) ~= tonumber(ARGV[2]) then return 0 end
if redis.call("LREM", KEYS[1], 0, ARGV[1]) == 0 then return 0 end
redis.call("ZREM", KEYS[2], ARGV[1])
redis.call("HSET", KEYS[4], "msg", ARGV[4], "state", "retry", "` + FreeRedeliveries + `", ARGV[5], "` + unendedField + `", ARGV[6])
redis.call("HDEL", KEYS[4], "` + fetchField + `")
redis.call("ZADD", KEYS[3], ARGV[3], ARGV[1])
return 1`)

// Unended is what the hash of an active job says of its last attempt, beside its message.
type Unended struct {
	// FreeRedeliveries is how often the job was given back without using up a try.
	FreeRedeliveries int
	// Reason is why the attempt had no end; "" if nothing is known of one.
	Reason string
}

// ReadUnended reads a job's message, and what is known of its last attempt. The error is
// [ErrNoSuchTask] for a job whose hash Redis doesn't have, that of [ParseMessage], or Redis'.
func ReadUnended(ctx context.Context, rdb redis.UniversalClient, queue, id string) (Message, Unended, error) {
	hash, err := rdb.HMGet(ctx, Task(queue, id), "msg", FreeRedeliveries, unendedField).Result()
	if IsWrongType(err) {
		return Message{}, Unended{}, ErrNoSuchTask
	}
	if err != nil {
		return Message{}, Unended{}, err
	}
	data, ok := hash[0].(string)
	if !ok {
		return Message{}, Unended{}, ErrNoSuchTask
	}
	var u Unended
	free, _ := hash[1].(string)
	u.FreeRedeliveries, _ = strconv.Atoi(free)
	u.Reason, _ = hash[2].(string)
	msg, err := ParseMessage([]byte(data))
	return msg, u, err
}

// GiveBack moves a job from active to retry, due at msg.LastFailedAt, if its lease is
// still the one that was seen. moved is false if it isn't, or if the job is not active
// any more.
func GiveBack(ctx context.Context, rdb redis.UniversalClient, queue, id, lease string, msg Message, unended Unended) (moved bool, err error) {
	keys := []string{Active(queue), Leases(queue), Retry(queue), Task(queue, id)}
	n, err := giveBack.Run(ctx, rdb, keys, id, lease, msg.LastFailedAt, msg.Encode(), unended.FreeRedeliveries, unended.Reason).Int()
	return n == 1, err
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
redis.call("HDEL", KEYS[3], "` + FreeRedeliveries + `", "` + unendedField + `", "` + deliveriesField + `")
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
