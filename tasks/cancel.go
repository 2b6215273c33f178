package tasks

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/hibiken/asynq"
)

var (
	// ErrNoSuchJob is wrapped by the error for an id that no queue has. Jobs that
	// have ended are forgotten, unless they are retained.
	ErrNoSuchJob = errors.New("there is no such job")
	// ErrJobEnded is wrapped by the error of [Client.Cancel] for a job that has
	// ended already.
	ErrJobEnded = errors.New("the job has ended already")
)

const (
	cancelCheck = 50 * time.Millisecond
	// cancelAgain is how often a running job is told; a worker that is just
	// connecting to Redis doesn't hear it.
	cancelAgain = time.Second
	// parkedFor is how long a worker has to put a job away that asynq has parked:
	// it knows whether that is done. One that stops takes 2 s at most.
	parkedFor = 4 * time.Second
)

// Cancel cancels a job. One that waits is removed. One that runs has its context
// cancelled, and when its handler has returned it is archived and not run again; if
// the handler succeeds all the same, the job is done, and the error wraps [ErrJobEnded].
//
// It returns when that has happened, which takes as long as the handler does. The
// other errors wrap [ErrNoSuchJob] or [ErrJobEnded], or are Redis'.
func (c *Client) Cancel(ctx context.Context, id string) error {
	var told, parked time.Time
	running := false
	for {
		info, err := c.Find(ctx, id)
		if running && (errors.Is(err, ErrNoSuchJob) || err == nil && info.State == asynq.TaskStateCompleted) {
			return fmt.Errorf("tasks: cancel job %s: %w: it has succeeded all the same", id, ErrJobEnded)
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
			return fmt.Errorf("tasks: cancel job %s: %w: it is %s", id, ErrJobEnded, info.State)
		default:
			if running && time.Until(info.NextProcessAt) > 365*24*time.Hour {
				// Its worker is about to put it away, if it still lives.
				if parked.IsZero() {
					parked = time.Now()
				}
				if time.Since(parked) > parkedFor {
					_ = c.inspector.ArchiveTask(info.Queue, id)
				}
				break
			}
			err := c.inspector.DeleteTask(info.Queue, id)
			if err == nil {
				return c.ReleaseUnique(ctx, id, info.Headers)
			}
			if !errors.Is(err, asynq.ErrTaskNotFound) && ctx.Err() != nil {
				return fmt.Errorf("tasks: cancel job %s: %w", id, err)
			}
			// It has begun to run meanwhile.
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("tasks: cancel job %s: it still runs: %w", id, context.Cause(ctx))
		case <-time.After(cancelCheck):
		}
	}
}

// Find looks for a job on all queues. The error wraps [ErrNoSuchJob] if none has
// it.
func (c *Client) Find(ctx context.Context, id string) (*asynq.TaskInfo, error) {
	queues, err := c.inspector.Queues()
	if err != nil {
		return nil, fmt.Errorf("list the queues: %w", err)
	}
	for _, queue := range queues {
		if err := ctx.Err(); err != nil {
			return nil, context.Cause(ctx)
		}
		info, err := c.inspector.GetTaskInfo(queue, id)
		if err == nil {
			return info, nil
		}
		if !errors.Is(err, asynq.ErrTaskNotFound) && !errors.Is(err, asynq.ErrQueueNotFound) {
			return nil, fmt.Errorf("look for it on queue %s: %w", queue, err)
		}
	}
	return nil, ErrNoSuchJob
}
