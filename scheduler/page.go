package scheduler

import (
	"context"
	"log/slog"
	"time"

	"github.com/google/uuid"
	"github.com/hibiken/asynq"
	"github.com/redis/go-redis/v9"

	"github.com/carpool-go/carpool/internal/asynqwire"
)

// page keeps asynqmon's page of schedulers, on which the whole fleet is one
// scheduler.
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
	// pageName is the fleet's as a scheduler.
	pageName = "carpool"
	// pageBacklog is how many writes may wait for Redis; more are left out.
	pageBacklog = 100
	pageEvery   = 5 * time.Second
	// pageTTL is how long the entries stay on the page without a scheduler.
	pageTTL = 3 * pageEvery
	// pageTimeout bounds each write.
	pageTimeout = 5 * time.Second
)

// shownEntry is an entry as the page shows it.
type shownEntry struct {
	row  *row
	read readEntry
	next time.Time // zero: it has none
}

// show writes the entries that will run, every pageEvery.
func (p *page) show(entries []shownEntry) {
	if time.Since(p.shown) < pageEvery {
		return
	}
	p.shown = time.Now()
	var list []asynqwire.SchedulerEntry
	for _, e := range entries {
		if !e.next.IsZero() {
			list = append(list, e.onPage())
		}
	}
	p.write(func(ctx context.Context) error {
		return asynqwire.ShowSchedulerEntries(ctx, p.rdb, pageName, list, pageTTL)
	})
}

// record adds jobs to an entry's history.
func (p *page) record(entry string, jobs []uuid.UUID, at time.Time) {
	if len(jobs) == 0 {
		return
	}
	ids := make([]string, len(jobs))
	for i, id := range jobs {
		ids[i] = id.String()
	}
	p.write(func(ctx context.Context) error { return asynqwire.AddSchedulerEvents(ctx, p.rdb, entry, ids, at) })
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

func (e shownEntry) onPage() asynqwire.SchedulerEntry {
	onPage := asynqwire.SchedulerEntry{
		ID: e.row.name, Spec: e.row.cron, Kind: e.row.kind, Payload: []byte(e.row.payload), Options: e.options(), Next: e.next,
	}
	if e.row.zone != "UTC" && e.read.schedule.every == 0 {
		onPage.Spec = "CRON_TZ=" + e.row.zone + " " + e.row.cron
	}
	if e.row.firedTick != nil {
		onPage.Prev = *e.row.firedTick
	}
	return onPage
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
		options = append(options, asynq.Timeout(duration(t)))
	}
	if r := e.row.retention; r != nil {
		options = append(options, asynq.Retention(duration(r)))
	}
	return options
}
