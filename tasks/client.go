package tasks

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/google/uuid"
	"github.com/hibiken/asynq"
	"github.com/redis/go-redis/v9"
)

// Client enqueues jobs. It is safe for concurrent use.
type Client struct {
	rdb       redis.UniversalClient
	asynq     *asynq.Client
	inspector *asynq.Inspector
}

// NewClient returns a client that enqueues through rdb, see [OpenRedis]. The
// caller closes rdb; the client itself holds nothing.
func NewClient(rdb redis.UniversalClient) *Client {
	return &Client{rdb, asynq.NewClientFromRedisClient(rdb), asynq.NewInspectorFromRedisClient(rdb)}
}

// EnqueueOptions override a kind's [Options] for one job. The zero value
// overrides nothing.
type EnqueueOptions struct {
	// ID is the job's id, if its enqueuer wants to choose it; "" means a new UUID
	// of version 7. Enqueueing an id that the queue has already does nothing and
	// is no error, so a call that got no answer may be repeated; if the queue's is
	// a job of another kind, it is an error. It should be unique over all queues:
	// asynq's cancellations and leases know a job by its id alone. Ids of jobs that
	// have ended, and are not retained, are forgotten: only a transactional task
	// (see [RegisterTx]) is safe against an id that comes again later.
	ID string
	// Queue, MaxRetry, Timeout and Retention as in [Options]; zero means the
	// kind's own.
	Queue     string
	MaxRetry  int
	Timeout   time.Duration
	Retention time.Duration
	// RunAt is the time before which the job isn't run; zero, or one that has
	// passed, means at once.
	RunAt time.Time
	// UniqueKey, if set, is held by at most one job of the kind that has not
	// ended: enqueueing another one returns a [DuplicateError] that names it.
	UniqueKey string
}

// Enqueue validates the payload and puts a job that carries it on its queue; a
// nil opts overrides nothing. When it returns without an error, Redis has the
// job. When it fails because Redis did not answer, the job may have been
// enqueued or not; an ID of one's own makes it safe to try again.
//
// The errors: a [PayloadError] for a payload that is not valid, a
// [DuplicateError], or what Redis said.
func (c *Client) Enqueue(ctx context.Context, p Payload, opts *EnqueueOptions) (*asynq.TaskInfo, error) {
	if err := p.Validate(); err != nil {
		return nil, fmt.Errorf("tasks: enqueue: %w", Permanent(&PayloadError{p.Kind(), err}))
	}
	data, err := json.Marshal(p)
	if err != nil {
		return nil, fmt.Errorf("tasks: enqueue %s: %w", p.Kind(), err)
	}
	if opts == nil {
		opts = &EnqueueOptions{}
	}
	o := p.Options()
	if opts.Queue != "" {
		o.Queue = opts.Queue
	}
	if opts.MaxRetry != 0 {
		o.MaxRetry = opts.MaxRetry
	}
	if opts.Timeout != 0 {
		o.Timeout = opts.Timeout
	}
	if opts.Retention != 0 {
		o.Retention = opts.Retention
	}
	o = o.withDefaults()

	id := opts.ID
	if id == "" {
		v7, err := uuid.NewV7() // in the order of time, which an index on it likes
		if err != nil {
			return nil, fmt.Errorf("tasks: enqueue %s: %w", p.Kind(), err)
		}
		id = v7.String()
	} else if !validID.MatchString(id) {
		return nil, fmt.Errorf("tasks: enqueue %s: the id must be 1 to 200 letters, digits or _ . : / @ + -", p.Kind())
	}
	asynqOpts := []asynq.Option{
		asynq.TaskID(id), asynq.Queue(o.Queue), asynq.MaxRetry(o.MaxRetry + spareRetry),
		asynq.Timeout(o.Timeout + TimeoutGrace), asynq.Retention(o.Retention),
	}
	if opts.RunAt.After(time.Now()) {
		asynqOpts = append(asynqOpts, asynq.ProcessAt(opts.RunAt))
	}
	headers := map[string]string{maxRetryHeader: strconv.Itoa(o.MaxRetry)}
	if opts.UniqueKey != "" {
		lock := uniqueLock{
			key: uniqueLockKey(p.Kind(), opts.UniqueKey),
			id:  id, queue: o.Queue, since: time.Now(),
		}
		if err := c.takeUnique(ctx, lock, opts); err != nil {
			return nil, err
		}
		headers[uniqueHeader] = lock.key
		// If enqueueing fails, the job may be there all the same, when only the
		// answer was lost. Then it holds its key; if not, the key is free again
		// after uniqueGrace.
	}
	info, err := c.asynq.EnqueueContext(ctx, asynq.NewTaskWithHeaders(p.Kind(), data, headers), asynqOpts...)
	if errors.Is(err, asynq.ErrTaskIDConflict) {
		info, err = c.existing(p.Kind(), o.Queue, id)
	}
	if err != nil {
		return nil, fmt.Errorf("tasks: enqueue %s: %w", p.Kind(), err)
	}
	info.MaxRetry = o.MaxRetry
	return info, nil
}

// validID leaves out what has a meaning in Redis keys, and what can't be seen.
var validID = regexp.MustCompile(`^[A-Za-z0-9_.:/@+-]{1,200}$`)

// existing is the job that has the id already: an earlier call's, or this one's,
// whose first answer was lost.
func (c *Client) existing(kind, queue, id string) (*asynq.TaskInfo, error) {
	info, err := c.inspector.GetTaskInfo(queue, id)
	if errors.Is(err, asynq.ErrTaskNotFound) { // it has ended meanwhile
		return &asynq.TaskInfo{ID: id, Queue: queue, Type: kind, State: asynq.TaskStateCompleted}, nil
	}
	if err == nil && info.Type != kind {
		return nil, fmt.Errorf("queue %s has a job of the kind %s with this id", queue, info.Type)
	}
	return info, err
}

const (
	// maxRetryHeader carries how many times a job is tried again at most.
	maxRetryHeader = "carpool-max-retry"
	// spareRetry is how much more asynq is told. asynq archives a job that fails
	// on its last try whatever the reason; with some to spare, whether a failure
	// counts is the worker's to say, and a job whose last try had no end, or whose
	// one run more when it was put back, is looked at before it is given up.
	spareRetry = 2
)

// MaxRetry returns how many times a job with these headers is tried again at
// most; false for a job that was not enqueued by carpool.
func MaxRetry(headers map[string]string) (int, bool) {
	n, err := strconv.Atoi(headers[maxRetryHeader])
	return n, err == nil && n >= 0
}

// uniqueHeader carries the key of a job's unique lock with the job.
const uniqueHeader = "carpool-unique"

// uniqueGrace is how long a unique key is left to a holder that can't be found:
// its enqueuer may be between taking the key and enqueueing the job.
const uniqueGrace = 30 * time.Second

// uniqueTTL bounds how long Redis keeps the key of a job after the time it was
// to run at. Keys are given up when their job ends; this is for the keys of jobs
// that were deleted by hand.
const uniqueTTL = 30 * 24 * time.Hour

// uniqueLock is the holder of a unique key, as Redis keeps it.
type uniqueLock struct {
	key, id, queue string
	since          time.Time
}

// uniqueLockKey tells apart kind a with key b:c, and kind a:b with key c.
func uniqueLockKey(kind, key string) string {
	return "carpool:unique:" + strconv.Itoa(len(kind)) + ":" + kind + ":" + key
}

func (l uniqueLock) String() string {
	return l.id + " " + strconv.FormatInt(l.since.UnixMilli(), 10) + " " + l.queue
}

func parseUniqueLock(key, s string) (uniqueLock, bool) {
	id, rest, _ := strings.Cut(s, " ")
	ms, queue, ok := strings.Cut(rest, " ")
	at, err := strconv.ParseInt(ms, 10, 64)
	return uniqueLock{key, id, queue, time.UnixMilli(at)}, ok && err == nil
}

// replaceIf sets a key if it still has the value seen, and deletes it if the
// new value is empty.
var replaceIf = redis.NewScript(`
if redis.call("GET", KEYS[1]) ~= ARGV[1] then return 0 end
if ARGV[2] == "" then return redis.call("DEL", KEYS[1]) end
redis.call("SET", KEYS[1], ARGV[2], "PX", ARGV[3])
return 1`)

// takeUnique takes the key for the job to be enqueued, from nobody or from a
// holder that has ended. A fixed task ID would be simpler, but then a finished
// job that is kept for its result, or an archived one, blocks the key.
func (c *Client) takeUnique(ctx context.Context, lock uniqueLock, opts *EnqueueOptions) error {
	ttl := uniqueTTL + max(0, time.Until(opts.RunAt))
	for {
		err := c.rdb.SetArgs(ctx, lock.key, lock.String(), redis.SetArgs{Mode: "NX", TTL: ttl}).Err()
		if err == nil {
			return nil
		}
		if !errors.Is(err, redis.Nil) {
			return fmt.Errorf("tasks: enqueue: unique key: %w", err)
		}
		seen, err := c.rdb.Get(ctx, lock.key).Result()
		if errors.Is(err, redis.Nil) {
			continue
		}
		if err != nil {
			return fmt.Errorf("tasks: enqueue: unique key: %w", err)
		}
		if holder, ok := parseUniqueLock(lock.key, seen); ok {
			if holder.id == lock.id {
				return nil // the first SET was answered to nobody
			}
			ended, err := c.ended(holder)
			if err != nil {
				return fmt.Errorf("tasks: enqueue: unique key: %w", err)
			}
			if !ended {
				return &DuplicateError{Key: opts.UniqueKey, ID: holder.id, Queue: holder.queue}
			}
		}
		replaced, err := replaceIf.Run(ctx, c.rdb, []string{lock.key}, seen, lock.String(), ttl.Milliseconds()).Int()
		if err != nil {
			return fmt.Errorf("tasks: enqueue: unique key: %w", err)
		}
		if replaced == 1 {
			return nil
		}
	}
}

func (c *Client) ended(l uniqueLock) (bool, error) {
	info, err := c.inspector.GetTaskInfo(l.queue, l.id)
	if errors.Is(err, asynq.ErrTaskNotFound) || errors.Is(err, asynq.ErrQueueNotFound) {
		return time.Since(l.since) > uniqueGrace, nil
	}
	if err != nil {
		return false, err
	}
	return info.State == asynq.TaskStateCompleted || info.State == asynq.TaskStateArchived, nil
}

// RetakeUnique takes the unique key again that a job with these headers held, if it
// held one, when the job is put back after it had ended. The error is a
// [DuplicateError] if another job holds it by now, or Redis'.
func (c *Client) RetakeUnique(ctx context.Context, queue, id string, headers map[string]string) error {
	key := headers[uniqueHeader]
	if key == "" {
		return nil
	}
	return c.takeUnique(ctx, uniqueLock{key: key, id: id, queue: queue, since: time.Now()}, &EnqueueOptions{UniqueKey: key})
}

// ReleaseUnique gives up the unique key that a job with these headers holds, if
// it holds one. The worker calls it when the job has ended.
func (c *Client) ReleaseUnique(ctx context.Context, id string, headers map[string]string) error {
	key := headers[uniqueHeader]
	if key == "" {
		return nil
	}
	seen, err := c.rdb.Get(ctx, key).Result()
	if errors.Is(err, redis.Nil) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("tasks: release unique key: %w", err)
	}
	if holder, ok := parseUniqueLock(key, seen); !ok || holder.id != id {
		return nil
	}
	if err := replaceIf.Run(ctx, c.rdb, []string{key}, seen, "", 0).Err(); err != nil {
		return fmt.Errorf("tasks: release unique key: %w", err)
	}
	return nil
}

// ErrJobFailed is wrapped by the error of [Client.Wait] for a job that was
// archived.
var ErrJobFailed = errors.New("job failed")

// waitEvery is how often Wait looks. asynq announces nothing when a job ends.
const waitEvery = 50 * time.Millisecond

// waitThrough is how long Redis may fail to answer while Wait waits: for a
// restart or a failover.
const waitThrough = 30 * time.Second

// Wait waits until a job has ended and returns its result as JSON, nil if it
// has none or was not retained. An archived job is an error that wraps
// [ErrJobFailed] and holds the reason. progress, if not nil, is called with the
// job's state and its result so far whenever they change. A Redis that has not
// answered for 30 s is an error.
func (c *Client) Wait(ctx context.Context, queue, id string, progress func(state asynq.TaskState, result []byte)) ([]byte, error) {
	tick := time.NewTicker(waitEvery)
	defer tick.Stop()
	var last string
	answered := time.Now()
	for {
		info, err := c.inspector.GetTaskInfo(queue, id)
		switch {
		case errors.Is(err, asynq.ErrTaskNotFound):
			return nil, nil // done, and not retained
		case errors.Is(err, asynq.ErrQueueNotFound), err != nil && time.Since(answered) > waitThrough:
			return nil, fmt.Errorf("tasks: wait for job %s: %w", id, err)
		case err != nil:
		case info.State == asynq.TaskStateCompleted:
			return info.Result, nil
		case info.State == asynq.TaskStateArchived:
			return nil, fmt.Errorf("%w: %s", ErrJobFailed, info.LastErr)
		}
		if err == nil {
			answered = time.Now()
			if now := info.State.String() + string(info.Result); progress != nil && now != last {
				progress(info.State, info.Result)
				last = now
			}
		}
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("tasks: wait for job %s: %w", id, context.Cause(ctx))
		case <-tick.C:
		}
	}
}
