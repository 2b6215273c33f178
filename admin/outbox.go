package admin

import (
	"context"
	"errors"
	"slices"
	"time"

	"github.com/jackc/pgerrcode"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/carpool-go/carpool/internal/outbox"
)

// OutboxJob is a job that is still in the outbox, where it waits for a relay or was
// rejected by one.
type OutboxJob struct {
	ID   string `json:"id"`
	Kind string `json:"kind"`
	// Queue is "" for the kind's own.
	Queue string `json:"queue,omitempty"`
	// EnqueuedAt is when it was put in, in UTC.
	EnqueuedAt time.Time `json:"enqueued_at"`
	// AgeMS is how long ago that is by Postgres' clock, in milliseconds.
	AgeMS int64 `json:"age_ms"`
	// Problem is why it was rejected; "" means that it waits.
	Problem string `json:"problem,omitempty"`
}

// OutboxFilter chooses jobs of the outbox: those that all of its fields choose. The zero
// value chooses all.
type OutboxFilter struct {
	// IDs chooses the jobs with these ids; nil chooses all.
	IDs []string
	// Kind chooses the jobs of one kind; "" chooses all.
	Kind string
	// Problem chooses the rejected jobs whose problem has this text in it; "" chooses all.
	Problem string
	// Waiting chooses the jobs that wait for a relay, and Rejected those that have a
	// problem; neither, or both, chooses all.
	Waiting, Rejected bool
	// Limit is how many jobs are chosen at most, those that were put in first; 0 is no limit.
	Limit int
}

// ErrNoOutbox is wrapped by the error for a database that lacks carpool's tables.
var ErrNoOutbox = errors.New("this database has no table carpool.outbox; run the command migrate")

// errNoDatabase is the error of an Admin that was given none.
var errNoDatabase = errors.New("admin: the outbox is in the database, and there is none")

// outboxBatch is how many rows are changed by one statement.
const outboxBatch = 1000

// OutboxJobs returns the jobs that are in the outbox and that the filter chooses, in the
// order in which they were put in. The error wraps [ErrNoOutbox], or is the database's.
func (a *Admin) OutboxJobs(ctx context.Context, f OutboxFilter) ([]OutboxJob, error) {
	if a.db == nil {
		return nil, errNoDatabase
	}
	ctx, cancel := context.WithTimeout(ctx, outboxTimeout)
	defer cancel()
	entries, err := outbox.List(ctx, a.db, outbox.Filter{
		IDs: f.IDs, Kind: f.Kind, Problem: f.Problem, Waiting: f.Waiting, Rejected: f.Rejected,
	}, f.Limit)
	if err != nil {
		return nil, withoutTable(err)
	}
	jobs := make([]OutboxJob, len(entries))
	for i, e := range entries {
		jobs[i] = OutboxJob{e.ID, e.Kind, e.Queue, e.CreatedAt.UTC(), e.Age.Milliseconds(), e.Problem}
	}
	return jobs, nil
}

// RetryOutbox lets rejected jobs of the outbox wait again, so that a relay takes them within
// a second, and returns those for which it did so, also beside an error. A job that waits
// already, or is gone, is passed over. The error is the database's.
func (a *Admin) RetryOutbox(ctx context.Context, jobs []OutboxJob) (retried []OutboxJob, err error) {
	return a.changeOutbox(ctx, jobs, outbox.Retry)
}

// DeleteOutbox deletes jobs of the outbox for good, and returns those for which it did so,
// also beside an error. A job that a relay is moving to Redis, or has moved there, is passed
// over; [Admin.Cancel] takes it. The error is the database's.
func (a *Admin) DeleteOutbox(ctx context.Context, jobs []OutboxJob) (deleted []OutboxJob, err error) {
	return a.changeOutbox(ctx, jobs, outbox.Delete)
}

func (a *Admin) changeOutbox(ctx context.Context, jobs []OutboxJob, change func(context.Context, outbox.Queryer, []string) ([]string, error)) (changed []OutboxJob, err error) {
	if a.db == nil {
		return nil, errNoDatabase
	}
	for batch := range slices.Chunk(jobs, outboxBatch) {
		ids := make([]string, len(batch))
		for i, job := range batch {
			ids[i] = job.ID
		}
		batchCtx, cancel := context.WithTimeout(ctx, outboxTimeout)
		done, err := change(batchCtx, a.db, ids)
		cancel()
		if err != nil {
			return changed, withoutTable(err)
		}
		is := make(map[string]bool, len(done))
		for _, id := range done {
			is[id] = true
		}
		for _, job := range batch {
			if is[job.ID] {
				changed = append(changed, job)
			}
		}
	}
	return changed, nil
}

// withoutTable turns Postgres' error for a table that isn't there into [ErrNoOutbox].
func withoutTable(err error) error {
	if e, ok := errors.AsType[*pgconn.PgError](err); ok && e.Code == pgerrcode.UndefinedTable {
		return ErrNoOutbox
	}
	return err
}
