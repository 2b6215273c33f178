package worker

import (
	"context"
	"log/slog"
	"strconv"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/carpool-go/carpool/internal/asynqwire"
	"github.com/carpool-go/carpool/worker/internal/delivery"
	"github.com/carpool-go/carpool/worker/internal/relay"
)

// drain returns when nothing is queued, due or running, once what was in the
// outbox has come to the queues; or when ctx is done. It wants to see that twice,
// because a job that was just fetched is for a moment neither queued nor running.
func drain(ctx context.Context, outbox *relay.Relay, rdb redis.UniversalClient, queues map[string]int, executor *delivery.Executor, log *slog.Logger) {
	select {
	case <-ctx.Done():
		return
	case <-outbox.CaughtUp():
	}
	tick := time.NewTicker(2 * delivery.IdleCheck)
	defer tick.Stop()
	for seen := 0; seen < 2; {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		nothing, err := isIdle(ctx, rdb, queues)
		switch {
		case ctx.Err() != nil:
			return
		case err != nil:
			log.Warn("the queues could not be looked at", "error", err)
			seen = 0
		case nothing && executor.Running() == 0:
			seen++
		default:
			seen = 0
		}
	}
}

// isIdle reports whether the queues hold nothing that is due.
func isIdle(ctx context.Context, rdb redis.UniversalClient, queues map[string]int) (bool, error) {
	type lookAt struct{ paused, pending, scheduled, retried *redis.IntCmd }
	var looks []lookAt
	now := strconv.FormatInt(time.Now().Unix(), 10) // as asynq's scores are
	_, err := rdb.Pipelined(ctx, func(pipe redis.Pipeliner) error {
		for queue := range queues {
			looks = append(looks, lookAt{
				pipe.Exists(ctx, asynqwire.Paused(queue)), pipe.LLen(ctx, asynqwire.Pending(queue)),
				pipe.ZCount(ctx, asynqwire.Scheduled(queue), "-inf", now), pipe.ZCount(ctx, asynqwire.Retry(queue), "-inf", now),
			})
		}
		return nil
	})
	if err != nil {
		return false, err
	}
	for _, l := range looks {
		if l.pending.Val() > 0 && l.paused.Val() == 0 || l.scheduled.Val() > 0 || l.retried.Val() > 0 {
			return false, nil
		}
	}
	return true, nil
}
