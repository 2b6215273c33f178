package admin

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/hibiken/asynq"

	"github.com/carpool-go/carpool/internal/asynqwire"
	"github.com/carpool-go/carpool/internal/reason"
	"github.com/carpool-go/carpool/internal/unique"
	"github.com/carpool-go/carpool/tasks"
)

// ArchiveLimit is how many jobs the archive of a queue holds; for each one more, and after
// 90 days, asynq drops the oldest. From ArchiveWarning jobs on it is nearly full.
const (
	ArchiveLimit   = asynqwire.ArchiveLimit
	ArchiveWarning = asynqwire.ArchiveWarning
)

// ErrNotArchived is wrapped by the error for a job that is not, or no longer, in the
// archive.
var ErrNotArchived = errors.New("the job is not in the archive")

// ArchivedJob is a job that was given up.
type ArchivedJob struct {
	ID    string `json:"id"`
	Kind  string `json:"kind"`
	Queue string `json:"queue"`
	// Tries is how often it was run.
	Tries      int       `json:"tries"`
	ArchivedAt time.Time `json:"archived_at"`
	// Reason is why it was given up.
	Reason string `json:"reason"`
	// Payload is what it carries, which may be personal or secret.
	Payload []byte `json:"-"`

	headers map[string]string
}

func archivedJob(t *asynq.TaskInfo) ArchivedJob {
	why, tries := reason.OfArchived(t.LastErr, t.Retried)
	return ArchivedJob{
		ID: t.ID, Kind: t.Type, Queue: t.Queue, Tries: tries,
		ArchivedAt: t.LastFailedAt.UTC(), Reason: why, Payload: t.Payload, headers: t.Headers,
	}
}

// ArchiveFilter chooses jobs of the archive. The zero value chooses all.
type ArchiveFilter struct {
	Kind string // only jobs of this kind; "": of all
	// Reason chooses jobs whose reason has this text in it; "": all.
	Reason string
	Queue  string // only jobs of this queue; "": of all
}

func (f ArchiveFilter) chooses(job ArchivedJob) bool {
	return (f.Kind == "" || job.Kind == f.Kind) && strings.Contains(job.Reason, f.Reason)
}

// archivePage is how many jobs are read at a time.
const archivePage = 500

// Archived returns the jobs that were given up and that the filter chooses, the latest
// first. The error is Redis'.
func (a *Admin) Archived(ctx context.Context, f ArchiveFilter) ([]ArchivedJob, error) {
	queues, err := a.inspector.Queues()
	if err != nil {
		return nil, fmt.Errorf("list the queues: %w", err)
	}
	var jobs []ArchivedJob
	for _, queue := range queues {
		if f.Queue != "" && queue != f.Queue {
			continue
		}
		for page := 1; ; page++ {
			if err := ctx.Err(); err != nil {
				return nil, context.Cause(ctx)
			}
			some, err := a.inspector.ListArchivedTasks(queue, asynq.Page(page), asynq.PageSize(archivePage))
			if errors.Is(err, asynq.ErrQueueNotFound) {
				break // it was removed meanwhile
			}
			if err != nil {
				return nil, fmt.Errorf("list the archive of queue %s: %w", queue, err)
			}
			for _, t := range some {
				if job := archivedJob(t); f.chooses(job) {
					jobs = append(jobs, job)
				}
			}
			if len(some) < archivePage {
				break
			}
		}
	}
	slices.SortFunc(jobs, func(a, b ArchivedJob) int { return b.ArchivedAt.Compare(a.ArchivedAt) })
	return jobs, nil
}

// ArchivedJob returns a job of a queue's archive. The error wraps [ErrNotArchived] if it
// isn't there, or is Redis'.
func (a *Admin) ArchivedJob(ctx context.Context, queue, id string) (ArchivedJob, error) {
	if err := ctx.Err(); err != nil {
		return ArchivedJob{}, context.Cause(ctx)
	}
	t, err := a.inspector.GetTaskInfo(queue, id)
	if errors.Is(err, asynq.ErrTaskNotFound) || errors.Is(err, asynq.ErrQueueNotFound) || err == nil && t.State != asynq.TaskStateArchived {
		err = ErrNotArchived
	}
	if err != nil {
		return ArchivedJob{}, fmt.Errorf("job %s: %w", id, err)
	}
	return archivedJob(t), nil
}

// Retry puts a job of [Admin.Archived] back on its queue, with all its tries, and takes its
// unique key again. asynq's own way of it leaves the tries used up, so that the next
// failure would be the last, and goes past the unique key.
//
// The error is a [tasks.DuplicateError] if another job holds the key by now, in which case
// the job stays; it wraps [ErrNotArchived] if somebody else was faster; or is Redis'.
func (a *Admin) Retry(ctx context.Context, job ArchivedJob) error {
	msg, err := asynqwire.ReadMessage(ctx, a.rdb, job.Queue, job.ID)
	if err == nil {
		err = a.locks.Retake(ctx, job.Queue, job.ID, job.headers)
	}
	if held, ok := errors.AsType[*unique.HeldError](err); ok {
		key := strings.TrimPrefix(job.headers[asynqwire.UniqueHeader], unique.Key(job.Kind, ""))
		return &tasks.DuplicateError{Key: key, ID: held.Holder.ID, Queue: held.Holder.Queue}
	}
	if err == nil {
		msg.Retried = 0
		err = asynqwire.PutBack(ctx, a.rdb, job.Queue, job.ID, msg)
	}
	return changed(job, err)
}

// Delete deletes a job of [Admin.Archived] for good. The error wraps [ErrNotArchived] if
// somebody else was faster, or is Redis'.
func (a *Admin) Delete(ctx context.Context, job ArchivedJob) error {
	if err := ctx.Err(); err != nil {
		return changed(job, context.Cause(ctx))
	}
	return changed(job, a.inspector.DeleteTask(job.Queue, job.ID))
}

func changed(job ArchivedJob, err error) error {
	if errors.Is(err, asynqwire.ErrNoSuchTask) || errors.Is(err, asynq.ErrTaskNotFound) {
		err = ErrNotArchived
	}
	if err != nil {
		return fmt.Errorf("job %s: %w", job.ID, err)
	}
	return nil
}

// NearlyFull returns the queues whose archive is nearly full. The error is Redis'.
func (a *Admin) NearlyFull(ctx context.Context) (queues []string, err error) {
	names, err := a.inspector.Queues()
	if err != nil {
		return nil, fmt.Errorf("list the queues: %w", err)
	}
	for _, queue := range names {
		n, err := a.rdb.ZCard(ctx, asynqwire.Archived(queue)).Result()
		if err != nil {
			return nil, fmt.Errorf("count the archive of queue %s: %w", queue, err)
		}
		if n >= ArchiveWarning {
			queues = append(queues, queue)
		}
	}
	return queues, nil
}
