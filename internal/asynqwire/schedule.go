package asynqwire

import (
	"context"
	"time"

	"github.com/redis/go-redis/v9"
)

// scheduleHash is the hash of asynq's script that schedules a job, in [TestedAsynq].
const scheduleHash = "8ce6b38a99b73194585c251eb3c2a89559f37a87"

// punctual is a Redis client for asynq's client, which schedules jobs for whole seconds.
type punctual struct{ redis.UniversalClient }

// Punctual returns a client for asynq's client, with which a job is due at the time that
// [WithDue] gives, to the microsecond. Without one, or with another version of asynq, it is
// due when asynq says.
func Punctual(rdb redis.UniversalClient) redis.UniversalClient { return punctual{rdb} }

type dueKey struct{}

// WithDue returns a context for the enqueueing of a job that is due at a time, which asynq
// is told rounded up to a second.
func WithDue(ctx context.Context, due time.Time) (_ context.Context, rounded time.Time) {
	rounded = due.Truncate(time.Second)
	if rounded.Before(due) {
		rounded = rounded.Add(time.Second)
	}
	return context.WithValue(ctx, dueKey{}, due), rounded
}

// EvalSha runs one of asynq's scripts.
func (p punctual) EvalSha(ctx context.Context, hash string, keys []string, args ...any) *redis.Cmd {
	return p.UniversalClient.EvalSha(ctx, hash, keys, exact(ctx, hash, args)...)
}

// Eval runs one of asynq's scripts that Redis doesn't know yet.
func (p punctual) Eval(ctx context.Context, script string, keys []string, args ...any) *redis.Cmd {
	return p.UniversalClient.Eval(ctx, script, keys, exact(ctx, ScriptHash(script), args)...)
}

// exact puts the time at which a job is due into the arguments of the script that schedules
// it: its message, when it is due, its id.
func exact(ctx context.Context, hash string, args []any) []any {
	due, ok := ctx.Value(dueKey{}).(time.Time)
	if !ok || hash != scheduleHash || len(args) != 3 {
		return args
	}
	return []any{args[0], Score(due), args[2]}
}
