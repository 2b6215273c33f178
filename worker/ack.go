package main

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"net"
	"strings"
	"sync"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/carpool-go/carpool/internal/asynqkey"
)

// ackHook sees to it that what asynq tells Redis of a job's end arrives, and that it
// is the truth. It is on the Redis client of the asynq servers.
//
// asynq gives such a command the time until the job's lease is over, but tries it
// only once: what it does to try again fails at once, since it uses a context that
// its caller has ended, and the job is run a second time when the lease is over.
// (Upstream, processor.markAsDone and its siblings would make a new context within
// the function that they hand to the syncer.)
//
// asynq archives a job that has no retry left whatever its error is, also one that
// is no failure. (Upstream, handleFailedMessage would ask isFailureFunc first.)
type ackHook struct {
	mu     sync.Mutex
	due    map[string]time.Time // of postponed jobs that asynq is about to archive, by task key
	leases map[string][2]int64  // the last two that this process has asked for, by lease key and id; Unix seconds
}

const (
	ackPause    = 25 * time.Millisecond
	ackPauseCap = time.Second
)

// postpone has a job put among those to be retried, instead of into the archive, to
// which it is about to go; the zero time doesn't.
func (h *ackHook) postpone(queue, id string, until time.Time) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if until.IsZero() {
		delete(h.due, asynqkey.Task(queue, id))
		return
	}
	if h.due == nil {
		h.due = make(map[string]time.Time)
	}
	h.due[asynqkey.Task(queue, id)] = until
}

// takePostponed returns what postpone was told of a job, once.
func (h *ackHook) takePostponed(task string) (until time.Time, ok bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	until, ok = h.due[task]
	delete(h.due, task)
	return until, ok
}

func (*ackHook) DialHook(next redis.DialHook) redis.DialHook { return next }

func (*ackHook) ProcessPipelineHook(next redis.ProcessPipelineHook) redis.ProcessPipelineHook {
	return next
}

func (h *ackHook) ProcessHook(next redis.ProcessHook) redis.ProcessHook {
	return func(ctx context.Context, cmd redis.Cmder) error {
		script, ok := cmd.(*redis.Cmd)
		if !ok || !strings.HasPrefix(cmd.Name(), "eval") {
			if cmd.Name() == "zadd" {
				h.extends(cmd.Args())
			}
			return next(ctx, cmd)
		}
		said, saying := ackOf(script.Args()), script
		if said.asksForDead {
			script.SetVal([]any{}) // it is rescue's to find them
			return nil
		}
		if !isAck(ctx, cmd) {
			return next(ctx, cmd)
		}
		if said.archived != "" {
			if until, ok := h.takePostponed(said.task); ok {
				saying = said.postpone(ctx, until)
			}
		}
		defer h.forget(said)
		err := h.say(ctx, next, said, saying)
		if err == nil || err.Error() == "NOT FOUND" {
			// NOT FOUND: the job isn't active any more. An earlier try had arrived, and
			// only its answer was lost; or its lease was over and it is somebody else's.
			script.SetErr(nil)
			script.SetVal("OK")
			return nil
		}
		script.SetErr(err)
		return err
	}
}

// extends notes the leases of a heartbeat: zadd, the key, "xx", and then each lease
// and its job's id. Whether they arrive isn't always known.
func (h *ackHook) extends(args []any) {
	if len(args) < 3 || args[2] != "xx" {
		return
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.leases == nil {
		h.leases = make(map[string][2]int64)
	}
	if now := time.Now().Unix(); len(h.leases) > 1000 { // those that a heartbeat extended as their jobs ended
		maps.DeleteFunc(h.leases, func(_ string, until [2]int64) bool { return until[1] < now })
	}
	for i := 3; i+1 < len(args); i += 2 {
		if until, ok := args[i].(float64); ok {
			key := fmt.Sprint(args[1], " ", args[i+1])
			h.leases[key] = [2]int64{h.leases[key][1], int64(until)}
		}
	}
}

// forget forgets the lease of a job that has ended.
func (h *ackHook) forget(a ack) {
	h.mu.Lock()
	defer h.mu.Unlock()
	delete(h.leases, a.lease+" "+a.id)
}

// isOurs reports whether a lease is one that this process has got for the job: asynq
// gives the command the time until its end, unless a heartbeat has extended it since.
func (h *ackHook) isOurs(ctx context.Context, a ack, lease int64) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	until, _ := ctx.Deadline()
	asked := h.leases[a.lease+" "+a.id]
	return lease == until.Unix() || lease == asked[0] || lease == asked[1]
}

// postponeScript moves a job from active to retry. It is asynq's own for that,
// without the statistics of failures.
const postponeScript = `
if redis.call("LREM", KEYS[2], 0, ARGV[1]) == 0 then return redis.error_reply("NOT FOUND") end
redis.call("ZREM", KEYS[3], ARGV[1])
redis.call("ZADD", KEYS[4], ARGV[3], ARGV[1])
redis.call("HSET", KEYS[1], "msg", ARGV[2], "state", "retry")
return redis.status_reply("OK")`

func (a ack) postpone(ctx context.Context, until time.Time) *redis.Cmd {
	retry := strings.TrimSuffix(a.archived, "archived") + "retry"
	return redis.NewCmd(ctx, "eval", postponeScript, 4, a.task, a.active, a.lease, retry, a.id, a.message, until.Unix())
}

// isAck reports whether the command says how a job has ended: of asynq's servers,
// only such scripts have a context with an end.
func isAck(ctx context.Context, cmd redis.Cmder) bool {
	_, ends := ctx.Deadline()
	return ends && strings.HasPrefix(cmd.Name(), "eval")
}

// say says it until it is answered. What may have arrived is looked for before it is
// said again: meanwhile another worker may have the job, from whom it would be taken.
func (h *ackHook) say(ctx context.Context, next redis.ProcessHook, a ack, script *redis.Cmd) error {
	err := next(ctx, unrepeated{script})
	for pause := ackPause; mayBeTriedAgain(err); pause = min(2*pause, ackPauseCap) {
		select {
		case <-ctx.Done():
			return err
		case <-time.After(pause/2 + rand.N(pause)):
		}
		if wasSent(err) {
			arrived, lookErr := h.look(ctx, next, a)
			if lookErr != nil {
				continue
			}
			if arrived {
				return nil
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
	task, active, lease string // keys
	archived            string // the archive's key, if the job goes there
	id                  string
	message             []byte // the job's from now on; nil if that doesn't change
	asksForDead         bool   // it is no ack: asynq's recoverer asks for leases that are over
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
		case strings.HasSuffix(key, "}:t:"+a.id):
			a.task = key
		case strings.HasSuffix(key, ":active"):
			a.active = key
		case strings.HasSuffix(key, ":lease"):
			a.lease = key
			a.asksForDead = len(keys) == 1
		case strings.HasSuffix(key, ":archived"):
			a.archived = key
		}
	}
	return a
}

// look finds out whether it has arrived. If not, the job is still with this worker.
func (h *ackHook) look(ctx context.Context, next redis.ProcessHook, a ack) (arrived bool, err error) {
	job := redis.NewSliceCmd(ctx, "hmget", a.task, "msg", "state")
	if err := next(ctx, job); err != nil {
		return false, err
	}
	stored, _ := job.Val()[0].(string)
	if job.Val()[1] != "active" {
		return true, nil
	}
	// The message says when the job failed last: before this arrived it was another.
	if a.message != nil && (stored == string(a.message) || isNewer([]byte(stored), a.message)) {
		return true, nil
	}
	lease := redis.NewFloatCmd(ctx, "zscore", a.lease, a.id)
	if err := next(ctx, lease); mayBeTriedAgain(err) {
		return false, err
	}
	return !h.isOurs(ctx, a, int64(lease.Val())), nil
}

// isNewer reports whether the stored message is of a later attempt than the one that
// was said.
func isNewer(stored, said []byte) bool {
	now, err := parseMessage(stored)
	if err != nil {
		return false
	}
	then, err := parseMessage(said)
	return err == nil && (now.retried > then.retried || now.lastFailedAt > then.lastFailedAt)
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
		for _, state := range []string{"LOADING ", "READONLY ", "MASTERDOWN ", "CLUSTERDOWN ", "TRYAGAIN ", "UNBLOCKED ", "NOREPLICAS ", "MISCONF ", "BUSY ", "OOM "} {
			if strings.HasPrefix(err.Error(), state) {
				return true
			}
		}
		return network
	}
	return true
}
