package worker

import (
	"context"
	"log/slog"
	"time"

	"github.com/hibiken/asynq"
	"github.com/redis/go-redis/v9"

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
	inspector := asynq.NewInspectorFromRedisClient(rdb)
	tick := time.NewTicker(2 * delivery.IdleCheck)
	defer tick.Stop()
	for seen := 0; seen < 2; {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		nothing, err := isIdle(inspector, queues)
		switch {
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
func isIdle(inspector *asynq.Inspector, queues map[string]int) (bool, error) {
	existing, err := inspector.Queues()
	if err != nil {
		return false, err
	}
	for _, queue := range existing {
		if _, ours := queues[queue]; !ours {
			continue
		}
		info, err := inspector.GetQueueInfo(queue)
		if err != nil {
			return false, err
		}
		if info.Pending > 0 && !info.Paused {
			return false, nil
		}
		for _, list := range []func(string, ...asynq.ListOption) ([]*asynq.TaskInfo, error){
			inspector.ListScheduledTasks, inspector.ListRetryTasks,
		} {
			next, err := list(queue, asynq.PageSize(1)) // the earliest first
			if err != nil {
				return false, err
			}
			if len(next) > 0 && !next[0].NextProcessAt.After(time.Now()) {
				return false, nil
			}
		}
	}
	return true, nil
}
