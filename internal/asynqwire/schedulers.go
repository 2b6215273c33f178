package asynqwire

import (
	"context"
	"time"

	"github.com/hibiken/asynq"
	"github.com/redis/go-redis/v9"
	"google.golang.org/protobuf/encoding/protowire"
)

// What asynqmon's page of schedulers reads, asynq's own scheduler writes. The keys
// are those of asynq's internal/base, the messages those of its
// internal/proto/asynq.proto.

// allSchedulersKey is the sorted set of the keys of all schedulers' entries, each
// with the time in seconds at which it expires.
const allSchedulersKey = "asynq:schedulers"

// schedulerKey is the list of one scheduler's entries.
func schedulerKey(scheduler string) string { return "asynq:schedulers:{" + scheduler + "}" }

// historyKey is the sorted set of what was enqueued for one entry, by the time in
// seconds.
func historyKey(entry string) string { return "asynq:scheduler_history:" + entry }

const (
	// historyMost is how many of an entry's events asynq keeps.
	historyMost = 1000
	// historyTTL is how long the history of an entry that runs no more is kept.
	historyTTL = 400 * 24 * time.Hour
)

// SchedulerEntry is an entry on asynqmon's page of schedulers.
type SchedulerEntry struct {
	ID   string
	Spec string // the cron expression, with CRON_TZ= if it needs a time zone
	// Kind and Payload are its job's.
	Kind    string
	Payload []byte
	Options []asynq.Option
	// Next is when it is due, and Prev when it was last; a zero Prev is never.
	Next, Prev time.Time
}

// ShowSchedulerEntries puts the entries in the place of those that the page shows
// for the scheduler. They leave it after ttl.
func ShowSchedulerEntries(ctx context.Context, rdb redis.UniversalClient, scheduler string, entries []SchedulerEntry, ttl time.Duration) error {
	key := schedulerKey(scheduler)
	args := []any{int(ttl.Seconds())}
	for _, e := range entries {
		args = append(args, e.message())
	}
	if err := replaceSchedulerEntries.Run(ctx, rdb, []string{key}, args...).Err(); err != nil {
		return err
	}
	return rdb.ZAdd(ctx, allSchedulersKey, redis.Z{Score: float64(time.Now().Add(ttl).Unix()), Member: key}).Err()
}

// replaceSchedulerEntries puts entries in the place of those that a scheduler had.
//
// KEYS[1]  -> asynq:schedulers:{<scheduler>}
// ARGV[1]  -> how long they stay, in seconds
// ARGV[2:] -> the entries, as SchedulerEntry messages
var replaceSchedulerEntries = redis.NewScript(`
redis.call("DEL", KEYS[1])
for i = 2, #ARGV do redis.call("RPUSH", KEYS[1], ARGV[i]) end
redis.call("EXPIRE", KEYS[1], ARGV[1])
return redis.status_reply("OK")`)

// AddSchedulerEvents adds to an entry's history that the jobs of these ids were
// enqueued at a time. What is more than asynq keeps falls out of it.
func AddSchedulerEvents(ctx context.Context, rdb redis.UniversalClient, entry string, ids []string, at time.Time) error {
	key := historyKey(entry)
	_, err := rdb.TxPipelined(ctx, func(tx redis.Pipeliner) error {
		for _, id := range ids {
			tx.ZAdd(ctx, key, redis.Z{Score: float64(at.Unix()), Member: eventMessage(id, at)})
		}
		tx.ZRemRangeByRank(ctx, key, 0, -historyMost-1)
		tx.Expire(ctx, key, historyTTL)
		return nil
	})
	return err
}

// message is asynq's SchedulerEntry.
func (e SchedulerEntry) message() []byte {
	var m []byte
	text := func(field protowire.Number, s string) {
		m = protowire.AppendString(protowire.AppendTag(m, field, protowire.BytesType), s)
	}
	text(1, e.ID)
	text(2, e.Spec)
	text(3, e.Kind)
	text(4, string(e.Payload))
	for _, o := range e.Options {
		text(5, o.String())
	}
	m = appendTime(m, 6, e.Next)
	return appendTime(m, 7, e.Prev) // the zero time is asynq's own for never
}

// eventMessage is asynq's SchedulerEnqueueEvent.
func eventMessage(id string, at time.Time) []byte {
	m := protowire.AppendString(protowire.AppendTag(nil, 1, protowire.BytesType), id)
	return appendTime(m, 2, at)
}

// appendTime appends a google.protobuf.Timestamp.
func appendTime(m []byte, field protowire.Number, t time.Time) []byte {
	var stamp []byte
	if s := t.Unix(); s != 0 {
		stamp = protowire.AppendVarint(protowire.AppendTag(stamp, 1, protowire.VarintType), uint64(s))
	}
	if n := t.Nanosecond(); n != 0 {
		stamp = protowire.AppendVarint(protowire.AppendTag(stamp, 2, protowire.VarintType), uint64(n))
	}
	return protowire.AppendBytes(protowire.AppendTag(m, field, protowire.BytesType), stamp)
}
