package main

import (
	"context"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/hibiken/asynq"
	"github.com/redis/go-redis/v9"

	"github.com/carpool-go/carpool/outbound"
)

// asynqServers are the asynq servers of this process. One asynq server takes one
// job a round trip to Redis, so several fetch side by side and share the jobs
// at once among them. A further one serves the instance's own queue, so that
// the pool is validated even when all the others are busy.
type asynqServers struct {
	list []*asynq.Server
	// end ends the jobs that still run, by the frame's context.
	end             context.CancelCauseFunc
	shutdownTimeout time.Duration
}

const (
	// idleCheck is how long a fetch loop that found nothing waits, give or take
	// half of it. On two cores and a local Redis, four loops on three queues pick
	// up a job after 9 ms (p50) and ask Redis 240 times a second when idle; at
	// 10 ms it is 2 ms and 1100 times, at asynq's default of a second 150 ms.
	// Made by: cd bench && go run ./pickup
	idleCheck = 50 * time.Millisecond
	// dueCheck is how often scheduled jobs and retries that are due are moved
	// to their queues.
	dueCheck = time.Second
	// endingGrace is what jobs whose context has ended at a shutdown get for
	// winding up, before they are pushed back.
	endingGrace = 2 * time.Second
)

func startServers(rdb redis.UniversalClient, cfg config, f *frame, instanceQueue string, end context.CancelCauseFunc, log *slog.Logger) (*asynqServers, error) {
	s := &asynqServers{end: end, shutdownTimeout: cfg.shutdownTimeout}
	common := asynq.Config{
		DelayedTaskCheckInterval: dueCheck,
		RetryDelayFunc:           retryDelay,
		IsFailure:                isFailure,
		ErrorHandler:             f,
		ShutdownTimeout:          cfg.shutdownTimeout + endingGrace,
		BaseContext:              func() context.Context { return outbound.NewContext(context.Background(), cfg.outbound) },
		Logger:                   &asynqLog{log: log},
		LogLevel:                 asynq.InfoLevel, // below, it says each time that a queue is empty
	}
	for i := range cfg.fetchers {
		c := common
		c.Queues = cfg.queues
		c.TaskCheckInterval = idleCheck
		c.Concurrency = cfg.concurrency / cfg.fetchers
		if i < cfg.concurrency%cfg.fetchers {
			c.Concurrency++
		}
		s.list = append(s.list, asynq.NewServerFromRedisClient(rdb, c))
	}
	own := common
	own.Queues = map[string]int{instanceQueue: 1}
	own.Concurrency = 1
	s.list = append(s.list, asynq.NewServerFromRedisClient(rdb, own))

	for i, server := range s.list {
		if err := server.Start(f); err != nil {
			s.list = s.list[:i]
			s.stop()
			return nil, fmt.Errorf("start asynq server: %w", err)
		}
	}
	return s, nil
}

// stop stops fetching, lets jobs finish for the shutdown timeout, then
// ends their contexts, and pushes back what still has not finished.
func (s *asynqServers) stop() {
	timeUp := time.AfterFunc(s.shutdownTimeout, func() { s.end(errEnding) })
	defer timeUp.Stop()
	s.each((*asynq.Server).Stop) // takes its time if Redis is silent
	s.each((*asynq.Server).Shutdown)
}

func (s *asynqServers) each(do func(*asynq.Server)) {
	var wg sync.WaitGroup
	for _, server := range s.list {
		wg.Go(func() { do(server) })
	}
	wg.Wait()
}

// idle reports whether the queues hold nothing that is due.
func idle(inspector *asynq.Inspector, queues map[string]int) (bool, error) {
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
