package delivery

import (
	"context"
	"log/slog"
	"sync"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/carpool-go/carpool/internal/asynqwire"
)

// serverState writes what asynq says of a server, for asynqmon, behind its back: asynq
// starts no job and frees no slot while it writes.
type serverState struct {
	rdb redis.UniversalClient
	log *slog.Logger

	mu     sync.Mutex
	latest *stateOfServer
	closed bool
	more   chan struct{}

	writing sync.Mutex // is held while it writes
}

type stateOfServer struct {
	server, workers string // keys
	ttl             time.Duration
	info            any
	jobs            []any // each job's id and what asynq says of it
}

func newServerState(rdb redis.UniversalClient, log *slog.Logger) *serverState {
	return &serverState{rdb: rdb, log: log, more: make(chan struct{}, 1)}
}

// put has the state written that asynq's script for it would write.
func (s *serverState) put(keys []string, args []any) {
	if len(keys) != 2 || len(args) < 2 {
		return
	}
	seconds, _ := args[0].(float64)
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return
	}
	s.latest = &stateOfServer{keys[0], keys[1], time.Duration(seconds * float64(time.Second)), args[1], args[2:]}
	select {
	case s.more <- struct{}{}:
	default:
	}
}

// close ends the writing, before asynq clears the state.
func (s *serverState) close() {
	s.writing.Lock() // what is being written is waited for
	defer s.writing.Unlock()
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closed, s.latest = true, nil
}

// run writes until ctx ends.
func (s *serverState) run(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-s.more:
		}
		if err := s.write(ctx); err != nil && ctx.Err() == nil {
			s.log.Debug("the server's state could not be written", "error", err)
		}
	}
}

func (s *serverState) write(ctx context.Context) error {
	s.writing.Lock()
	defer s.writing.Unlock()
	s.mu.Lock()
	state := s.latest
	s.latest = nil
	s.mu.Unlock()
	if state == nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, exchangeTimeout)
	defer cancel()
	until := float64(time.Now().Add(state.ttl).Unix())
	pipe := s.rdb.Pipeline()
	pipe.ZAdd(ctx, asynqwire.Servers, redis.Z{Score: until, Member: state.server})
	pipe.ZAdd(ctx, asynqwire.Workers, redis.Z{Score: until, Member: state.workers})
	pipe.SetEx(ctx, state.server, state.info, state.ttl)
	pipe.Del(ctx, state.workers)
	if len(state.jobs) > 0 {
		pipe.HSet(ctx, state.workers, state.jobs...)
		pipe.Expire(ctx, state.workers, state.ttl)
	}
	_, err := pipe.Exec(ctx)
	return err
}
