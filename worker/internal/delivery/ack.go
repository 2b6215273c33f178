package delivery

import (
	"context"
	"errors"
	"math/rand/v2"
	"net"
	"strings"
	"sync"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/carpool-go/carpool/internal/asynqwire"
	"github.com/carpool-go/carpool/internal/wait"
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
// asynq's leases don't say whose they are: a worker that has lost its job without
// knowing extends the lease of the next one, and takes the job from it when it puts
// the job back. The hook gives each lease a fencing token. (Upstream, the lease would have a token.)
//
// asynq archives a job that has no retry left whatever its error is, also one that
// is no failure. (Upstream, handleFailedMessage would ask isFailureFunc first.)
type ackHook struct {
	mu     sync.Mutex
	due    map[string]time.Time // of postponed jobs that asynq is about to archive, by task key
	tokens map[string]int       // of the leases that this process has got, by task key
}

func newAckHook() *ackHook {
	return &ackHook{due: make(map[string]time.Time), tokens: make(map[string]int)}
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
		delete(h.due, asynqwire.Task(queue, id))
		return
	}
	h.due[asynqwire.Task(queue, id)] = until
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
		if extend, ok := cmd.(*redis.IntCmd); ok && isExtend(cmd.Args()) {
			err := next(ctx, h.extendHeld(ctx, cmd.Args()))
			extend.SetErr(err)
			return err
		}
		script, ok := cmd.(*redis.Cmd)
		if !ok || !strings.HasPrefix(cmd.Name(), "eval") {
			return next(ctx, cmd)
		}
		said, saying := ackOf(script.Args()), script
		switch {
		case said.asksForDead:
			script.SetVal([]any{}) // it is rescue's to find them
			return nil
		case said.fetches:
			token := giveToken(script.Args())
			err := next(ctx, cmd)
			h.noteToken(said.lease, script.Val(), token)
			return err
		case !isAck(ctx, cmd):
			return next(ctx, cmd)
		}
		if said.archived != "" {
			if until, ok := h.takePostponed(said.task); ok {
				saying = said.postpone(ctx, until)
			}
		}
		token := h.tokenFor(said.task)
		err := send(ctx, next, said, saying, token)
		if err == nil || err.Error() == "NOT FOUND" {
			// NOT FOUND: the job isn't active any more. An earlier try had arrived, and
			// only its answer was lost; or its lease was over and it is somebody else's.
			h.forget(said.task, token)
			script.SetErr(nil)
			script.SetVal("OK")
			return nil
		}
		script.SetErr(err)
		return err
	}
}

// giveToken marks the lease that a fetch asks for, by its microseconds: it is the
// first value of the script, in Unix seconds.
func giveToken(args []any) (token int) {
	keys, _ := args[2].(int)
	token = 1 + rand.N(asynqwire.MaxToken)
	if until, ok := args[3+keys].(int64); ok {
		args[3+keys] = asynqwire.LeaseWithToken(until, token)
	}
	return token
}

// noteToken notes the token of the job that a fetch has got.
func (h *ackHook) noteToken(leases string, fetched any, token int) {
	data, ok := fetched.(string)
	if !ok {
		return // the queue is empty
	}
	msg, err := asynqwire.ParseMessage([]byte(data))
	if err != nil {
		return // asynq can't read it either
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.tokens[taskOf(leases, msg.ID)] = token
}

// taskOf returns the key of a job from that of its queue's leases.
func taskOf(leases, id string) string {
	return strings.TrimSuffix(leases, "lease") + "t:" + id
}

func (h *ackHook) tokenFor(task string) int {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.tokens[task]
}

// forget forgets the token of a job that has ended, unless it was fetched again.
func (h *ackHook) forget(task string, token int) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.tokens[task] == token {
		delete(h.tokens, task)
	}
}

// isExtend reports whether a command is a heartbeat that extends leases: zadd, the
// key, "xx", and then each lease and its job's id.
func isExtend(args []any) bool {
	if len(args) < 5 || args[0] != "zadd" || args[2] != "xx" {
		return false
	}
	key, _ := args[1].(string)
	return strings.HasSuffix(key, "}:lease")
}

func (h *ackHook) extendHeld(ctx context.Context, args []any) *redis.Cmd {
	key, _ := args[1].(string)
	var leases []asynqwire.Lease
	for i := 3; i+1 < len(args); i += 2 {
		id, _ := args[i+1].(string)
		if token := h.tokenFor(taskOf(key, id)); token != 0 { // else it has just ended
			leases = append(leases, asynqwire.Lease{ID: id, Until: args[i], Token: token})
		}
	}
	return asynqwire.ExtendLeases(ctx, key, leases)
}

func (a ack) postpone(ctx context.Context, until time.Time) *redis.Cmd {
	retry := strings.TrimSuffix(a.archived, "archived") + "retry"
	return asynqwire.Postpone(ctx, a.task, a.active, a.lease, retry, a.id, a.message, until)
}

// isAck reports whether the command says how a job has ended: of asynq's servers,
// only such scripts have a context with an end.
func isAck(ctx context.Context, cmd redis.Cmder) bool {
	_, ends := ctx.Deadline()
	return ends && strings.HasPrefix(cmd.Name(), "eval")
}

// send repeats the acknowledgement until Redis answers. Before it repeats one, and before
// any command that moves the job to another list, it checks that this process still holds
// the lease.
func send(ctx context.Context, next redis.ProcessHook, a ack, script *redis.Cmd, token int) error {
	sent := false
	for pause := ackPause; ; pause = min(2*pause, ackPauseCap) {
		var err error
		if sent || a.goesOn {
			var over bool
			if over, err = lostLease(ctx, next, a, token); over {
				return nil
			}
		}
		if err == nil {
			err = next(ctx, unrepeated{script})
			sent = sent || wasSent(err)
		}
		if !mayBeTriedAgain(err) {
			return err
		}
		if wait.For(ctx, pause/2+rand.N(pause)) != nil {
			return err
		}
	}
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
	goesOn              bool   // the job isn't done: it goes to another list
	// It is no ack: asynq fetches a job, or its recoverer asks for leases that are over.
	fetches, asksForDead bool
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
	for i, key := range keys {
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
			a.archived, a.goesOn = key, true
		case strings.HasSuffix(key, ":pending"):
			a.fetches = i == 0
			a.goesOn = !a.fetches
		case strings.HasSuffix(key, ":retry"):
			a.goesOn = true
		}
	}
	return a
}

// lostLease reports whether the acknowledgement needn't be sent, because the job's lease
// has another token or there is none.
func lostLease(ctx context.Context, next redis.ProcessHook, a ack, token int) (over bool, err error) {
	lease := redis.NewFloatCmd(ctx, "zscore", a.lease, a.id)
	if err := next(ctx, lease); mayBeTriedAgain(err) {
		return false, err
	}
	return asynqwire.TokenOf(lease.Val()) != token, nil
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
