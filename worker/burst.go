package worker

import (
	"context"
	"fmt"
	"log/slog"
	"strconv"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/carpool-go/carpool/internal/asynqwire"
	"github.com/carpool-go/carpool/worker/internal/delivery"
	"github.com/carpool-go/carpool/worker/internal/relay"
)

// stuckAfter is how long jobs may be due, while none runs and none is fetched, before a
// burst gives up.
const stuckAfter = 30 * time.Second

// drain returns when nothing is queued, due or running, once what was in the
// outbox has come to the queues; or when ctx is done. It wants to see that twice,
// because a job that was just fetched is for a moment neither queued nor running. The error
// says that jobs are due and nothing becomes of them: whoever waits for the end of a burst
// has nobody beside it who would see that.
func drain(ctx context.Context, outbox *relay.Relay, rdb redis.UniversalClient, queues map[string]int, servers *delivery.Servers, lost *lostJobs, log *slog.Logger) error {
	select {
	case <-ctx.Done():
		return nil
	case <-outbox.CaughtUp():
	}
	tick := time.NewTicker(2 * delivery.IdleCheck)
	defer tick.Stop()
	var before int64
	moved := time.Now()
	for seen := 0; seen < 2; {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		due, err := countDue(ctx, rdb, queues)
		running := servers.Held()
		if err != nil || running > 0 || due != before {
			before, moved = due, time.Now()
		}
		switch {
		case ctx.Err() != nil:
			return nil
		case err != nil:
			log.Warn("the queues could not be looked at", "error", err)
			seen = 0
		case due == 0 && running == 0:
			seen++
		default:
			seen = 0
		}
		if due > 0 && running == 0 {
			lost.remove(ctx)
		}
		if time.Since(moved) > stuckAfter {
			return fmt.Errorf("worker: jobs are due (%d), and for %s none was fetched; the log says why", due, stuckAfter)
		}
	}
	lost.remove(ctx) // those that were fetched in vain
	return nil
}

// countDue returns how many jobs the queues hold that are due.
func countDue(ctx context.Context, rdb redis.UniversalClient, queues map[string]int) (due int64, err error) {
	type lookAt struct{ paused, pending, scheduled, retried *redis.IntCmd }
	var looks []lookAt
	now := strconv.FormatInt(time.Now().Unix(), 10) // as asynq's scores are
	if err := asynqwire.Pipelined(ctx, rdb, func(pipe redis.Pipeliner) {
		for queue := range queues {
			looks = append(looks, lookAt{
				pipe.Exists(ctx, asynqwire.Paused(queue)), pipe.LLen(ctx, asynqwire.Pending(queue)),
				pipe.ZCount(ctx, asynqwire.Scheduled(queue), "-inf", now), pipe.ZCount(ctx, asynqwire.Retry(queue), "-inf", now),
			})
		}
	}); err != nil {
		return 0, err
	}
	for _, l := range looks {
		if l.paused.Val() == 0 {
			due += l.pending.Val()
		}
		due += l.scheduled.Val() + l.retried.Val()
	}
	return due, nil
}
