package asynqwire

import (
	"context"
	"strconv"
	"time"

	"github.com/redis/go-redis/v9"
)

// endScript has what the scripts share that end an attempt. Each takes the job from the
// active ones first, if its lease has the worker's fencing token still, and answers 0 if it
// hasn't: an earlier one has arrived, or the job is another worker's by now.
const endScript = leaseScript + `
local function take(active, leases, id, token)
	if not holds(redis.call("ZSCORE", leases, id), token) then return false end
	redis.call("ZREM", leases, id)
	redis.call("LREM", active, 1, id)
	return true
end
local function count(expires, day, total)
	if redis.call("INCR", day) == 1 then redis.call("EXPIREAT", day, expires) end
	redis.call("INCR", total)
end
local function unlock(key, id)
	if key and redis.call("GET", key) == id then redis.call("DEL", key) end
end
local function settle(key)
	redis.call("HDEL", key, "pending_since", "` + fetchField + `", "` + deliveriesField + `", "` + unendedField + `", "` + FreeRedeliveries + `")
end`

// KEYS active, leases, the job's hash, processed that day, processed, asynq's unique key
// ARGV the job's id, the token, when the figures of the day expire
var done = newScript(endScript + `
if not take(KEYS[1], KEYS[2], ARGV[1], ARGV[2]) then return 0 end
redis.call("DEL", KEYS[3])
count(ARGV[3], KEYS[4], KEYS[5])
unlock(KEYS[6], ARGV[1])
return 1`)

// KEYS active, leases, processed that day, processed
// ARGV when the figures of the day expire, what jobs' keys begin with, and for each job its
// id and its token
var doneAtOnce = newScript(endScript + `
local answers, ids, keys = {}, {}, {}
for i = 3, #ARGV, 2 do
	local id = ARGV[i]
	if holds(redis.call("ZSCORE", KEYS[2], id), ARGV[i+1]) then
		redis.call("LREM", KEYS[1], 1, id)
		ids[#ids+1], keys[#keys+1] = id, ARGV[2] .. id
		answers[#answers+1] = 1
	else
		answers[#answers+1] = 0
	end
end
if #ids > 0 then
	redis.call("ZREM", KEYS[2], unpack(ids))
	redis.call("DEL", unpack(keys))
	if redis.call("INCRBY", KEYS[3], #ids) == #ids then redis.call("EXPIREAT", KEYS[3], ARGV[1]) end
	redis.call("INCRBY", KEYS[4], #ids)
end
return answers`)

// KEYS active, leases, the job's hash, processed that day, processed, completed, asynq's unique key
// ARGV the job's id, the token, when the figures of the day expire, its message, when its
// retention ends, its result if there is one
var completed = newScript(endScript + `
if not take(KEYS[1], KEYS[2], ARGV[1], ARGV[2]) then return 0 end
redis.call("HSET", KEYS[3], "msg", ARGV[4], "state", "completed")
if ARGV[6] then redis.call("HSET", KEYS[3], "result", ARGV[6]) end
settle(KEYS[3])
redis.call("ZADD", KEYS[6], ARGV[5], ARGV[1])
count(ARGV[3], KEYS[4], KEYS[5])
unlock(KEYS[7], ARGV[1])
return 1`)

// KEYS active, leases, the job's hash, processed that day, processed, failed that day, failed, retry
// ARGV the job's id, the token, when the figures of the day expire, its message, when it is
// due, "1" if it has failed, why the attempt had no end
var retried = newScript(endScript + `
if not take(KEYS[1], KEYS[2], ARGV[1], ARGV[2]) then return 0 end
redis.call("HSET", KEYS[3], "msg", ARGV[4], "state", "retry", "` + unendedField + `", ARGV[7])
redis.call("HDEL", KEYS[3], "pending_since", "` + fetchField + `")
redis.call("ZADD", KEYS[8], ARGV[5], ARGV[1])
if ARGV[6] == "1" then
	count(ARGV[3], KEYS[4], KEYS[5])
	count(ARGV[3], KEYS[6], KEYS[7])
end
return 1`)

// KEYS active, leases, the job's hash, processed that day, processed, failed that day, failed, archived
// ARGV the job's id, the token, when the figures of the day expire, its message, now, when
// a job must have been archived to be kept, how many are kept, what jobs' keys begin with
var archived = newScript(endScript + `
if not take(KEYS[1], KEYS[2], ARGV[1], ARGV[2]) then return 0 end
redis.call("HSET", KEYS[3], "state", "archived")
if ARGV[4] ~= "" then redis.call("HSET", KEYS[3], "msg", ARGV[4]) end
settle(KEYS[3])
redis.call("ZADD", KEYS[8], ARGV[5], ARGV[1])
local function drop(ids)
	for _, id in ipairs(ids) do
		redis.call("DEL", ARGV[8] .. id)
		redis.call("ZREM", KEYS[8], id)
	end
end
drop(redis.call("ZRANGEBYSCORE", KEYS[8], "-inf", ARGV[6], "LIMIT", 0, 100))
drop(redis.call("ZRANGE", KEYS[8], 0, -ARGV[7] - 1))
count(ARGV[3], KEYS[4], KEYS[5])
count(ARGV[3], KEYS[6], KEYS[7])
return 1`)

// KEYS active, leases, the job's hash, pending
// ARGV the job's id, the token, "RPUSH" to be the next or "LPUSH" to be the last, "1" if
// this was no delivery
var pushedBack = newScript(endScript + `
if not take(KEYS[1], KEYS[2], ARGV[1], ARGV[2]) then return 0 end
redis.call(ARGV[3], KEYS[4], ARGV[1])
redis.call("HSET", KEYS[3], "state", "pending")
redis.call("HDEL", KEYS[3], "` + fetchField + `")
if ARGV[4] == "1" then redis.call("HINCRBY", KEYS[3], "` + deliveriesField + `", -1) end
return 1`)

// End is what becomes of a job after an attempt: one of [Done], [RetryAt], [Archive],
// [PushBack].
type End interface {
	call(queue string, lease Lease, now time.Time) call
}

// Done ends a job that has succeeded: it is completed with its result if it has a
// retention, and else removed.
type Done struct {
	Message Message
	Result  []byte // nil for none
}

// RetryAt has a job delivered again at Due, to the microsecond.
type RetryAt struct {
	Message Message
	Due     time.Time
	// Failed is set if the attempt counts in asynq's figures.
	Failed bool
	// Unended is why the last attempt had no end, to be found by the next delivery.
	Unended string
}

// Archive puts a job in the archive. A nil Message leaves the job's as it is.
type Archive struct{ Message *Message }

// PushBack puts a job back among the pending ones.
type PushBack struct {
	// Last has it wait behind all others, instead of before them.
	Last bool
	// Undelivered is set for a job that no handler has seen.
	Undelivered bool
}

// statsTTL is how long asynq keeps its figures of a day.
const statsTTL = 90 * 24 * time.Hour

func endCall(s *script, queue string, lease Lease, now time.Time, keys []string, args ...any) call {
	return call{
		s,
		append([]string{Active(queue), Leases(queue), Task(queue, lease.ID)}, keys...),
		append([]any{lease.ID, lease.Token, now.Add(statsTTL).Unix()}, args...),
	}
}

func processed(queue string, now time.Time) []string {
	return []string{key(queue, "processed:"+now.UTC().Format(time.DateOnly)), key(queue, "processed")}
}

func failed(queue string, now time.Time) []string {
	return append(processed(queue, now), key(queue, "failed:"+now.UTC().Format(time.DateOnly)), key(queue, "failed"))
}

// isPlain reports whether nothing is left of the job.
func (d Done) isPlain() bool { return d.Message.Retention <= 0 && d.Message.uniqueKey == "" }

func (d Done) call(queue string, lease Lease, now time.Time) call {
	var unique []string
	if d.Message.uniqueKey != "" {
		unique = []string{d.Message.uniqueKey}
	}
	keys := processed(queue, now)
	if d.Message.Retention <= 0 {
		return endCall(done, queue, lease, now, append(keys, unique...))
	}
	msg := d.Message
	msg.CompletedAt = now.Unix()
	args := []any{msg.Encode(), now.Add(msg.Retention).Unix()}
	if d.Result != nil {
		args = append(args, d.Result)
	}
	return endCall(completed, queue, lease, now, append(append(keys, Completed(queue)), unique...), args...)
}

func (r RetryAt) call(queue string, lease Lease, now time.Time) call {
	hasFailed := "0"
	if r.Failed {
		hasFailed = "1"
	}
	return endCall(retried, queue, lease, now, append(failed(queue, now), Retry(queue)),
		r.Message.Encode(), Score(r.Due), hasFailed, r.Unended)
}

func (a Archive) call(queue string, lease Lease, now time.Time) call {
	var msg []byte
	if a.Message != nil {
		msg = a.Message.Encode()
	}
	return endCall(archived, queue, lease, now, append(failed(queue, now), Archived(queue)),
		msg, now.Unix(), now.AddDate(0, 0, -archiveDays).Unix(), ArchiveLimit, Task(queue, ""))
}

func (p PushBack) call(queue string, lease Lease, _ time.Time) call {
	push, undelivered := "RPUSH", "0"
	if p.Last {
		push = "LPUSH"
	}
	if p.Undelivered {
		undelivered = "1"
	}
	return call{
		pushedBack,
		[]string{Active(queue), Leases(queue), Task(queue, lease.ID), Pending(queue)},
		[]any{lease.ID, lease.Token, push, undelivered},
	}
}

// Score is a time as asynq's sorted sets have it, in Unix seconds, with its microseconds,
// which asynq's own leave at 0.
func Score(t time.Time) string {
	return strconv.FormatFloat(float64(t.UnixMicro())/1e6, 'f', 6, 64)
}

// Ending is an attempt that has ended.
type Ending struct {
	Queue string
	Lease Lease
	End   End
}

// SendEnds tells Redis of ends, in one round trip. Each has an answer: held is false if the
// job's lease had another token, or none, and nothing was changed; the error is Redis'.
// It may be repeated: what has arrived is not held any more.
func SendEnds(ctx context.Context, rdb redis.UniversalClient, ends []Ending) []EndAnswer {
	now := time.Now()
	var calls []call
	var of [][]int                   // the ends that each call is for
	together := make(map[string]int) // the call for a queue's plain ends
	for i, e := range ends {
		if d, ok := e.End.(Done); ok && d.isPlain() {
			n, ok := together[e.Queue]
			if !ok {
				n = len(calls)
				together[e.Queue] = n
				keys := append([]string{Active(e.Queue), Leases(e.Queue)}, processed(e.Queue, now)...)
				calls, of = append(calls, call{doneAtOnce, keys, []any{now.Add(statsTTL).Unix(), Task(e.Queue, "")}}), append(of, nil)
			}
			calls[n].args = append(calls[n].args, e.Lease.ID, e.Lease.Token)
			of[n] = append(of[n], i)
			continue
		}
		calls, of = append(calls, e.End.call(e.Queue, e.Lease, now)), append(of, []int{i})
	}
	answers := make([]EndAnswer, len(ends))
	for n, cmd := range run(ctx, rdb, calls, true) {
		if calls[n].script != doneAtOnce {
			held, err := cmd.Int()
			answers[of[n][0]] = EndAnswer{Held: held == 1, Err: err}
			continue
		}
		held, err := cmd.Int64Slice()
		if err == nil && len(held) != len(of[n]) {
			err = ErrReply
		}
		for k, i := range of[n] {
			answers[i] = EndAnswer{Held: err == nil && held[k] == 1, Err: err}
		}
	}
	return answers
}

// EndAnswer is Redis' answer to an [Ending].
type EndAnswer struct {
	Held bool
	Err  error
}
