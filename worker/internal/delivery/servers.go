package delivery

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/hibiken/asynq"
)

// Servers are the asynq servers of this process. One asynq server takes one
// job a round trip to Redis, so several fetch side by side and share the jobs
// at once among them. A further one serves the instance's own queue, so that
// the pool is validated even when all the others are busy.
type Servers struct {
	cfg      Config
	executor *Executor
	list     []*asynq.Server
}

const (
	// IdleCheck is how long a fetch loop that found nothing waits, give or take
	// half of it. On two cores and a local Redis, four loops on three queues pick
	// up a job after 9 ms (p50) and ask Redis 240 times a second when idle; at
	// 10 ms it is 2 ms and 1100 times, at asynq's default of a second 150 ms.
	// Made by: cd bench && go run ./pickup
	IdleCheck = 50 * time.Millisecond
	// dueCheck is how often scheduled jobs and retries that are due are moved
	// to their queues.
	dueCheck = time.Second
	// EndingGrace is what jobs whose context has ended at a shutdown get for
	// winding up, before they are pushed back.
	EndingGrace = 2 * time.Second
)

// Start starts the servers. A Redis that is away is no error: they wait for it.
func (s *Servers) Start() error {
	common := asynq.Config{
		BaseContext:              func() context.Context { return s.cfg.BaseContext },
		DelayedTaskCheckInterval: dueCheck,
		RetryDelayFunc:           retryDelay,
		IsFailure:                isFailure,
		ErrorHandler:             s.executor,
		ShutdownTimeout:          s.cfg.ShutdownTimeout + EndingGrace,
		Logger:                   &asynqLog{log: s.cfg.Log},
		LogLevel:                 asynq.InfoLevel, // below, it says each time that a queue is empty
	}
	for i := range s.cfg.Fetchers {
		c := common
		c.Queues = s.cfg.Queues
		c.TaskCheckInterval = IdleCheck
		c.Concurrency = s.cfg.Concurrency / s.cfg.Fetchers
		if i < s.cfg.Concurrency%s.cfg.Fetchers {
			c.Concurrency++
		}
		s.list = append(s.list, asynq.NewServerFromRedisClient(s.cfg.ServersRedis, c))
	}
	own := common
	own.Queues = map[string]int{s.cfg.OwnQueue: 1}
	own.Concurrency = 1
	s.list = append(s.list, asynq.NewServerFromRedisClient(s.cfg.ServersRedis, own))

	for i, server := range s.list {
		if err := server.Start(s.executor); err != nil {
			s.list = s.list[:i]
			s.Stop()
			return fmt.Errorf("start asynq server: %w", err)
		}
	}
	return nil
}

// Stop stops fetching, lets jobs finish for the shutdown timeout, then
// ends their contexts, and pushes back what still has not finished.
func (s *Servers) Stop() {
	timeUp := time.AfterFunc(s.cfg.ShutdownTimeout, func() { s.executor.end(errEnding) })
	defer timeUp.Stop()
	s.each((*asynq.Server).Stop) // takes its time if Redis is silent
	s.cfg.Log.Debug("no more jobs are fetched")
	s.each((*asynq.Server).Shutdown)
	s.list = nil
}

func (s *Servers) each(do func(*asynq.Server)) {
	var wg sync.WaitGroup
	for _, server := range s.list {
		wg.Go(func() { do(server) })
	}
	wg.Wait()
}
