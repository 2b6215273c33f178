package delivery

import (
	"context"
	"errors"
	"fmt"
	"runtime/debug"
	"slices"
	"strings"

	"github.com/redis/go-redis/v9"

	"github.com/carpool-go/carpool/internal/asynqwire"
)

// client is the Redis of one of asynq's servers. It answers what the server asks of its
// jobs by itself: which is the next one, whose lease goes on; and it doesn't hear what
// becomes of them, which the executor has said before. What else there is goes to Redis as
// it is, but no script that carpool doesn't know: it might be one that moves jobs.
type client struct {
	redis.UniversalClient
	fetcher *fetcher
	held    *held
	ends    *ends
	state   *serverState
	// fail ends the worker.
	fail func(error)
}

// EvalSha runs one of asynq's scripts.
func (c *client) EvalSha(ctx context.Context, hash string, keys []string, args ...any) *redis.Cmd {
	return c.run(ctx, hash, keys, args, func() *redis.Cmd {
		ctx, cancel := context.WithTimeout(ctx, exchangeTimeout)
		defer cancel()
		return c.UniversalClient.EvalSha(ctx, hash, keys, args...)
	})
}

// Eval runs one of asynq's scripts that Redis doesn't know yet.
func (c *client) Eval(ctx context.Context, script string, keys []string, args ...any) *redis.Cmd {
	return c.run(ctx, asynqwire.ScriptHash(script), keys, args, func() *redis.Cmd {
		return c.UniversalClient.Eval(ctx, script, keys, args...)
	})
}

func (c *client) run(ctx context.Context, hash string, keys []string, args []any, pass func() *redis.Cmd) *redis.Cmd {
	answer := redis.NewCmd(ctx)
	script, ok := asynqwire.ServerScriptOf(hash)
	if !ok {
		err := fmt.Errorf("asynq %s runs a script (%s) that carpool doesn't know; it knows those of %s",
			asynqVersion(), hash, strings.Join(asynqwire.TestedAsynq, ", "))
		c.fail(err)
		c.fetcher.end()
		answer.SetErr(err)
		return answer
	}
	switch script {
	case asynqwire.ScriptDequeue:
		job := c.fetcher.next()
		if job == nil {
			answer.SetErr(redis.Nil)
			return answer
		}
		answer.SetVal(job.data)
	case asynqwire.ScriptRequeue: // asynq doesn't wait for a handler any more
		if job := c.held.byKey(keys[3]); job != nil {
			c.ends.say(job, asynqwire.PushBack{})
		}
		answer.SetVal("OK")
	case asynqwire.ScriptDone, asynqwire.ScriptDoneUnique, asynqwire.ScriptMarkAsComplete, asynqwire.ScriptMarkAsCompleteUnique,
		asynqwire.ScriptRetry, asynqwire.ScriptArchive: // the executor has said it
		answer.SetVal("OK")
	case asynqwire.ScriptForward: // is done by due
		answer.SetVal(int64(0))
	case asynqwire.ScriptListLeaseExpired: // is done by Rescue
		answer.SetVal([]any{})
	case asynqwire.ScriptWriteServerState:
		c.state.put(keys, args)
		answer.SetVal("OK")
	case asynqwire.ScriptClearServerState:
		c.state.close()
		return pass()
	case asynqwire.ScriptReclaimGroups: // this server makes no groups
		answer.SetVal("OK")
	case asynqwire.ScriptDeleteExpired:
		if c.fetcher.isStopped() {
			answer.SetVal(int64(0))
			break
		}
		return pass()
	}
	return answer
}

// errUnconfirmed is asynq's answer when Redis has not confirmed leases lately.
var errUnconfirmed = errors.New("the leases have not been confirmed lately")

// ZAddXX extends leases, as asynq has it.
func (c *client) ZAddXX(ctx context.Context, key string, members ...redis.Z) *redis.IntCmd {
	answer := redis.NewIntCmd(ctx)
	ids := make([]string, 0, len(members))
	for _, m := range members {
		id, _ := m.Member.(string)
		ids = append(ids, id)
	}
	for _, queue := range c.fetcher.wheel.queues {
		if key == asynqwire.Leases(queue) && !c.held.areConfirmed(queue, ids) {
			answer.SetErr(errUnconfirmed)
		}
	}
	return answer
}

// ZAdd lists a server, which goes with its state.
func (c *client) ZAdd(ctx context.Context, key string, members ...redis.Z) *redis.IntCmd {
	if key == asynqwire.Servers || key == asynqwire.Workers {
		return redis.NewIntCmd(ctx)
	}
	return c.UniversalClient.ZAdd(ctx, key, members...)
}

// ZRem takes a server off the lists, whose state is not written any more.
func (c *client) ZRem(ctx context.Context, key string, members ...any) *redis.IntCmd {
	if key == asynqwire.Servers || key == asynqwire.Workers {
		c.state.close()
	}
	ctx, cancel := context.WithTimeout(ctx, exchangeTimeout)
	defer cancel()
	return c.UniversalClient.ZRem(ctx, key, members...)
}

// asynqVersion is the version of asynq in this program; "" if that can't be seen.
func asynqVersion() string {
	build, ok := debug.ReadBuildInfo()
	if !ok {
		return ""
	}
	for _, dep := range build.Deps {
		if dep.Path == "github.com/hibiken/asynq" {
			if dep.Replace != nil {
				return dep.Replace.Version
			}
			return dep.Version
		}
	}
	return ""
}

// isTestedAsynq reports whether this program's asynq is one whose scripts are known.
func isTestedAsynq() bool {
	version := asynqVersion()
	return version == "" || slices.Contains(asynqwire.TestedAsynq, version)
}
