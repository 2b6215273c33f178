package delivery

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/hibiken/asynq"

	"github.com/carpool-go/carpool/internal/asynqwire"
)

// Servers are the asynq servers of this process: one for the queues that instances share,
// and one for the instance's own, so that the pool is validated even when all slots of the
// other are busy. What they ask of Redis carpool answers.
type Servers struct {
	cfg      Config
	executor *Executor
	held     *held
	ends     *ends
	due      *due

	clients []*client
	list    []*asynq.Server
	ctx     context.Context // of what runs beside the servers
	cancel  context.CancelFunc
	beside  sync.WaitGroup
}

const (
	// EndingGrace is what jobs whose context has ended at a shutdown get for
	// winding up, before they are pushed back.
	EndingGrace = 2 * time.Second
	// flushTimeout is how long Redis is told of the ends of jobs when the worker stops.
	flushTimeout = 4 * time.Second
	// stopCheck is how soon asynq notices that it is stopped, more or less.
	stopCheck = 10 * time.Millisecond
)

func newServers(cfg Config, executor *Executor, h *held, e *ends, d *due) *Servers {
	s := &Servers{cfg: cfg, executor: executor, held: h, ends: e, due: d}
	s.ctx, s.cancel = context.WithCancel(context.Background())
	for _, of := range []struct {
		queues map[string]int
		slots  int
	}{
		{cfg.Queues, cfg.Concurrency},
		{map[string]int{cfg.OwnQueue: 1}, 1},
	} {
		f := newFetcher(cfg, of.queues, of.slots, h, e)
		s.clients = append(s.clients, &client{
			UniversalClient: cfg.ServersRedis, fetcher: f, held: h, ends: e,
			state: newServerState(cfg.ServersRedis, cfg.Log), fail: cfg.Fail,
		})
		s.list = append(s.list, asynq.NewServerFromRedisClient(s.clients[len(s.clients)-1], asynq.Config{
			Queues:                   of.queues,
			Concurrency:              of.slots,
			BaseContext:              func() context.Context { return cfg.BaseContext },
			TaskCheckInterval:        stopCheck,
			DelayedTaskCheckInterval: time.Hour, // due does that
			ErrorHandler:             executor,
			ShutdownTimeout:          cfg.ShutdownTimeout + EndingGrace,
			Logger:                   &asynqLog{log: cfg.Log},
			LogLevel:                 asynq.InfoLevel, // below, it says each time that a queue is empty
		}))
	}
	return s
}

// Start starts the servers. A Redis that is away is no error: they wait for it.
func (s *Servers) Start() error {
	if !isTestedAsynq() {
		s.cfg.Log.Warn("this version of asynq has not been tested with carpool", "version", asynqVersion(), "tested", asynqwire.TestedAsynq)
	}
	s.beside.Go(func() { s.held.hearCancels(s.ctx) })
	s.beside.Go(func() { s.held.keepLeases(s.ctx) })
	s.beside.Go(func() { s.ends.run(s.ctx) })
	s.beside.Go(func() { s.due.run(s.ctx) })
	for _, c := range s.clients {
		s.beside.Go(func() { c.state.run(s.ctx) })
		s.beside.Go(func() { c.fetcher.run(s.ctx) })
	}
	for i, server := range s.list {
		if err := server.Start(s.executor); err != nil {
			s.list = s.list[:i]
			s.Stop()
			return fmt.Errorf("start asynq server: %w", err)
		}
	}
	return nil
}

// Held is how many jobs this process has fetched and Redis has not been told the end of.
func (s *Servers) Held() int { return s.held.len() }

// Fault says in words, without a name or an address, why jobs are not fetched. It is "" if
// they are, or if all slots are busy.
func (s *Servers) Fault() string {
	for _, c := range s.clients {
		if fault := c.fetcher.fault(); fault != "" {
			return fault
		}
	}
	return ""
}

// Stop stops fetching, puts back what was fetched and not begun, lets jobs finish for the
// shutdown timeout, then ends their contexts, and pushes back what still has not finished.
func (s *Servers) Stop() {
	timeUp := time.AfterFunc(s.cfg.ShutdownTimeout, func() { s.executor.end(errEnding) })
	defer timeUp.Stop()
	for _, c := range s.clients {
		c.fetcher.end()
	}
	s.each((*asynq.Server).Stop)
	for _, c := range s.clients {
		c.fetcher.pushBack()
	}
	s.cfg.Log.Debug("no more jobs are fetched")
	s.each((*asynq.Server).Shutdown)
	s.list = nil
	s.flush()
	s.cancel()
	_ = s.cfg.LooksRedis.Close() // or a look would go on
	s.beside.Wait()
}

// flush tells Redis of the ends that it has not been told of yet.
func (s *Servers) flush() {
	stop := make(chan struct{})
	timeUp := time.AfterFunc(flushTimeout, func() { close(stop) })
	defer timeUp.Stop()
	if s.ctx.Err() == nil && !s.ends.flush(stop) {
		s.cfg.Log.Warn("Redis could not be told that jobs have ended; they are delivered again", "jobs", s.ends.left())
	}
}

func (s *Servers) each(do func(*asynq.Server)) {
	var wg sync.WaitGroup
	for _, server := range s.list {
		wg.Go(func() { do(server) })
	}
	wg.Wait()
}
