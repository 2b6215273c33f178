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
		script, ok := cmd.(*redis.Cmd)
		if !ok || !isAck(ctx, cmd) {
			return next(ctx, cmd)
		}
		err := sayAgain(ctx, next, script)
		if err != nil && err.Error() == "NOT FOUND" {
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

// sayAgain says it until it is answered. What may have arrived is looked for first:
// meanwhile another worker may have the job, from whom a repetition would take it.
func sayAgain(ctx context.Context, next redis.ProcessHook, script *redis.Cmd) error {
	said := ackOf(script.Args())
	err := next(ctx, unrepeated{script})
	for pause := ackPause; mayBeTriedAgain(err); pause = min(2*pause, ackPauseCap) {
		select {
		case <-ctx.Done():
			return err
		case <-time.After(pause/2 + rand.N(pause)):
		}
		if wasSent(err) {
			arrived, again, lookErr := said.look(ctx, next)
			switch {
			case lookErr != nil:
				continue
			case arrived:
				script.SetErr(nil)
				script.SetVal("OK")
				return nil
			case !again:
				return err
			}
		}
		err = next(ctx, unrepeated{script})
	}
	return err
}

// unrepeated is a command that go-redis doesn't repeat by itself.
type unrepeated struct{ redis.Cmder }

func (unrepeated) NoRetry() bool { return true }

// ack is what one of asynq's scripts says of a job's end.
type ack struct {
	task, lease string // keys
	id          string
	message     []byte // the job's from now on; nil if that doesn't change
	pushesBack  bool   // to the queue, as it is
}

// ackOf reads the arguments of a script: eval or evalsha, the script, how many
// keys, the keys, the job's id, and the message if there is one.
func ackOf(args []any) ack {
	var a ack
	if len(args) < 3 {
		return a
	}
	n, _ := args[2].(int)
	keys, values := args[3:min(3+n, len(args))], args[min(3+n, len(args)):]
	for i, value := range values {
		switch value := value.(type) {
		case string:
			if i == 0 {
				a.id = value
			}
		case []byte:
			a.message = value
		}
	}
	for _, key := range keys {
		key, _ := key.(string)
		switch {
		case strings.HasSuffix(key, ":t:"+a.id):
			a.task = key
		case strings.HasSuffix(key, ":lease"):
			a.lease = key
		case strings.HasSuffix(key, ":pending"):
			a.pushesBack = true
		}
	}
	return a
}

// look finds out whether it has arrived, or else may be said again: the job is
// still with this worker. If neither can be told, rescue gives the job back later.
func (a ack) look(ctx context.Context, next redis.ProcessHook) (arrived, again bool, err error) {
	if a.message == nil && !a.pushesBack {
		return false, true, nil // it deletes the job; said again, it does no harm
	}
	job := redis.NewSliceCmd(ctx, "hmget", a.task, "msg", "state")
	if err := next(ctx, job); err != nil {
		return false, false, err
	}
	message, state := job.Val()[0], job.Val()[1]
	if a.message != nil {
		return message == string(a.message), true, nil
	}
	if state != "active" {
		return true, false, nil
	}
	lease := redis.NewFloatCmd(ctx, "zscore", a.lease, a.id)
	if err := next(ctx, lease); mayBeTriedAgain(err) {
		return false, false, err
	}
	// asynq gives the command the time until the lease is over that it knows of.
	// Another worker's is later.
	until, _ := ctx.Deadline()
	return false, int64(lease.Val()) == until.Unix(), nil
}

// wasSent reports whether what failed with err may have arrived all the same.
func wasSent(err error) bool {
	if _, said := errors.AsType[redis.Error](err); said {
		_, network := errors.AsType[net.Error](err)
		return network
	}
	e, ok := errors.AsType[*net.OpError](err)
	return !ok || e.Op != "dial"
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
