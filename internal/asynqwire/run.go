package asynqwire

import (
	"context"
	"crypto/sha1" //nolint:gosec // Redis' choice
	"encoding/hex"

	"github.com/redis/go-redis/v9"
)

// script is one of carpool's scripts.
type script struct{ text, sha string }

func newScript(text string) *script { return &script{text, ScriptHash(text)} }

// ScriptHash is the name that Redis has for a script.
func ScriptHash(text string) string {
	sum := sha1.Sum([]byte(text)) //nolint:gosec // Redis' choice
	return hex.EncodeToString(sum[:])
}

// call is a script with its keys and arguments.
type call struct {
	script *script
	keys   []string
	args   []any
}

func (c call) cmd(ctx context.Context, name, script string) *redis.Cmd {
	args := make([]any, 0, 3+len(c.keys)+len(c.args))
	args = append(args, name, script, len(c.keys))
	for _, key := range c.keys {
		args = append(args, key)
	}
	cmd := redis.NewCmd(ctx, append(args, c.args...)...)
	if len(c.keys) > 0 {
		cmd.SetFirstKeyPos(3)
	}
	return cmd
}

// unrepeated is a command that go-redis doesn't repeat by itself.
type unrepeated struct{ redis.Cmder }

func (unrepeated) NoRetry() bool { return true }

// run runs scripts in one round trip, or two if Redis doesn't know one of them yet. Those
// that may not be repeated go-redis doesn't send again by itself.
func run(ctx context.Context, rdb redis.UniversalClient, calls []call, mayRepeat bool) []*redis.Cmd {
	cmds := make([]*redis.Cmd, len(calls))
	pipe := rdb.Pipeline()
	queue := func(cmd *redis.Cmd) {
		if mayRepeat {
			_ = pipe.Process(ctx, cmd)
		} else {
			_ = pipe.Process(ctx, unrepeated{cmd})
		}
	}
	for i, c := range calls {
		cmds[i] = c.cmd(ctx, "evalsha", c.script.sha)
		queue(cmds[i])
	}
	_, _ = pipe.Exec(ctx) // each command has its error
	again := false
	for i, c := range calls {
		if redis.HasErrorPrefix(cmds[i].Err(), "NOSCRIPT") {
			cmds[i] = c.cmd(ctx, "eval", c.script.text)
			queue(cmds[i])
			again = true
		}
	}
	if again {
		_, _ = pipe.Exec(ctx)
	}
	return cmds
}
