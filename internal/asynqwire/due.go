package asynqwire

import (
	"context"
	"time"

	"github.com/redis/go-redis/v9"
)

// Jobs that are due go from the sorted sets to their queues, or their groups, by Redis' own
// clock.
//
// KEYS[3i-2 … 3i] for queue i: scheduled, retry, pending
// ARGV[2i-1], ARGV[2i] for queue i: what the keys of its jobs begin with, and of its groups
var due = newScript(`
local sets = {}
for i = 1, #KEYS, 3 do
	sets[#sets+1], sets[#sets+2] = KEYS[i], KEYS[i+1]
end
if redis.call("EXISTS", unpack(sets)) == 0 then return {0, -1} end
local time = redis.call("TIME")
local now = tonumber(time[1]) + tonumber(time[2]) / 1e6
local stamp = string.format("%.6f", now)
local moved, soonest = 0, -1
for i = 1, #KEYS / 3 do
	local pending, prefix, groups = KEYS[3*i], ARGV[2*i-1], ARGV[2*i]
	for j = 2, 1, -1 do
		local set = KEYS[3*i-j]
		local first = redis.call("ZRANGE", set, 0, 0, "WITHSCORES")
		while #first > 0 and tonumber(first[2]) <= now and moved < 1000 do
			for _, id in ipairs(redis.call("ZRANGEBYSCORE", set, "-inf", stamp, "LIMIT", 0, 100)) do
				redis.call("ZREM", set, id)
				local job = redis.pcall("HMGET", prefix .. id, "msg", "group")
				local group = job[2]
				if not job[1] then
					redis.call("LPUSH", pending, id) -- its hash is gone, or is none; the fetch finds that out
				elseif group and group ~= "" then
					redis.call("ZADD", groups .. group, time[1], id)
					redis.call("HSET", prefix .. id, "state", "aggregating")
				else
					redis.call("LPUSH", pending, id)
					redis.call("HSET", prefix .. id, "state", "pending", "pending_since",
						time[1] .. string.format("%06d", time[2]) .. "000")
				end
				moved = moved + 1
			end
			first = redis.call("ZRANGE", set, 0, 0, "WITHSCORES")
		end
		if #first > 0 then
			local wait = math.max(0, math.ceil((tonumber(first[2]) - now) * 1000))
			if soonest < 0 or wait < soonest then soonest = wait end
		end
	end
end
return {moved, soonest}`)

// MoveDue moves the jobs of these queues that are due, a thousand at most of those in one
// slot, and returns how long it is until the next one is; negative if there is none. The
// error is Redis'.
func MoveDue(ctx context.Context, rdb redis.UniversalClient, queues []string) (next time.Duration, err error) {
	groups := [][]string{queues}
	if _, ok := rdb.(*redis.ClusterClient); ok {
		groups = nil
		for _, queue := range queues {
			groups = append(groups, []string{queue})
		}
	}
	calls := make([]call, 0, len(groups))
	for _, group := range groups {
		var keys []string
		var args []any
		for _, queue := range group {
			keys = append(keys, Scheduled(queue), Retry(queue), Pending(queue))
			args = append(args, Task(queue, ""), key(queue, "g:"))
		}
		calls = append(calls, call{due, keys, args})
	}
	next = -1
	for _, cmd := range run(ctx, rdb, calls, true) {
		reply, e := cmd.Int64Slice()
		switch {
		case e != nil:
			err = e
		case len(reply) != 2:
			err = ErrReply
		case reply[1] >= 0 && (next < 0 || time.Duration(reply[1])*time.Millisecond < next):
			next = time.Duration(reply[1]) * time.Millisecond
		}
	}
	return next, err
}
