package cli

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"sync"

	"github.com/redis/go-redis/v9"

	"github.com/carpool-go/carpool/internal/startup"
	"github.com/carpool-go/carpool/tasks"
)

// redisFault bounds each command to Redis by commandTimeout, and remembers why Redis did not
// do the last one. It is a hook of the client, because asynq keeps only the text of an
// error, in words of its own, and because a client tries for a minute before it gives up.
type redisFault struct {
	mu  sync.Mutex
	err error
}

// DialHook implements [redis.Hook].
func (f *redisFault) DialHook(next redis.DialHook) redis.DialHook {
	return func(ctx context.Context, network, addr string) (net.Conn, error) { return next(ctx, network, addr) }
}

// ProcessHook implements [redis.Hook].
func (f *redisFault) ProcessHook(next redis.ProcessHook) redis.ProcessHook {
	return func(ctx context.Context, cmd redis.Cmder) error {
		return f.watch(ctx, func(ctx context.Context) error { return next(ctx, cmd) })
	}
}

// ProcessPipelineHook implements [redis.Hook].
func (f *redisFault) ProcessPipelineHook(next redis.ProcessPipelineHook) redis.ProcessPipelineHook {
	return func(ctx context.Context, cmds []redis.Cmder) error {
		return f.watch(ctx, func(ctx context.Context) error { return next(ctx, cmds) })
	}
}

func (f *redisFault) watch(ctx context.Context, do func(context.Context) error) error {
	bounded, cancel := context.WithTimeout(ctx, commandTimeout)
	defer cancel()
	err := do(bounded)
	switch {
	case ctx.Err() != nil:
		return err // the caller has ended it
	case bounded.Err() != nil && err != nil:
		err = fmt.Errorf("no answer within %s: %w", commandTimeout, err)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.err = err
	return err
}

// explain returns err as it is shown: in terms of REDIS_URL if it comes of a Redis that
// can't be used.
func (f *redisFault) explain(url string, err error) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if err == nil {
		return nil
	}
	if explained, ok := startup.Explain("REDIS_URL", url, f.err); ok {
		return explained
	}
	return err
}

// open opens Redis for a command, which says itself what is wrong with it. The URL is one
// that [faults.redisURL] finds right.
func (s redisSettings) open(in *invocation) (redis.UniversalClient, error) {
	in.process.logRedis(slog.New(slog.DiscardHandler))
	return tasks.OpenRedis(s.RedisURL)
}

// openWatched opens Redis for a command, with the fault that explains its errors.
func (s redisSettings) openWatched(in *invocation) (redis.UniversalClient, *redisFault, error) {
	rdb, err := s.open(in)
	if err != nil {
		return nil, nil, err
	}
	fault := new(redisFault)
	rdb.AddHook(fault)
	return rdb, fault, nil
}

// withRedis opens Redis for as long as use takes, and explains its errors.
func (in *invocation) withRedis(s redisSettings, use func(redis.UniversalClient) error) error {
	f := in.faults()
	f.redisURL(s.RedisURL)
	if err := f.err(); err != nil {
		return err
	}
	rdb, fault, err := s.openWatched(in)
	if err != nil {
		return err
	}
	defer rdb.Close()
	return fault.explain(s.RedisURL, use(rdb))
}
