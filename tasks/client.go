package tasks

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"regexp"
	"strconv"
	"time"

	"github.com/google/uuid"
	"github.com/hibiken/asynq"
	"github.com/redis/go-redis/v9"

	"github.com/carpool-go/carpool/internal/asynqwire"
	"github.com/carpool-go/carpool/internal/instance"
	"github.com/carpool-go/carpool/internal/limit"
	"github.com/carpool-go/carpool/internal/reason"
	"github.com/carpool-go/carpool/internal/unique"
)

// Client enqueues jobs, and waits for them or cancels them. It is safe for concurrent use.
// The zero Client has no Redis: it can do [Client.EnqueueTx], and nothing else.
type Client struct {
	// MaxPayload is how many bytes of JSON a payload may have; 0 means [DefaultMaxPayload].
	// It is set before the client is used. A worker's own client has what its setting
	// MAX_PAYLOAD says; the database has a limit too, see [Client.EnqueueTx].
	MaxPayload int

	rdb       redis.UniversalClient
	asynq     *asynq.Client
	inspector *asynq.Inspector
	locks     *unique.Locks
}

// NewClient returns a client that enqueues through rdb, which [OpenRedis] makes. The
// caller closes rdb when the client is no longer used; the client itself is not closed.
func NewClient(rdb redis.UniversalClient) *Client {
	return &Client{
		rdb: rdb, asynq: asynq.NewClientFromRedisClient(asynqwire.Punctual(rdb)), inspector: asynq.NewInspectorFromRedisClient(rdb), locks: unique.NewLocks(rdb),
	}
}

// DefaultMaxPayload is how many bytes of JSON a payload, or a result, may have where
// nothing else is said.
const DefaultMaxPayload = limit.Default

// EnqueueOptions say how one job is delivered, where that differs from its kind's
// [Options]. The zero value overrides nothing.
type EnqueueOptions struct {
	// ID is the job's id, of 1 to 200 letters, digits or _ . : / @ + -; "" means a new
	// UUID of version 7. An id of one's own makes a call safe to repeat that got no
	// answer: if the queue has a job of the kind with this id already, nothing is
	// enqueued, and that job is returned without an error. It should be unique over all
	// queues, because asynq's cancellations and leases know a job by its id alone. The
	// ids of jobs that are done and not retained are forgotten: only tasks of
	// [RegisterTx] and [RegisterOnce] know them when they come again later.
	ID string
	// Queue is the queue's name, of 1 to 100 letters, digits or _ . : -; "" means that of
	// the kind. A worker's own, on which it has itself validate its pool, is refused.
	Queue string
	// MaxRetry is how many times a failed job is tried again, [NoRetry] for none; 0 means
	// as often as the kind says.
	MaxRetry int
	// Timeout bounds one attempt, in whole seconds; 0 means the kind's time.
	Timeout time.Duration
	// Retention is how long a job that is done stays in Redis with its result, in whole
	// seconds; 0 means as long as the kind says.
	Retention time.Duration
	// RunAt is the time before which the job isn't run; zero, or one that has
	// passed, means at once.
	RunAt time.Time
	// UniqueKey is held by at most one job of the kind until that job has ended:
	// enqueueing another one returns a [DuplicateError] that names it. It has 1000 bytes at
	// most. "" is no key.
	UniqueKey string
}

// Enqueue validates the payload and puts a job that carries it on its queue; a
// nil opts overrides nothing. When it returns without an error, Redis has the
// job. When it fails because Redis did not answer, the job may be there or not; an
// [EnqueueOptions.ID] makes it safe to try again.
//
// The error is a [PayloadError] for a payload that is not valid, or too large, a
// [DuplicateError] for a unique key that is held, one for an ID, Queue or UniqueKey that
// can't be used, or Redis'.
func (c *Client) Enqueue(ctx context.Context, p Payload, opts *EnqueueOptions) (*Info, error) {
	data, err := c.encode(p)
	if err != nil {
		return nil, err
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
	// Both become names of keys in Redis. The bounds are those of carpool.enqueue.
	switch {
	case !asynqwire.IsQueueName(o.Queue):
		return nil, fmt.Errorf("tasks: enqueue %s: %w", p.Kind(), Permanent(fmt.Errorf("%.100q is no queue's name: 1 to 100 letters, digits, or _ . : -", o.Queue)))
	case len(opts.UniqueKey) > maxUniqueKey:
		return nil, fmt.Errorf("tasks: enqueue %s: %w", p.Kind(), Permanent(fmt.Errorf("the unique key has %d bytes; it may have %d", len(opts.UniqueKey), maxUniqueKey)))
	}
	if err := instance.CheckQueue(o.Queue, p.Kind()); err != nil {
		return nil, fmt.Errorf("tasks: enqueue %s: %w", p.Kind(), Permanent(err))
	}

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
		asynq.TaskID(id), asynq.Queue(o.Queue), asynq.MaxRetry(o.MaxRetry + asynqwire.SpareRetry),
		asynq.Timeout(o.Timeout + asynqwire.TimeoutGrace), asynq.Retention(o.Retention),
	}
	if opts.RunAt.After(time.Now()) {
		due, rounded := asynqwire.WithDue(ctx, opts.RunAt)
		ctx, asynqOpts = due, append(asynqOpts, asynq.ProcessAt(rounded))
	}
	headers := map[string]string{asynqwire.MaxRetryHeader: strconv.Itoa(o.MaxRetry)}
	if opts.UniqueKey != "" {
		key := unique.Key(p.Kind(), opts.UniqueKey)
		err := c.locks.Take(ctx, key, id, o.Queue, opts.RunAt)
		if held, ok := errors.AsType[*unique.HeldError](err); ok {
			return nil, &DuplicateError{Key: opts.UniqueKey, ID: held.Holder.ID, Queue: held.Holder.Queue}
		}
		if err != nil {
			return nil, fmt.Errorf("tasks: enqueue: unique key: %w", err)
		}
		headers[asynqwire.UniqueHeader] = key
		// If enqueueing fails, the job may be there all the same, when only the answer was
		// lost. Then it holds its key; if not, the key is free again soon.
	}
	enqueue := func() (*asynq.TaskInfo, error) {
		return c.asynq.EnqueueContext(ctx, asynq.NewTaskWithHeaders(p.Kind(), data, headers), asynqOpts...)
	}
	info, err := enqueue()
	if errors.Is(err, asynq.ErrTaskIDConflict) {
		info, err = c.existing(ctx, p.Kind(), o.Queue, id)
	}
	if errors.Is(err, ErrJobLost) {
		// What is left of it blocks its id.
		if forgotten, forgetErr := asynqwire.Forget(ctx, c.rdb, o.Queue, id); forgotten && forgetErr == nil {
			info, err = enqueue()
		}
	}
	if err != nil {
		return nil, fmt.Errorf("tasks: enqueue %s: %w", p.Kind(), err)
	}
	return infoOf(info), nil
}

// maxUniqueKey bounds a unique key, in bytes.
const maxUniqueKey = 1000

// encode returns the JSON of a payload that is valid, and not too large. Its error is that
// of enqueueing it.
func (c *Client) encode(p Payload) ([]byte, error) {
	if err := p.Validate(); err != nil {
		return nil, fmt.Errorf("tasks: enqueue: %w", Permanent(&PayloadError{p.Kind(), err}))
	}
	data, err := json.Marshal(p)
	if err != nil {
		return nil, fmt.Errorf("tasks: enqueue %s: %w", p.Kind(), err)
	}
	if err := limit.Check(len(data), c.MaxPayload); err != nil {
		return nil, fmt.Errorf("tasks: enqueue: %w, or Client.MaxPayload in Go", Permanent(&PayloadError{p.Kind(), err}))
	}
	return data, nil
}

// validID leaves out what has a meaning in Redis keys, and what can't be seen.
var validID = regexp.MustCompile(`^[A-Za-z0-9_.:/@+-]{1,200}$`)

// existing is the job that has the id already: an earlier call's, or this one's,
// whose first answer was lost.
func (c *Client) existing(ctx context.Context, kind, queue, id string) (*asynq.TaskInfo, error) {
	info, err := asynqwire.GetTask(ctx, c.rdb, c.inspector, queue, id)
	if errors.Is(err, asynq.ErrTaskNotFound) { // it has ended meanwhile
		return &asynq.TaskInfo{ID: id, Queue: queue, Type: kind, State: asynq.TaskStateCompleted}, nil
	}
	if err == nil && info.Type != kind {
		return nil, fmt.Errorf("queue %s has a job of the kind %s with this id", queue, info.Type)
	}
	return info, err
}

// Get returns what Redis knows of a job on a queue. The error wraps [ErrNoSuchJob] if the
// queue doesn't have it, or [ErrJobLost], or is Redis'.
func (c *Client) Get(ctx context.Context, queue, id string) (*Info, error) {
	info, err := c.look(ctx, queue, id)
	if err != nil {
		return nil, fmt.Errorf("tasks: look at job %s: %w", id, err)
	}
	return infoOf(info), nil
}

// task is what Redis knows of a job. The error is asynq's if the queue, or the job on it,
// is not there, [ErrJobLost], or Redis'. A job whose data has gone while it ran, or after it
// had ended, is not lost: it is described as far as its place tells.
func (c *Client) task(ctx context.Context, queue, id string) (*asynq.TaskInfo, error) {
	info, err := asynqwire.GetTask(ctx, c.rdb, c.inspector, queue, id)
	if !errors.Is(err, asynq.ErrTaskNotFound) {
		return info, err
	}
	state, listErr := asynqwire.Listed(ctx, c.rdb, queue, id)
	info = &asynq.TaskInfo{ID: id, Queue: queue}
	switch {
	case listErr != nil:
		return nil, listErr
	case state == "":
		return nil, err
	case state == asynq.TaskStateActive.String():
		info.State = asynq.TaskStateActive
	case state == asynq.TaskStateCompleted.String():
		info.State = asynq.TaskStateCompleted
	case state == asynq.TaskStateArchived.String():
		info.State, info.LastErr = asynq.TaskStateArchived, ErrJobLost.Error()
	default:
		return nil, ErrJobLost
	}
	return info, nil
}

// ErrJobFailed is wrapped by the error of [Client.Wait] for a job that was archived.
var ErrJobFailed = errors.New("job failed")

// ErrJobCancelled is wrapped by the error of [Client.Wait] for a job that was cancelled. It
// wraps [ErrJobFailed].
var ErrJobCancelled error = jobCancelledError{}

type jobCancelledError struct{}

func (jobCancelledError) Error() string { return "job cancelled" }
func (jobCancelledError) Unwrap() error { return ErrJobFailed }

// waitEvery is how often Wait looks. asynq announces nothing when a job ends.
const waitEvery = 50 * time.Millisecond

// waitThrough is how long Redis may fail to answer while Wait waits: for a
// restart or a failover.
const waitThrough = 30 * time.Second

// Wait waits until a job has ended, or ctx has, and returns the job's result as JSON; nil
// if it has none or was not retained. progress, if not nil, is called whenever the job's
// state or its result so far changes.
//
// The error wraps [ErrJobFailed] and holds the reason if the job was archived, and
// [ErrJobCancelled] if it was cancelled. It wraps [ErrJobLost] if the job has lost its data
// before it was run. It is Redis' once Redis has not answered for 30 s, or has no such
// queue; else it is the end of ctx. A job that the queue doesn't have counts as done,
// because it was not retained; but one that was to be retained, and is gone before it has
// ended, counts as cancelled.
func (c *Client) Wait(ctx context.Context, queue, id string, progress func(*Info)) (result []byte, err error) {
	tick := time.NewTicker(waitEvery)
	defer tick.Stop()
	var last string
	var retention time.Duration
	answered := time.Now()
	for {
		info, err := c.task(ctx, queue, id)
		switch {
		case errors.Is(err, asynq.ErrTaskNotFound) && time.Since(answered) < retention:
			return nil, fmt.Errorf("%w: it was removed from its queue", ErrJobCancelled)
		case errors.Is(err, asynq.ErrTaskNotFound):
			return nil, nil // done, and not retained
		case errors.Is(err, asynq.ErrQueueNotFound), errors.Is(err, ErrJobLost), err != nil && time.Since(answered) > waitThrough:
			return nil, fmt.Errorf("tasks: wait for job %s: %w", id, err)
		case err != nil:
		case info.State == asynq.TaskStateCompleted:
			return info.Result, nil
		case info.State == asynq.TaskStateArchived:
			if why, _ := reason.OfArchived(info.LastErr, info.Retried); why == reason.Cancelled {
				return nil, ErrJobCancelled
			}
			return nil, fmt.Errorf("%w: %s", ErrJobFailed, info.LastErr)
		}
		if err == nil {
			answered, retention = time.Now(), info.Retention
			if now := info.State.String() + string(info.Result); progress != nil && now != last {
				progress(infoOf(info))
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
