package main

import (
	"context"
	"errors"
	"math/rand/v2"
	"net"
	"strings"
	"time"

	"github.com/redis/go-redis/v9"
)

// ackHook sees to it that what asynq tells Redis of a job's end arrives. It is on
// the Redis client of the asynq servers.
//
// asynq gives such a command the time until the job's lease is over, but tries it
// only once: what it does to try again fails at once, since it uses a context that
// its caller has ended, and the job is run a second time when the lease is over.
// (Upstream, processor.markAsDone and its siblings would make a new context within
// the function that they hand to the syncer.)
type ackHook struct{}

const (
	ackPause    = 25 * time.Millisecond
	ackPauseCap = time.Second
)

func (ackHook) DialHook(next redis.DialHook) redis.DialHook { return next }

func (ackHook) ProcessPipelineHook(next redis.ProcessPipelineHook) redis.ProcessPipelineHook {
	return next
}

func (ackHook) ProcessHook(next redis.ProcessHook) redis.ProcessHook {
	return func(ctx context.Context, cmd redis.Cmder) error {
		err := next(ctx, cmd)
		if !isAck(ctx, cmd) {
			return err
		}
		for pause := ackPause; mayBeTriedAgain(err); pause = min(2*pause, ackPauseCap) {
			select {
			case <-ctx.Done():
				return err
			case <-time.After(pause/2 + rand.N(pause)):
			}
			err = next(ctx, cmd)
		}
		if script, ok := cmd.(*redis.Cmd); ok && err != nil && err.Error() == "NOT FOUND" {
			// The job isn't active any more: an earlier try had arrived, and only its
			// answer was lost; or its lease was over and it is somebody else's.
			script.SetErr(nil)
			script.SetVal("OK")
			return nil
		}
		return err
	}
}

// isAck reports whether the command says how a job has ended: of asynq's servers,
// only such scripts have a context with an end.
func isAck(ctx context.Context, cmd redis.Cmder) bool {
	_, ends := ctx.Deadline()
	return ends && strings.HasPrefix(cmd.Name(), "eval")
}

// mayBeTriedAgain reports whether Redis did not answer, or answered that it can't
// serve just now.
func mayBeTriedAgain(err error) bool {
	if err == nil || errors.Is(err, context.Canceled) {
		return false
	}
	if _, said := errors.AsType[redis.Error](err); said {
		_, network := errors.AsType[net.Error](err)
		for _, state := range []string{"LOADING ", "READONLY ", "MASTERDOWN ", "CLUSTERDOWN ", "TRYAGAIN ", "UNBLOCKED "} {
			if strings.HasPrefix(err.Error(), state) {
				return true
			}
		}
		return network
	}
	return true
}
