package asynqwire

import (
	"context"
	"slices"

	"github.com/redis/go-redis/v9"
	"google.golang.org/protobuf/encoding/protowire"
)

// KEYS  the hashes of jobs
// ARGV[1] how many bytes of each message are returned
var messageHeads = redis.NewScript(`
local heads = {}
for i, key in ipairs(KEYS) do
	local msg = redis.pcall("HGET", key, "msg")
	heads[i] = type(msg) == "string" and string.sub(msg, 1, ARGV[1]) or ""
end
return heads`)

const (
	// headBytes is how much of a message is read to know its kind, which begins it. A longer
	// kind is not known.
	headBytes = 512
	// headsAtOnce bounds what one script copies, because payloads may have megabytes and
	// Redis serves nobody meanwhile.
	headsAtOnce = 20
)

// CountKinds counts the jobs of a queue that wait, are due later or are to be tried again,
// by their kind, among the first of each state, most of them at most. Jobs that are lost, or
// whose kind can't be read, are left out. No payload leaves Redis. The error is Redis'.
func CountKinds(ctx context.Context, rdb redis.UniversalClient, queue string, most int) (map[string]int, error) {
	jobs, err := listJobs(ctx, rdb, queue, most, []string{"pending", "scheduled", "retry"})
	if err != nil {
		return nil, err
	}
	counts := make(map[string]int)
	for some := range slices.Chunk(jobs, headsAtOnce) {
		keys := make([]string, len(some))
		for i, job := range some {
			keys[i] = Task(queue, job.ID)
		}
		heads, err := messageHeads.Run(ctx, rdb, keys, headBytes).StringSlice()
		if err != nil {
			return nil, err
		}
		for _, head := range heads {
			if kind, ok := kindOf([]byte(head)); ok {
				counts[kind]++
			}
		}
	}
	return counts, nil
}

// kindOf returns the kind of a message of which the beginning is there. asynq writes fields
// in the order of their numbers, and the kind's is the first.
func kindOf(head []byte) (kind string, ok bool) {
	number, typ, n := protowire.ConsumeTag(head)
	if n < 0 || number != fieldType || typ != protowire.BytesType {
		return "", false
	}
	kind, size := protowire.ConsumeString(head[n:])
	return kind, size >= 0
}
