package relay

import (
	"context"
	"errors"
	"sync"

	"github.com/redis/go-redis/v9"
)

// refusing is a hook on a client of Redis that breaks off commands with an argument of at
// least so many bytes, and those about one job, as something before Redis might.
type refusing struct {
	size int

	mu    sync.Mutex
	also  string // the id of a job
	tried int    // how often it was
}

func (h *refusing) heal() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.also = ""
}

func (h *refusing) tries() int {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.tried
}

func (*refusing) DialHook(next redis.DialHook) redis.DialHook { return next }

func (*refusing) ProcessPipelineHook(next redis.ProcessPipelineHook) redis.ProcessPipelineHook {
	return next
}

func (h *refusing) ProcessHook(next redis.ProcessHook) redis.ProcessHook {
	return func(ctx context.Context, cmd redis.Cmder) error {
		if h.refuses(cmd) {
			err := errors.New("write: connection reset by peer")
			cmd.SetErr(err)
			return err
		}
		return next(ctx, cmd)
	}
}

func (h *refusing) refuses(cmd redis.Cmder) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	if cmd.Name() != "evalsha" {
		return false
	}
	for _, arg := range cmd.Args() {
		switch arg := arg.(type) {
		case []byte:
			if len(arg) >= h.size {
				return true
			}
		case string:
			if h.also != "" && arg == h.also {
				h.tried++
				return true
			}
		}
	}
	return false
}
