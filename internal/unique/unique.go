// Package unique keeps unique keys: locks in Redis that name the job that holds them. A
// key is held by at most one job that has not ended.
//
// A fixed task id would be simpler, but then a finished job that is kept for its result,
// or an archived one, would block the key.
package unique

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/hibiken/asynq"
	"github.com/redis/go-redis/v9"

	"github.com/carpool-go/carpool/internal/asynqwire"
)

const (
	// grace is how long a key is left to a holder that can't be found: its enqueuer may be
	// between taking the key and enqueueing the job.
	grace = 30 * time.Second
	// ttl bounds how long Redis keeps the key of a job after the time it was to run at. Keys
	// are given up when their job ends; this is for the keys of jobs that were deleted by
	// hand.
	ttl = 30 * 24 * time.Hour
)

// Key is the key in Redis for a kind's unique key. It tells apart kind a with key b:c, and
// kind a:b with key c.
func Key(kind, key string) string {
	return "carpool:unique:" + strconv.Itoa(len(kind)) + ":" + kind + ":" + key
}

// Holder is the job that holds a key.
type Holder struct {
	ID, Queue string
	since     time.Time
}

// HeldError is returned for a key that another job holds.
type HeldError struct{ Holder Holder }

func (e *HeldError) Error() string {
	return fmt.Sprintf("the unique key is held by job %s on queue %s", e.Holder.ID, e.Holder.Queue)
}

func (h Holder) String() string {
	return h.ID + " " + strconv.FormatInt(h.since.UnixMilli(), 10) + " " + h.Queue
}

func parseHolder(s string) (Holder, bool) {
	id, rest, _ := strings.Cut(s, " ")
	ms, queue, ok := strings.Cut(rest, " ")
	at, err := strconv.ParseInt(ms, 10, 64)
	return Holder{id, queue, time.UnixMilli(at)}, ok && err == nil
}

// Locks are the unique keys of one Redis.
type Locks struct {
	rdb       redis.UniversalClient
	inspector *asynq.Inspector
}

// NewLocks returns the unique keys of a Redis.
func NewLocks(rdb redis.UniversalClient) *Locks {
	return &Locks{rdb, asynq.NewInspectorFromRedisClient(rdb)}
}

// KEYS[1] the unique key
// ARGV[1] the holder that was seen
// ARGV[2] the one to take its place, "" for none
// ARGV[3] how long Redis keeps it, in milliseconds
var replace = redis.NewScript(`
if redis.call("GET", KEYS[1]) ~= ARGV[1] then return 0 end
if ARGV[2] == "" then return redis.call("DEL", KEYS[1]) end
redis.call("SET", KEYS[1], ARGV[2], "PX", ARGV[3])
return 1`)

// Take takes a key, of [Key], for a job that is to run at runAt, from nobody or from a
// holder that has ended. The error is a [HeldError] if another job holds it, or Redis'.
func (l *Locks) Take(ctx context.Context, key, id, queue string, runAt time.Time) error {
	holder := Holder{id, queue, time.Now()}
	keep := ttl + max(0, time.Until(runAt))
	for {
		err := l.rdb.SetArgs(ctx, key, holder.String(), redis.SetArgs{Mode: "NX", TTL: keep}).Err()
		if err == nil {
			return nil
		}
		if !errors.Is(err, redis.Nil) {
			return err
		}
		seen, err := l.rdb.Get(ctx, key).Result()
		if errors.Is(err, redis.Nil) {
			continue
		}
		if err != nil {
			return err
		}
		if other, ok := parseHolder(seen); ok {
			if other.ID == id {
				return nil // the first SET was answered to nobody
			}
			ended, err := l.hasEnded(ctx, other)
			if err != nil {
				return err
			}
			if !ended {
				return &HeldError{other}
			}
		}
		replaced, err := replace.Run(ctx, l.rdb, []string{key}, seen, holder.String(), keep.Milliseconds()).Int()
		if err != nil {
			return err
		}
		if replaced == 1 {
			return nil
		}
	}
}

func (l *Locks) hasEnded(ctx context.Context, h Holder) (bool, error) {
	info, err := asynqwire.GetTask(ctx, l.rdb, l.inspector, h.Queue, h.ID)
	if errors.Is(err, asynq.ErrTaskNotFound) || errors.Is(err, asynq.ErrQueueNotFound) || errors.Is(err, asynqwire.ErrLost) {
		return time.Since(h.since) > grace, nil
	}
	if err != nil {
		return false, err
	}
	return info.State == asynq.TaskStateCompleted || info.State == asynq.TaskStateArchived, nil
}

// KEYS[1] the unique key
// ARGV[1] the holder
// ARGV[2] what the values of this job's begin with
// ARGV[3] how long Redis keeps it, in milliseconds
var hold = redis.NewScript(`
local seen = redis.call("GET", KEYS[1])
if seen and string.sub(seen, 1, #ARGV[2]) ~= ARGV[2] then return 0 end
redis.call("SET", KEYS[1], ARGV[1], "PX", ARGV[3])
return 1`)

// Hold keeps the key that a job with these headers holds while it runs, if it holds one,
// also from those who find its holder nowhere because Redis has lost its data. Another
// holder's stays. The error is Redis'.
func (l *Locks) Hold(ctx context.Context, queue, id string, headers map[string]string) error {
	key := headers[asynqwire.UniqueHeader]
	if key == "" {
		return nil
	}
	holder := Holder{id, queue, time.Now()}
	return hold.Run(ctx, l.rdb, []string{key}, holder.String(), id+" ", ttl.Milliseconds()).Err()
}

// Retake takes the key again that a job with these headers held, if it held one, when the
// job is put back after it had ended. The error is a [HeldError] if another job holds it
// by now, or Redis'.
func (l *Locks) Retake(ctx context.Context, queue, id string, headers map[string]string) error {
	key := headers[asynqwire.UniqueHeader]
	if key == "" {
		return nil
	}
	return l.Take(ctx, key, id, queue, time.Time{})
}

// Release gives up the key that a job with these headers holds, if it holds one. It is to
// be called when the job has ended.
func (l *Locks) Release(ctx context.Context, id string, headers map[string]string) error {
	key := headers[asynqwire.UniqueHeader]
	if key == "" {
		return nil
	}
	seen, err := l.rdb.Get(ctx, key).Result()
	if errors.Is(err, redis.Nil) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("release unique key: %w", err)
	}
	if holder, ok := parseHolder(seen); !ok || holder.ID != id {
		return nil
	}
	if err := replace.Run(ctx, l.rdb, []string{key}, seen, "", 0).Err(); err != nil {
		return fmt.Errorf("release unique key: %w", err)
	}
	return nil
}
