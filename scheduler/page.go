package scheduler

import (
	"context"
	"log/slog"
	"time"

	"github.com/google/uuid"
	"github.com/hibiken/asynq"
	"github.com/redis/go-redis/v9"
	"google.golang.org/protobuf/encoding/protowire"
)

// page is asynqmon's page of schedulers. It reads what asynq's own scheduler
// would write to Redis; carpool writes the same, for the whole fleet under one
// name. The keys are those of asynq's internal/base, the messages those of its
// internal/proto/asynq.proto.
//
// The page is for people: what Redis does not take is left out, and no tick waits
// for it.
type page struct {
	rdb    redis.UniversalClient
	log    *slog.Logger
	writes chan func(context.Context) error
	shown  time.Time // when the entries were handed to writes
}

func newPage(rdb redis.UniversalClient, log *slog.Logger) *page {
	return &page{rdb: rdb, log: log, writes: make(chan func(context.Context) error, pageBacklog)}
}

const (
	// pageBacklog is how many writes may wait for Redis; more are left out.
	pageBacklog = 100
	pageEvery   = 5 * time.Second
	// pageTTL is how long the entries stay on the page without a scheduler.
	pageTTL = 3 * pageEvery
	// pageTimeout bounds each write.
	pageTimeout = 5 * time.Second

	allSchedulersKey = "asynq:schedulers"
	schedulerKey     = "asynq:schedulers:{carpool}"
	historyKey       = "asynq:scheduler_history:"
	// historyMost is how many of an entry's runs asynq keeps.
	historyMost = 1000
	// historyTTL is how long the history of an entry that runs no more is kept.
	historyTTL = 400 * 24 * time.Hour
)

// shownEntry is an entry as the page shows it.
type shownEntry struct {
	row  *row
	read readEntry
	next time.Time // zero: it has none
}

// replaceList puts entries in the place of those that the page had.
var replaceList = redis.NewScript(`
redis.call("DEL", KEYS[1])
for i = 2, #ARGV do redis.call("RPUSH", KEYS[1], ARGV[i]) end
redis.call("EXPIRE", KEYS[1], ARGV[1])
return redis.status_reply("OK")`)

// show writes the entries that will run, every pageEvery.
func (p *page) show(entries []shownEntry) {
	if time.Since(p.shown) < pageEvery {
		return
	}
	p.shown = time.Now()
	args := []any{int(pageTTL.Seconds())}
	for _, e := range entries {
		if !e.next.IsZero() {
			args = append(args, e.message())
		}
	}
	p.write(func(ctx context.Context) error {
		if err := replaceList.Run(ctx, p.rdb, []string{schedulerKey}, args...).Err(); err != nil {
			return err
		}
		return p.rdb.ZAdd(ctx, allSchedulersKey, redis.Z{Score: float64(time.Now().Add(pageTTL).Unix()), Member: schedulerKey}).Err()
	})
}

// record adds jobs to an entry's history.
func (p *page) record(entry string, ids []uuid.UUID, at time.Time) {
	if len(ids) == 0 {
		return
	}
	p.write(func(ctx context.Context) error {
		key := historyKey + entry
		_, err := p.rdb.TxPipelined(ctx, func(tx redis.Pipeliner) error {
			for _, id := range ids {
				tx.ZAdd(ctx, key, redis.Z{Score: float64(at.Unix()), Member: eventMessage(id, at)})
			}
			tx.ZRemRangeByRank(ctx, key, 0, -historyMost-1)
			tx.Expire(ctx, key, historyTTL)
			return nil
		})
		return err
	})
}

func (p *page) write(w func(context.Context) error) {
	select {
	case p.writes <- w:
	default: // Redis is away, or too slow for it
	}
}

// run writes until ctx ends, and logs the first of several failures.
func (p *page) run(ctx context.Context) {
	failed := false
	for {
		select {
		case <-ctx.Done():
			return
		case write := <-p.writes:
			writeCtx, cancel := context.WithTimeout(ctx, pageTimeout)
			err := write(writeCtx)
			cancel()
			if err != nil && !failed && ctx.Err() == nil {
				p.log.Warn("Redis does not take what asynqmon's page of schedulers shows; ticks go on", "error", err)
			}
			failed = err != nil
		}
	}
}

// message is asynq's SchedulerEntry.
func (e shownEntry) message() []byte {
	var m []byte
	text := func(field protowire.Number, s string) {
		m = protowire.AppendString(protowire.AppendTag(m, field, protowire.BytesType), s)
	}
	text(1, e.row.name)
	spec := e.row.cron
	if e.row.zone != "UTC" && e.read.schedule.every == 0 {
		spec = "CRON_TZ=" + e.row.zone + " " + spec
	}
	text(2, spec)
	text(3, e.row.kind)
	text(4, e.row.payload)
	for _, o := range e.options() {
		text(5, o.String())
	}
	m = appendTime(m, 6, e.next)
	if e.row.firedTick != nil {
		return appendTime(m, 7, *e.row.firedTick)
	}
	return appendTime(m, 7, time.Time{}) // which asynq reads as never
}

func (e shownEntry) options() []asynq.Option {
	queue := e.read.queue
	if e.row.queue != nil {
		queue = *e.row.queue
	}
	var options []asynq.Option
	if queue != "" {
		options = append(options, asynq.Queue(queue))
	}
	if n := e.row.maxRetry; n != nil {
		options = append(options, asynq.MaxRetry(*n))
	}
	if t := e.row.timeout; t != nil {
		options = append(options, asynq.Timeout(time.Duration(*t*float64(time.Second))))
	}
	if r := e.row.retention; r != nil {
		options = append(options, asynq.Retention(time.Duration(*r*float64(time.Second))))
	}
	return options
}

// eventMessage is asynq's SchedulerEnqueueEvent.
func eventMessage(id uuid.UUID, at time.Time) []byte {
	m := protowire.AppendString(protowire.AppendTag(nil, 1, protowire.BytesType), id.String())
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
