package asynqwire

import (
	"context"
	"errors"
	"time"

	"github.com/hibiken/asynq"
	"github.com/redis/go-redis/v9"

	"github.com/carpool-go/carpool/internal/reason"
)

// A job that runs is cancelled in these steps, because asynq retries what was cancelled,
// whatever its handler returns:
//
//  1. The canceller asks asynq to cancel the job, again and again while it is active,
//     since a worker that is just connecting to Redis doesn't hear it.
//  2. The worker has asynq put the job among those to be retried, due after
//     CancelParkDelay, when its handler has returned.
//  3. The worker calls FinishCancelled, which takes it from there.
//  4. If the worker has died meanwhile, the canceller archives the job, which it knows by
//     IsCancelParked.

// CancelParkDelay is how far off the retry is put of a job that was cancelled.
const CancelParkDelay = 100 * 365 * 24 * time.Hour

// IsCancelParked reports whether a job that is due then was cancelled.
func IsCancelParked(due time.Time) bool { return time.Until(due) > CancelParkDelay/100 }

// FinishCancelled takes a job that was cancelled while it ran from those to be retried:
// into the archive, or where jobs go that are done, with its result, if it is done all the
// same. In the archive its last error says that it was cancelled, where asynq says "context
// canceled". finished is false while it is not there yet, and with an error of Redis.
func FinishCancelled(ctx context.Context, rdb redis.UniversalClient, inspector *asynq.Inspector, queue, id string, done bool, result []byte) (finished bool, err error) {
	info, err := inspector.GetTaskInfo(queue, id)
	switch {
	case errors.Is(err, asynq.ErrTaskNotFound):
		return true, nil
	case err != nil:
		return false, err
	case info.State == asynq.TaskStateActive:
		return false, nil
	case info.State == asynq.TaskStateArchived: // as asynq does by itself if it has no retry left
		return true, Reword(ctx, rdb, Archived(queue), queue, id, reason.Cancelled)
	case info.State != asynq.TaskStateRetry:
		return true, nil
	case !done:
		if err = Reword(ctx, rdb, Retry(queue), queue, id, reason.Cancelled); err == nil {
			err = inspector.ArchiveTask(queue, id)
		}
	case info.Retention == 0:
		err = inspector.DeleteTask(queue, id)
	default:
		err = CompleteRetry(ctx, rdb, queue, id, info.Retention, result)
	}
	return err == nil, err
}
