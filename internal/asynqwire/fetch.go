package asynqwire

import (
	"context"
	"errors"
	"math"
	"slices"
	"strconv"
	"time"

	"github.com/redis/go-redis/v9"
)

// What carpool writes in a job's hash beside asynq's own fields. A worker of another
// program leaves them as they are.
const (
	// FreeRedeliveries counts how often the job was given back without using up a try.
	FreeRedeliveries = "carpool_unfetched"
	// fetchField is the id of the fetch that has taken the job.
	fetchField = "carpool_fetch"
	// deliveriesField counts the deliveries of the job.
	deliveriesField = "carpool_deliveries"
	// unendedField says why the last attempt had no end, if it had none.
	unendedField = "carpool_unended"
)

const (
	// LeaseTime is how long a lease lasts, which is asynq's.
	LeaseTime = 30 * time.Second
	// MaxToken is the largest fencing token: tokens are a lease's microseconds, which asynq
	// leaves at 0.
	MaxToken = 999_999
	// maxFetchBytes bounds what one fetch takes: it ends with the job that goes beyond.
	maxFetchBytes = 1 << 20
	// maxLeft bounds how many jobs of other workers' kinds a fetch moves out of its way in a
	// queue.
	maxLeft = 100
)

// leaseScript has what scripts share that give and compare leases. A lease is the time at
// which it ends, in Unix seconds by Redis' own clock, and a fencing token in its
// microseconds.
const leaseScript = `
local function holds(lease, token)
	return lease and math.floor(tonumber(lease) % 1 * 1e6 + 0.5) == tonumber(token)
end
local function newLease(now, token)
	return string.format("%d.%06d", now + 30, token)
end`

// A fetch takes jobs from the right ends of the lists of pending ones. The first write of
// each step is one that a full Redis takes.
//
// KEYS[4i-3 … 4i] for queue i: pending, paused, active, leases
// ARGV[1] the fencing token of the leases
// ARGV[2] the fetch's id
// ARGV[3] "1" if it may have been made before
// ARGV[4] how many jobs at most
// ARGV[5] how many bytes, about
// ARGV[6] how many jobs of kinds to be left may be moved, of a queue
// ARGV[7] from when on it is too late for this fetch, in Unix seconds; 0 for never
// ARGV[2i+6], ARGV[2i+7] for queue i: what the keys of its jobs begin with, its share
// ARGV[…] the kinds to be left to other workers
var fetch = newScript(leaseScript + `
local token, id, n = ARGV[1], ARGV[2], #KEYS / 4
local most, bytes, left = tonumber(ARGV[4]), tonumber(ARGV[5]), {}
local time = redis.call("TIME")
local lease = newLease(time[1], token)
local late = tonumber(ARGV[7]) > 0 and tonumber(time[1]) + tonumber(time[2]) / 1e6 > tonumber(ARGV[7])
local jobs, gone, paused, passed = {}, {}, {}, {}
local others
for i = 8 + 2 * n, #ARGV do
	others = others or {}
	others[ARGV[i]] = true
end

local function kindOf(msg)
	local tag, size, more = string.byte(msg, 1, 3)
	local from = 3
	if size and size >= 128 and more then
		size, from = size - 128 + 128 * more, 4
	end
	if tag ~= 10 or not size then return "" end
	return string.sub(msg, from, from + size - 1)
end

local function take(i, want)
	local pending, active, leases, prefix = KEYS[4*i-3], KEYS[4*i-1], KEYS[4*i], ARGV[2*i+6]
	local aside, taken, leased = {}, {}, {}
	left[i] = left[i] or tonumber(ARGV[6])
	while want > 0 and bytes > 0 and #aside < left[i] do
		local ids = redis.call("LRANGE", pending, -want, -1)
		if #ids == 0 then break end
		redis.call("LTRIM", pending, 0, -want - 1)
		for at = #ids, 1, -1 do
			if bytes <= 0 then
				redis.call("RPUSH", pending, unpack(ids, 1, at))
				break
			end
			local job, key = ids[at], prefix .. ids[at]
			local hash = redis.pcall("HMGET", key, "msg", "` + FreeRedeliveries + `", "` + unendedField + `", "` + deliveriesField + `")
			local msg = hash[1]
			if not msg then
				gone[#gone+1] = {i, job}
			elseif others and others[kindOf(msg)] then
				aside[#aside+1] = job
			else
				local deliveries = (tonumber(hash[4]) or 0) + 1
				redis.call("HSET", key, "state", "active", "` + fetchField + `", id, "` + deliveriesField + `", deliveries)
				taken[#taken+1] = job
				leased[#leased+1] = lease
				leased[#leased+1] = job
				jobs[#jobs+1] = {i, job, msg, deliveries, hash[2] or "", hash[3] or ""}
				want, bytes = want - 1, bytes - #msg
			end
		end
	end
	if #taken > 0 then
		redis.call("LPUSH", active, unpack(taken))
		redis.call("ZADD", leases, unpack(leased))
	end
	if #aside > 0 then
		redis.call("LPUSH", pending, unpack(aside))
		left[i], passed[i] = left[i] - #aside, 1
	end
end

if ARGV[3] == "1" then
	for i = 1, n do
		local held = redis.call("ZRANGE", KEYS[4*i], 0, -1, "WITHSCORES")
		for j = 1, #held, 2 do
			local key = ARGV[2*i+6] .. held[j]
			if holds(held[j+1], token) and redis.call("HGET", key, "` + fetchField + `") == id then
				local hash = redis.call("HMGET", key, "msg", "` + FreeRedeliveries + `", "` + unendedField + `", "` + deliveriesField + `")
				if hash[1] then
					redis.call("ZREM", KEYS[4*i], held[j]) -- a full Redis takes nothing else first
					redis.call("ZADD", KEYS[4*i], lease, held[j])
					jobs[#jobs+1] = {i, held[j], hash[1], tonumber(hash[4]) or 1, hash[2] or "", hash[3] or ""}
				end
			end
		end
	end
end
if #jobs == 0 and not late then
	for i = 1, n do
		paused[i] = redis.call("EXISTS", KEYS[4*i-2])
		passed[i] = 0
	end
	for i = 1, n do
		if paused[i] == 0 then take(i, math.min(tonumber(ARGV[2*i+7]), most - #jobs)) end
	end
	for i = 1, n do
		if paused[i] == 0 then take(i, most - #jobs) end
	end
end
return {jobs, gone, paused, passed, {time[1], time[2]}}`)

// Share is how many jobs a fetch takes from a queue before it looks at the others.
type Share struct {
	Queue string
	Jobs  int
}

// Fetch says which jobs are fetched.
type Fetch struct {
	// Token is the fencing token of the leases, from 1 to [MaxToken], and ID tells this
	// fetch from all others with the same token.
	Token int
	ID    string
	// Shares are the queues' parts. What one can't give is taken from the others, in this
	// order, but not by a Redis Cluster, where each queue is asked by itself.
	Shares []Share
	// Again is set for a fetch that got no answer before: if it had arrived, it returns the
	// jobs that it took then.
	Again bool
	// Until is when it is too late for the fetch, by Redis' clock: then it takes nothing new. A
	// zero Until is never.
	Until time.Time
	// Leave are the kinds of the jobs that are left to other workers. They are moved to the
	// other ends of their queues.
	Leave []string
}

// Fetched is a job that a fetch has taken.
type Fetched struct {
	Queue, ID string
	// Data is its message, as asynq reads it.
	Data string
	// Deliveries is how many deliveries this is, if all workers that had it count.
	Deliveries int
	// FreeRedeliveries is how often it was given back without using up a try.
	FreeRedeliveries int
	// Unended is why its last attempt had no end; "" if it had one.
	Unended string
}

// Fetching is the answer to a [Fetch].
type Fetching struct {
	Jobs []Fetched
	// Gone are the jobs whose hashes Redis doesn't have any more. They are in no list now.
	Gone []Fetched
	// Paused are the queues that are paused, and Passed those that have jobs which were left
	// to other workers.
	Paused, Passed map[string]bool
	// Time is Redis' clock; zero if there was no answer.
	Time time.Time
}

// Do makes the fetch. With an error, which is Redis', some jobs may have been fetched and
// are in the answer. go-redis doesn't make it again by itself, so that the caller can say
// that it is made again.
func (f Fetch) Do(ctx context.Context, rdb redis.UniversalClient) (Fetching, error) {
	answer := Fetching{Paused: make(map[string]bool), Passed: make(map[string]bool)}
	if _, ok := rdb.(*redis.ClusterClient); !ok {
		return answer, f.ask(ctx, rdb, [][]Share{f.Shares}, &answer)
	}
	// Each queue is in a slot of its own: what one can't give is asked of the others after
	// that.
	want := 0
	var each [][]Share
	for _, share := range f.Shares {
		want += share.Jobs
		each = append(each, []Share{share})
	}
	if err := f.ask(ctx, rdb, each, &answer); err != nil {
		return answer, err
	}
	got := make(map[string]int)
	for _, job := range answer.Jobs {
		got[job.Queue]++
	}
	f.Again = false
	for _, share := range f.Shares {
		rest := want - len(answer.Jobs)
		if rest <= 0 || got[share.Queue] < share.Jobs {
			continue
		}
		if err := f.ask(ctx, rdb, [][]Share{{{share.Queue, rest}}}, &answer); err != nil {
			return answer, err
		}
	}
	return answer, nil
}

// ask fetches from several groups of queues at once, each of which is in one slot, and adds
// to the answer. The error is the first one.
func (f Fetch) ask(ctx context.Context, rdb redis.UniversalClient, groups [][]Share, answer *Fetching) (err error) {
	calls := make([]call, 0, len(groups))
	for _, group := range groups {
		calls = append(calls, f.call(group))
	}
	for i, cmd := range run(ctx, rdb, calls, false) {
		if e := answer.add(groups[i], cmd); e != nil && err == nil {
			err = e
		}
	}
	return err
}

func (f Fetch) call(group []Share) call {
	most := 0
	for _, share := range group {
		most += share.Jobs
	}
	again := "0"
	if f.Again {
		again = "1"
	}
	var keys []string
	until := "0"
	if !f.Until.IsZero() {
		until = Score(f.Until)
	}
	args := []any{f.Token, f.ID, again, most, maxFetchBytes, maxLeft, until}
	for _, share := range group {
		keys = append(keys, Pending(share.Queue), Paused(share.Queue), Active(share.Queue), Leases(share.Queue))
		args = append(args, Task(share.Queue, ""), share.Jobs)
	}
	for _, kind := range f.Leave {
		args = append(args, kind)
	}
	return call{fetch, keys, args}
}

// ErrReply is returned for an answer that none of carpool's scripts gives, as a proxy in
// front of Redis may.
var ErrReply = errors.New("asynqwire: a script's answer can't be read")

// add adds a script's answer.
func (a *Fetching) add(group []Share, cmd *redis.Cmd) error {
	reply, err := cmd.Slice()
	if err != nil {
		return err
	}
	if len(reply) != 5 {
		return ErrReply
	}
	queueOf := func(n any) (string, bool) {
		i, _ := n.(int64)
		if i < 1 || int(i) > len(group) {
			return "", false
		}
		return group[i-1].Queue, true
	}
	lists := make([][]any, len(reply))
	for i := range reply {
		lists[i], _ = reply[i].([]any)
	}
	for _, one := range lists[0] {
		fields, _ := one.([]any)
		if len(fields) != 6 {
			return ErrReply
		}
		queue, ok := queueOf(fields[0])
		job := Fetched{Queue: queue}
		job.ID, _ = fields[1].(string)
		job.Data, _ = fields[2].(string)
		deliveries, _ := fields[3].(int64)
		free, _ := fields[4].(string)
		job.Unended, _ = fields[5].(string)
		job.Deliveries = int(deliveries)
		job.FreeRedeliveries, _ = strconv.Atoi(free)
		if !ok {
			return ErrReply
		}
		a.Jobs = append(a.Jobs, job)
	}
	for _, one := range lists[1] {
		fields, _ := one.([]any)
		if len(fields) != 2 {
			return ErrReply
		}
		queue, _ := queueOf(fields[0])
		id, _ := fields[1].(string)
		a.Gone = append(a.Gone, Fetched{Queue: queue, ID: id})
	}
	if len(lists[4]) == 2 {
		a.Time = redisTime(lists[4])
	}
	for i, share := range group {
		a.Paused[share.Queue] = a.Paused[share.Queue] || isOne(lists[2], i)
		a.Passed[share.Queue] = a.Passed[share.Queue] || isOne(lists[3], i)
	}
	return nil
}

// redisTime reads what the command TIME returns: seconds and microseconds.
func redisTime(reply []any) time.Time {
	seconds, _ := reply[0].(string)
	micros, _ := reply[1].(string)
	s, _ := strconv.ParseInt(seconds, 10, 64)
	us, _ := strconv.ParseInt(micros, 10, 64)
	return time.Unix(s, us*1000)
}

func isOne(list []any, i int) bool { return i < len(list) && list[i] == int64(1) }

// KEYS[1] leases
// ARGV[2i-1], ARGV[2i] for job i: its id, its fencing token
var extend = newScript(leaseScript + `
local now, lost = redis.call("TIME")[1], {}
for i = 1, #ARGV, 2 do
	if holds(redis.call("ZSCORE", KEYS[1], ARGV[i]), ARGV[i+1]) then
		redis.call("ZREM", KEYS[1], ARGV[i]) -- a full Redis takes nothing else first
		redis.call("ZADD", KEYS[1], newLease(now, ARGV[i+1]), ARGV[i])
	else
		lost[#lost+1] = ARGV[i]
	end
end
return lost`)

// Lease is the lease of an active job.
type Lease struct {
	ID    string
	Token int // its fencing token
}

// ExtendLeases extends the leases of jobs that have their fencing tokens still, by queue, to
// [LeaseTime] from now, and returns those of the others. The error is Redis', for which
// those that it has not answered for are in neither.
func ExtendLeases(ctx context.Context, rdb redis.UniversalClient, leases map[string][]Lease) (extended, lost map[string][]Lease, err error) {
	var queues []string
	var calls []call
	for queue, held := range leases {
		args := make([]any, 0, 2*len(held))
		for _, l := range held {
			args = append(args, l.ID, l.Token)
		}
		queues, calls = append(queues, queue), append(calls, call{extend, []string{Leases(queue)}, args})
	}
	extended, lost = make(map[string][]Lease), make(map[string][]Lease)
	for i, cmd := range run(ctx, rdb, calls, true) {
		ids, e := cmd.StringSlice()
		if e != nil {
			err = e
			continue
		}
		for _, l := range leases[queues[i]] {
			if slices.Contains(ids, l.ID) {
				lost[queues[i]] = append(lost[queues[i]], l)
			} else {
				extended[queues[i]] = append(extended[queues[i]], l)
			}
		}
	}
	return extended, lost, err
}

// TokenOf returns the fencing token of a lease, 0 for one of a worker that gives none.
func TokenOf(lease float64) int {
	_, fraction := math.Modf(lease)
	return int(math.Round(fraction * 1e6))
}
