package delivery

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strconv"
	"sync"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/carpool-go/carpool/internal/asynqwire"
	"github.com/carpool-go/carpool/internal/reason"
)

// Rescue gives jobs back to their queues whose worker died.
//
// A worker that lives extends the lease of each job it runs every 5 s, by 30 s.
// A lease that has stayed the same for longer than that is over, by its holder's
// own clock as well: asynq ends the run of a worker that finds its lease over.
// asynq's own recoverer does the same a minute or two after the worker's death; it
// allows for clocks that differ, where rescue only watches how long nothing
// happens by its own, it never finds a job that is active without a lease, and it
// counts a try for a job that has not begun. The servers' client keeps it from finding any.
// (Upstream, the recoverer's interval and its allowance would be settings.)
type Rescue struct {
	rdb    redis.UniversalClient
	queues []string
	log    *slog.Logger
	still  time.Duration // how long a lease must have stayed the same

	seen    map[string]lease     // of active jobs, by queue and id
	scanned time.Time            // when seen was seen
	warned  map[string]time.Time // when it was last warned: of a queue's archive that is nearly full, of a job
	counted time.Time            // when the archives were counted
	ctx     context.Context
	cancel  context.CancelFunc
	done    sync.WaitGroup
}

// lease is what was seen of an active job's lease.
type lease struct {
	expiry       string        // as Redis has it; "" for none
	unchangedFor time.Duration // how long it has been seen to stay the same
	lastExtended time.Time     // when it was last seen to be another; zero if it wasn't
}

const (
	rescueEvery = 3 * time.Second
	// archiveEvery is how often the archives are counted.
	archiveEvery = time.Minute
	// leaseStill is asynq's lease and a little more.
	leaseStill = 32 * time.Second
	// overStill is a heartbeat and a little more.
	overStill = 7 * time.Second
)

func newRescue(rdb redis.UniversalClient, queues []string, still time.Duration, log *slog.Logger) *Rescue {
	ctx, cancel := context.WithCancel(context.Background())
	return &Rescue{
		rdb: rdb, queues: queues, log: log, still: still,
		seen: make(map[string]lease), warned: make(map[string]time.Time),
		ctx: ctx, cancel: cancel,
	}
}

// Start starts looking at the leases.
func (r *Rescue) Start() error {
	r.done.Go(func() { r.run(r.ctx) })
	return nil
}

// Stop ends it.
func (r *Rescue) Stop() {
	r.cancel()
	r.done.Wait()
}

func (r *Rescue) run(ctx context.Context) {
	every := min(rescueEvery, r.still/4)
	tick := time.NewTicker(every)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		// While Redis is away no lease is extended, so that time doesn't count.
		now, found := time.Now(), make(map[string]lease)
		passed := min(now.Sub(r.scanned), 2*every)
		if err := r.scanLeases(ctx, passed, found); err != nil {
			if ctx.Err() == nil {
				r.log.Debug("the leases could not be looked at", "error", err)
			}
			continue
		}
		r.seen, r.scanned = found, now
		if now.Sub(r.counted) > archiveEvery {
			r.counted = now
			r.countArchives(ctx)
		}
	}
}

// countArchives warns, once an hour, of archives that are nearly full.
func (r *Rescue) countArchives(ctx context.Context) {
	for _, queue := range r.queues {
		n, err := r.rdb.ZCard(ctx, asynqwire.Archived(queue)).Result()
		if err == nil && n >= asynqwire.ArchiveWarning && time.Since(r.warned[queue]) > time.Hour {
			r.warned[queue] = time.Now()
			r.log.Warn("the archive of a queue is nearly full, and asynq then drops the oldest jobs; see the command archive ls",
				"queue", queue, "archived", n, "limit", asynqwire.ArchiveLimit)
		}
	}
}

func (r *Rescue) scanLeases(ctx context.Context, passed time.Duration, found map[string]lease) error {
	for _, queue := range r.queues {
		if err := r.scanQueue(ctx, queue, passed, found); err != nil {
			return fmt.Errorf("queue %s: %w", queue, err)
		}
	}
	return nil
}

// scanQueue notes the leases of a queue's active jobs in found, and rescues those jobs
// whose lease has stayed the same for too long.
func (r *Rescue) scanQueue(ctx context.Context, queue string, passed time.Duration, found map[string]lease) error {
	pipe := r.rdb.Pipeline()
	active := pipe.LRange(ctx, asynqwire.Active(queue), 0, -1)
	leases := pipe.ZRangeWithScores(ctx, asynqwire.Leases(queue), 0, -1)
	if _, err := pipe.Exec(ctx); err != nil {
		return err
	}
	expiries := make(map[string]string)
	for _, z := range leases.Val() {
		expiries[z.Member.(string)] = strconv.FormatFloat(z.Score, 'f', -1, 64)
	}
	for _, id := range active.Val() {
		key := queue + " " + id
		now := lease{expiry: expiries[id]}
		if before, ok := r.seen[key]; ok {
			now.lastExtended = r.scanned
			if before.expiry == now.expiry {
				now.lastExtended, now.unchangedFor = before.lastExtended, before.unchangedFor+passed
			}
		}
		if isLongOver(now.expiry) && now.unchangedFor > overStill {
			now.unchangedFor = r.still // no worker was there to watch it for longer
		}
		found[key] = now
		if now.unchangedFor < r.still {
			continue
		}
		why, err := r.giveBack(ctx, queue, id, now)
		if err != nil {
			return err
		}
		if why != "" {
			r.log.Warn("a job was given back to its queue: "+why, slog.Group("job", "id", id, "queue", queue))
		}
		delete(found, key)
	}
	return nil
}

// isLongOver reports whether a lease ended so long ago, by this clock, as asynq's
// recoverer allows for clocks that differ.
func isLongOver(expiry string) bool {
	seconds, err := strconv.ParseFloat(expiry, 64)
	return err == nil && time.Since(time.Unix(int64(seconds), 0)) > leaseStill
}

// giveBack gives a job back, and returns why; "" if its worker was faster.
//
// That uses up a try, or a job that kills its workers would go on doing so. But a
// job whose lease was never extended has most likely not begun: one lost answer of
// Redis leaves it so. That costs nothing, once, and once more for each try.
func (r *Rescue) giveBack(ctx context.Context, queue, id string, seen lease) (why string, err error) {
	msg, last, err := asynqwire.ReadUnended(ctx, r.rdb, queue, id)
	switch {
	case errors.Is(err, asynqwire.ErrNoSuchTask): // an id without its job, which must keep nobody else from being given back
		r.log.Error("a job that was running has lost its data, and can't be given back: "+asynqwire.ErrLost.Error(),
			slog.Group("job", "id", id, "queue", queue))
		return "", asynqwire.ForgetActive(ctx, r.rdb, queue, id)
	case errors.Is(err, asynqwire.ErrMessage):
		if key := queue + " " + id; time.Since(r.warned[key]) > time.Hour {
			r.warned[key] = time.Now()
			r.log.Warn("a job can't be given back", slog.Group("job", "id", id, "queue", queue), "error", err)
		}
		return "", nil
	case err != nil:
		return "", fmt.Errorf("read job %s: %w", id, err)
	}
	extended := !seen.lastExtended.IsZero() && seen.lastExtended.Unix() > msg.LastFailedAt // by this delivery's worker
	if extended || last.FreeRedeliveries > msg.Retried || last.Reason != "" {
		msg.Retried++
		msg.LastErr, last.Reason = reason.Crashed, reason.Crashed
	} else {
		last.FreeRedeliveries++
		msg.LastErr = reason.Unfetched
	}
	msg.LastFailedAt = time.Now().Unix()
	moved, err := asynqwire.GiveBack(ctx, r.rdb, queue, id, seen.expiry, msg, last)
	if err != nil || !moved {
		return "", err
	}
	return msg.LastErr, nil
}
