package tasks

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/hibiken/asynq"

	"github.com/carpool-go/carpool/internal/asynqwire"
	"github.com/carpool-go/carpool/internal/reason"
	"github.com/carpool-go/carpool/internal/wait"
)

var (
	// ErrNoSuchJob is wrapped by the error of [Client.Get] and [Client.Cancel] for an id
	// that is not in Redis. A job that is done is forgotten, unless it is retained.
	ErrNoSuchJob = errors.New("there is no such job")
	// ErrJobLost is wrapped by the error of [Client.Get], [Client.Wait] and [Client.Cancel]
	// for a job that is on a queue still, while its data is gone: its key in Redis was
	// evicted, because Redis may evict keys, or deleted or overwritten by hand. It is never
	// run; what it was, only its producer knows.
	ErrJobLost = asynqwire.ErrLost
	// ErrJobEnded is wrapped by the error of [Client.Cancel] for a job that has
	// ended already.
	ErrJobEnded = errors.New("the job has ended already")
)

const (
	cancelCheck = 50 * time.Millisecond
	// cancelAgain is how often a running job is told; a worker that is just
	// connecting to Redis doesn't hear it.
	cancelAgain = time.Second
)

// Cancel cancels a job, on whichever queue it is. A job that waits is removed. One that
// runs has its context cancelled, and is archived when its handler has returned. Cancel
// returns when that has happened, which takes as long as the handler does.
//
// The error wraps [ErrNoSuchJob], or [ErrJobEnded] for a job that had ended before, or
// whose handler succeeded all the same, or [ErrJobLost] if what is left of one that has
// lost its data can't be removed; or it is Redis', or the end of ctx. A job in the outbox is
// not in Redis yet: the command cancel, and package admin, find it there too.
func (c *Client) Cancel(ctx context.Context, id string) error {
	var told time.Time
	running := false
	queue, info, err := c.find(ctx, id)
	for {
		if running && (errors.Is(err, ErrNoSuchJob) || err == nil && info.State == asynq.TaskStateCompleted) {
			return fmt.Errorf("tasks: cancel job %s: %w: it has succeeded all the same", id, ErrJobEnded)
		}
		if errors.Is(err, ErrJobLost) {
			forgotten, forgetErr := asynqwire.Forget(ctx, c.rdb, queue, id)
			if forgetErr == nil && (forgotten || c.inspector.DeleteTask(queue, id) == nil) {
				return nil
			}
			err = errors.Join(err, forgetErr)
		}
		if err != nil {
			return fmt.Errorf("tasks: cancel job %s: %w", id, err)
		}
		switch info.State {
		case asynq.TaskStateActive:
			running = true
			if time.Since(told) > cancelAgain {
				told = time.Now()
				if err := c.inspector.CancelProcessing(id); err != nil {
					return fmt.Errorf("tasks: cancel job %s: %w", id, err)
				}
			}
		case asynq.TaskStateCompleted, asynq.TaskStateArchived:
			if running {
				return nil
			}
			ended := info.State.String()
			if why, _ := reason.OfArchived(info.LastErr, info.Retried); info.State == asynq.TaskStateArchived && why == reason.Cancelled {
				ended = reason.Cancelled
			}
			return fmt.Errorf("tasks: cancel job %s: %w: it is %s", id, ErrJobEnded, ended)
		default:
			err := c.inspector.DeleteTask(queue, id)
			if err == nil {
				if err := c.locks.Release(ctx, id, info.Headers); err != nil {
					return fmt.Errorf("tasks: cancel job %s: %w", id, err)
				}
				return nil
			}
			// A job that has begun to run meanwhile can't be deleted, for which asynq has no
			// error of its own. One that is as it was shows that Redis refuses.
			now, lookErr := c.inspector.GetTaskInfo(queue, id)
			if !errors.Is(err, asynq.ErrTaskNotFound) && lookErr == nil && now.State == info.State {
				return fmt.Errorf("tasks: cancel job %s: %w", id, err)
			}
		}
		if err := wait.For(ctx, cancelCheck); err != nil {
			return fmt.Errorf("tasks: cancel job %s: it still runs: %w", id, err)
		}
		info, err = c.look(ctx, queue, id)
	}
}

// find looks for a job on all queues, and returns the one that has it. The error wraps
// [ErrNoSuchJob] if none does, or [ErrJobLost].
func (c *Client) find(ctx context.Context, id string) (queue string, info *asynq.TaskInfo, err error) {
	queues, err := c.inspector.Queues()
	if err != nil {
		return "", nil, fmt.Errorf("list the queues: %w", err)
	}
	for _, queue := range queues {
		if info, err := c.look(ctx, queue, id); !errors.Is(err, ErrNoSuchJob) {
			return queue, info, err
		}
	}
	return "", nil, ErrNoSuchJob
}

// look looks for a job on one queue. The error wraps [ErrNoSuchJob] if it isn't there, or
// [ErrJobLost].
func (c *Client) look(ctx context.Context, queue, id string) (*asynq.TaskInfo, error) {
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	info, err := c.task(ctx, queue, id)
	if errors.Is(err, asynq.ErrTaskNotFound) || errors.Is(err, asynq.ErrQueueNotFound) {
		return nil, ErrNoSuchJob
	}
	if err != nil {
		return nil, fmt.Errorf("look for it on queue %s: %w", queue, err)
	}
	return info, nil
}
