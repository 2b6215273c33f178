package monitor

import (
	"context"
	"net/http"
	"strings"

	"github.com/hibiken/asynqmon"
	"github.com/redis/go-redis/v9"

	"github.com/carpool-go/carpool/tasks"
)

// forgiving is a client whose scripts bear jobs that have lost their data, as their keys in
// Redis were evicted, deleted or overwritten. asynq's scripts, with which asynqmon reads
// queues, fail at one such job, and with it every page that shows its queue.
type forgiving struct{ redis.UniversalClient }

// MakeRedisClient implements [asynq.RedisConnOpt].
func (f forgiving) MakeRedisClient() any { return f }

// EvalSha answers that Redis doesn't know the script, whose text is then given to Eval.
func (f forgiving) EvalSha(ctx context.Context, sha1 string, _ []string, _ ...any) *redis.Cmd {
	cmd := redis.NewCmd(ctx, "evalsha", sha1)
	cmd.SetErr(errNoScript{})
	return cmd
}

type errNoScript struct{}

func (errNoScript) Error() string { return "NOSCRIPT its text is needed" }
func (errNoScript) RedisError()   {}

// Eval runs a script with the prelude before it.
func (f forgiving) Eval(ctx context.Context, script string, keys []string, args ...any) *redis.Cmd {
	return f.UniversalClient.Eval(ctx, prelude()+script, keys, args...)
}

// prelude stands before a script of asynq's and takes the place of its redis.call. What asynq
// reads of a job that has lost its data becomes a message with the job's id, and the reason
// in the place of its last error; its size becomes 0. All else is as it was, so that what
// changes a job doesn't take such a one for any other.
func prelude() string {
	return strings.NewReplacer("REASON", tasks.ErrJobLost.Error()).Replace(`
local redis = (function(strict)
	local function text(tag, s)
		s = string.sub(s, 1, 127) -- a length of one byte
		return string.char(tag, #s) .. s
	end
	local function read(key, field, value)
		local queue, id = string.match(key, "^asynq:{(.*)}:t:(.*)$")
		if value or field ~= "msg" or not id then return value end
		return text(10, "?") .. text(26, id) .. text(34, queue) .. text(58, "REASON")
	end
	local function call(name, ...)
		local answer = strict.pcall(name, ...)
		local wrong = type(answer) == "table" and answer.err
		local command = string.upper(name)
		if wrong and string.sub(answer.err, 1, 9) == "WRONGTYPE" then
			if command == "HGET" then wrong, answer = false, false end
			if command == "HMGET" then wrong, answer = false, {false, false, false} end
		end
		if wrong then return strict.call(name, ...) end -- which fails in its own way
		if command == "MEMORY" then return answer or 0 end
		local key, field = ...
		if command == "HGET" then return read(key, field, answer) end
		if command == "HMGET" then answer[1] = read(key, field, answer[1]) end
		return answer
	end
	return setmetatable({call = call}, {__index = strict})
end)(redis)
`)
}

// newPages returns asynqmon's pages, which bear jobs that have lost their data. The page
// about Redis itself is there only for a client that asynqmon knows.
func newPages(rdb redis.UniversalClient, options asynqmon.Options) http.Handler {
	options.RedisConnOpt = shared{rdb}
	aboutRedis := asynqmon.New(options)
	options.RedisConnOpt = forgiving{rdb}
	pages := asynqmon.New(options)
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/api/redis_info" {
			aboutRedis.ServeHTTP(w, r)
			return
		}
		pages.ServeHTTP(w, r)
	})
}
