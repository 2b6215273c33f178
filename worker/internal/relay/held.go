package relay

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/carpool-go/carpool/internal/asynqwire"
	"github.com/carpool-go/carpool/internal/outbox"
)

// held are rows that Redis has not taken although it answers, by their ids. Batches pass
// over them, so that no other row waits behind them, and each is tried again alone.
//
// Redis says of few things that they are too large. It, or what is before it, mostly closes
// the connection amid them, which looks like an outage. So a row of some size is rejected
// when it was not taken maxTries times while its queue's Redis answered before and after.
// Smaller ones are tried for ever, because their size can't be the reason.
type held map[string]*heldRow

type heldRow struct {
	tries int
	due   time.Time // of the next one
}

const (
	// maxHeld is how many rows may be held at once. When more are not taken it is for a
	// reason of Redis', and they wait as in an outage.
	maxHeld = 500
	// maxTries is how often a large row is tried before it is rejected.
	maxTries = 4
	// largeSize is from where on a payload's size may be why it is not taken, which is below
	// the limits of Redis and its like: 1 MB at least.
	largeSize = 256 << 10
	// holdFirst is the time between a row's first two tries. It becomes four times as much
	// with each, up to holdLongest.
	holdFirst   = 500 * time.Millisecond
	holdLongest = time.Minute
	// askTimeout bounds the question whether Redis answers.
	askTimeout = time.Second
)

// ids are those of all rows that are held.
func (h held) ids() []string { return slices.Collect(maps.Keys(h)) }

// next returns the row that has been due for the longest time; ok is false if none is due.
func (h held) next() (id string, ok bool) {
	until := time.Now()
	for i, row := range h {
		if row.due.Before(until) {
			id, until, ok = i, row.due, true
		}
	}
	return id, ok
}

// untilNext is the time until a row is due, longest at most.
func (h held) untilNext(longest time.Duration) time.Duration {
	for _, row := range h {
		longest = min(longest, time.Until(row.due))
	}
	return max(longest, 0)
}

// undecided reports whether the relay is still to find out if a row is taken.
func (h held) undecided() bool {
	for _, row := range h {
		if row.tries < maxTries {
			return true
		}
	}
	return false
}

// hold keeps the rows of a batch that Redis did not take, because the fault is theirs:
// Redis answers. It rejects those that were tried often enough. In an outage it does
// nothing, and the batch keeps its redisErr.
func (r *Relay) hold(ctx context.Context, b *batch) {
	full := len(r.held)+len(b.failed) > maxHeld
	asked := make(map[string]bool)
	for _, f := range b.failed {
		if full && r.held[f.row.ID] == nil {
			return
		}
		if isTemporary.MatchString(f.err.Error()) {
			return
		}
		queue := f.row.Queue
		if task, err := r.cfg.Tasks.Lookup(f.row.Kind); err == nil && queue == "" {
			queue = task.Options.Queue
		}
		if asked[queue] {
			continue
		}
		asked[queue] = true
		if !r.answers(ctx, queue, f.row.ID) {
			return
		}
	}
	for _, f := range b.failed {
		row := r.held[f.row.ID]
		if row == nil {
			row = new(heldRow)
			r.held[f.row.ID] = row
		}
		row.tries++
		row.due = time.Now().Add(min(holdLongest, holdFirst<<(2*min(row.tries-1, 10))))
		switch {
		case row.tries == maxTries && f.row.Size >= largeSize:
			delete(r.held, f.row.ID)
			b.reject(f.row, fmt.Sprintf("Redis does not take the %d bytes of its payload, but answers otherwise: %v", f.row.Size, f.err), r.cfg.Log)
		case row.tries == 2:
			r.cfg.Log.Warn("Redis does not take a row of the outbox, but answers otherwise; the row is tried again, and the others go on",
				"job_id", f.row.ID, "kind", f.row.Kind, "bytes", f.row.Size, "error", f.err)
		}
	}
	b.redisErr = nil
}

// answers reports whether the Redis that has a queue answers a question about a job.
func (r *Relay) answers(ctx context.Context, queue, id string) bool {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	err := r.cfg.Redis.HExists(ctx, asynqwire.Task(queue, id), "state").Err()
	_, answered := errors.AsType[redis.Error](err)
	return err == nil || answered && !isTemporary.MatchString(err.Error())
}

// asynq makes text of Redis' errors, so that text is what there is to go by.
var (
	// isTemporary matches the answers of a Redis that takes nothing, and will when it has
	// come up, or somebody has mended it.
	isTemporary = regexp.MustCompile(`(?:^|: )(?:LOADING|READONLY|OOM|MISCONF|MASTERDOWN|CLUSTERDOWN|TRYAGAIN|NOREPLICAS|BUSY|NOAUTH|NOPERM|WRONGPASS|` +
		`ERR max number of clients)\b`)
	// isTooLarge matches those that say that a command is too large: Redis', and those of
	// services before it that have a limit of their own.
	isTooLarge = regexp.MustCompile(`ERR (?:Protocol error: invalid bulk length|string exceeds maximum allowed size|max request size exceeded)`)
)

// forget lets go of a row that was tried alone, unless it was not taken again: it was moved
// or rejected, or is gone from the outbox.
func (h held) forget(id string, tried *batch) {
	if len(tried.failed) == 0 {
		delete(h, id)
	}
}

// failure is a row that Redis did not take, without its payload.
type failure struct {
	row outbox.Taken
	err error
}
