package admin

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/hibiken/asynq"
	"github.com/redis/go-redis/v9"

	"github.com/carpool-go/carpool/internal/asynqwire"
	"github.com/carpool-go/carpool/internal/reason"
	"github.com/carpool-go/carpool/internal/unique"
	"github.com/carpool-go/carpool/tasks"
)

const (
	// ArchiveLimit is how many jobs the archive of a queue holds. The oldest is dropped for
	// each one more, and each after 90 days.
	ArchiveLimit = asynqwire.ArchiveLimit
	// ArchiveWarning is the number of jobs from which on an archive is nearly full.
	ArchiveWarning = asynqwire.ArchiveWarning
)

// ErrNotArchived is wrapped by the error for a job that is not in the archive, or has left
// it meanwhile.
var ErrNotArchived = errors.New("the job is not in the archive")

// ArchivedJob is a job that was given up. It comes from [Admin.Archived] or
// [Admin.ArchivedJob], because [Admin.Retry] needs more of it than the fields here.
type ArchivedJob struct {
	ID    string `json:"id"`
	Kind  string `json:"kind"`
	Queue string `json:"queue"`
	// Tries is how often the job was run; 0 for one that was archived by hand before its first
	// try.
	Tries int `json:"tries"`
	// ArchivedAt is when it came into the archive, in UTC.
	ArchivedAt time.Time `json:"archived_at"`
	// Reason is why it was given up; [ArchivedByHand] for a job that had not failed; the text
	// of [tasks.ErrJobLost] for one whose data is gone, of which only the id, the queue and
	// the time are known.
	Reason string `json:"reason"`
	// Payload is what it carries, as JSON, which may be personal or secret.
	Payload []byte `json:"-"`

	headers map[string]string
	lost    bool
}

// ArchivedByHand is the reason of a job that had not failed and was moved to the archive all
// the same: on a page of asynqmon, or by asynq's Inspector.
const ArchivedByHand = "archived by hand"

// byHandAfter is how long after its last failure a job must have come into the archive for
// that to be another's doing than the failure's. A worker that can't tell Redis of a failure
// for so long has lost the job's lease.
const byHandAfter = time.Minute

// archivedJob is a job of the archive, with its score there. asynq keeps no other time for a
// job that was archived by hand, and doesn't say that it was.
func archivedJob(t *asynq.TaskInfo, score float64) ArchivedJob {
	at := time.Unix(int64(score), 0).UTC()
	why, tries := reason.OfArchived(t.LastErr, t.Retried)
	if at.Sub(t.LastFailedAt) > byHandAfter && why != reason.Cancelled {
		tries = t.Retried // the last failure was followed by a retry
		why = cmp.Or(why, ArchivedByHand)
	}
	return ArchivedJob{
		ID: t.ID, Kind: t.Type, Queue: t.Queue, Tries: tries, ArchivedAt: at, Reason: why, Payload: t.Payload, headers: t.Headers,
	}
}

// lostJob is what there is of a job of the archive whose data is gone.
func lostJob(queue, id string, score float64) ArchivedJob {
	return ArchivedJob{ID: id, Queue: queue, ArchivedAt: time.Unix(int64(score), 0).UTC(), Reason: tasks.ErrJobLost.Error(), lost: true}
}

// ArchiveFilter chooses jobs of the archive: those that all of its fields choose. The zero
// value chooses all.
type ArchiveFilter struct {
	// IDs chooses the jobs of these ids, which are looked up; nil chooses all.
	IDs []string
	// Kind chooses the jobs of one kind; "" chooses all.
	Kind string
	// Reason chooses the jobs whose reason has this text in it; "" chooses all.
	Reason string
	// Queue chooses the jobs of one queue; "" chooses all.
	Queue string
}

func (f ArchiveFilter) chooses(job ArchivedJob) bool {
	return (f.Kind == "" || job.Kind == f.Kind) && strings.Contains(job.Reason, f.Reason)
}

// archivePage is how many jobs are read at a time.
const archivePage = 500

// Archived returns the jobs that were given up and that the filter chooses, the latest
// first, with their payloads: of all queues at once that is up to [ArchiveLimit] jobs a
// queue. The error is Redis', or the end of ctx.
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
		some, err := a.archivedOf(ctx, queue, f)
		if err != nil {
			return nil, err
		}
		jobs = append(jobs, some...)
	}
	slices.SortFunc(jobs, func(a, b ArchivedJob) int { return b.ArchivedAt.Compare(a.ArchivedAt) })
	return jobs, nil
}

// archivedOf returns the jobs of one queue's archive that the filter chooses.
func (a *Admin) archivedOf(ctx context.Context, queue string, f ArchiveFilter) (jobs []ArchivedJob, err error) {
	for _, id := range f.IDs {
		job, err := a.ArchivedJob(ctx, queue, id)
		switch {
		case err == nil && f.chooses(job):
			jobs = append(jobs, job)
		case err != nil && !errors.Is(err, ErrNotArchived):
			return nil, err
		}
	}
	if f.IDs != nil {
		return jobs, nil
	}
	for page := 0; ; page++ {
		if err := ctx.Err(); err != nil {
			return nil, context.Cause(ctx)
		}
		some, more, err := a.archivedPage(ctx, queue, page)
		if err != nil {
			return nil, fmt.Errorf("list the archive of queue %s: %w", queue, err)
		}
		for _, job := range some {
			if f.chooses(job) {
				jobs = append(jobs, job)
			}
		}
		if !more {
			return jobs, nil
		}
	}
}

// archivedPage returns a page of a queue's archive, and whether there may be another. asynq
// reads it in one exchange, but for the jobs whose data is gone: one may be a task without
// an id, be left out, or make asynq fail.
func (a *Admin) archivedPage(ctx context.Context, queue string, page int) (jobs []ArchivedJob, more bool, err error) {
	listed, err := a.rdb.ZRangeWithScores(ctx, asynqwire.Archived(queue), int64(page)*archivePage, int64(page+1)*archivePage-1).Result()
	if err != nil && !asynqwire.IsWrongType(err) { // of an archive that is something else
		return nil, false, err
	}
	read := make(map[string]*asynq.TaskInfo, len(listed))
	all, err := a.inspector.ListArchivedTasks(queue, asynq.Page(page+1), asynq.PageSize(archivePage))
	if err == nil { // else each is read by itself, and tells what is wrong
		for _, t := range all {
			read[t.ID] = t
		}
	}
	for _, z := range listed {
		id := z.Member.(string)
		if t := read[id]; t != nil {
			jobs = append(jobs, archivedJob(t, z.Score))
			continue
		}
		job, err := a.ArchivedJob(ctx, queue, id)
		switch {
		case err == nil:
			jobs = append(jobs, job)
		case !errors.Is(err, ErrNotArchived): // it has left the archive meanwhile
			return nil, false, err
		}
	}
	return jobs, len(listed) == archivePage, nil
}

// ArchivedJob returns one job of a queue's archive. The error wraps [ErrNotArchived], or is
// Redis'.
func (a *Admin) ArchivedJob(ctx context.Context, queue, id string) (ArchivedJob, error) {
	if err := ctx.Err(); err != nil {
		return ArchivedJob{}, context.Cause(ctx)
	}
	t, err := asynqwire.GetTask(ctx, a.rdb, a.inspector, queue, id)
	lost := errors.Is(err, asynqwire.ErrLost) || errors.Is(err, asynq.ErrTaskNotFound)
	switch {
	case lost, err == nil && t.State == asynq.TaskStateArchived:
		var score float64
		score, err = a.rdb.ZScore(ctx, asynqwire.Archived(queue), id).Result()
		switch {
		case err == nil && lost:
			return lostJob(queue, id, score), nil
		case err == nil:
			return archivedJob(t, score), nil
		case errors.Is(err, redis.Nil):
			err = ErrNotArchived
		}
	case err == nil, errors.Is(err, asynq.ErrQueueNotFound):
		err = ErrNotArchived
	}
	return ArchivedJob{}, fmt.Errorf("job %s: %w", id, err)
}

// Retry puts a job of the archive back on its queue, with all its tries, and takes its
// unique key again. asynq's Inspector would leave the tries used up, so that the next
// failure is the last, and pass over the unique key.
//
// The error is a [tasks.DuplicateError] if another job holds the key by now; it wraps
// [ErrNotArchived] if the job has left the archive meanwhile, or [tasks.ErrJobLost] if
// there is nothing to put back; or it is Redis'. After a DuplicateError, and after
// ErrJobLost, the job is still in the archive.
func (a *Admin) Retry(ctx context.Context, job ArchivedJob) error {
	if job.lost {
		return changed(job, tasks.ErrJobLost)
	}
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

// Delete deletes a job of the archive for good. The error wraps [ErrNotArchived] if the job
// has left the archive meanwhile, or is Redis'.
func (a *Admin) Delete(ctx context.Context, job ArchivedJob) error {
	if err := ctx.Err(); err != nil {
		return changed(job, context.Cause(ctx))
	}
	err := a.inspector.DeleteTask(job.Queue, job.ID)
	if err == nil {
		return nil
	}
	// asynq finds a job by its data alone.
	if forgotten, forgetErr := asynqwire.Forget(ctx, a.rdb, job.Queue, job.ID); forgetErr != nil || forgotten {
		return changed(job, forgetErr)
	}
	return changed(job, err)
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

// NearlyFull returns the queues whose archive has [ArchiveWarning] jobs or more. The error
// is Redis'.
func (a *Admin) NearlyFull(ctx context.Context) (queues []string, err error) {
	names, err := a.inspector.Queues()
	if err != nil {
		return nil, fmt.Errorf("list the queues: %w", err)
	}
	for _, queue := range names {
		n, err := a.rdb.ZCard(ctx, asynqwire.Archived(queue)).Result()
		if err != nil && !asynqwire.IsWrongType(err) {
			return nil, fmt.Errorf("count the archive of queue %s: %w", queue, err)
		}
		if n >= ArchiveWarning {
			queues = append(queues, queue)
		}
	}
	return queues, nil
}
