package admin

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/hibiken/asynq"
	"github.com/jackc/pgerrcode"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/carpool-go/carpool/internal/instance"
	"github.com/carpool-go/carpool/internal/outbox"
)

// Status is how everything stood at one moment. Its JSON is that of the command status.
type Status struct {
	At time.Time `json:"at"`
	// Instances are those that are up, the oldest first; Missing are those that should be.
	Instances []Instance        `json:"instances"`
	Missing   []MissingInstance `json:"missing"`
	Queues    []Queue           `json:"queues"`
	// Outbox is nil if it was not read; OutboxNote says why.
	Outbox     *Outbox `json:"outbox"`
	OutboxNote string  `json:"outbox_note,omitempty"`
}

// Queue is how a queue stands that instances share.
type Queue struct {
	Name      string `json:"name"`
	Pending   int    `json:"pending"`
	Active    int    `json:"active"`
	Scheduled int    `json:"scheduled"`
	Retry     int    `json:"retry"`
	Archived  int    `json:"archived"`
	Completed int    `json:"completed"`
	// LatencyMS is how long the oldest pending job has waited, in milliseconds.
	LatencyMS int64 `json:"latency_ms"`
	Paused    bool  `json:"paused"`
	// ArchiveNearlyFull is true from [ArchiveWarning] jobs on.
	ArchiveNearlyFull bool `json:"archive_nearly_full"`
}

// Outbox is how carpool.outbox stands.
type Outbox struct {
	// Waiting rows are on their way to Redis; OldestMS is the age of the oldest,
	// in milliseconds.
	Waiting  int   `json:"waiting"`
	OldestMS int64 `json:"oldest_ms"`
	// Rejected rows have a problem; Problems are the most frequent ones.
	Rejected int             `json:"set_aside"`
	Problems []OutboxProblem `json:"problems"`
}

// OutboxProblem is why rows of the outbox can't become jobs, and how many.
type OutboxProblem struct {
	Problem string `json:"problem"`
	Rows    int    `json:"rows"`
}

const (
	// outboxTimeout bounds what the database may take.
	outboxTimeout = 10 * time.Second
	// problemsShown is how many of the outbox's problems are shown.
	problemsShown = 5
)

// IsServed reports whether an instance that is up pulls from the queue.
func (s *Status) IsServed(queue string) bool {
	return slices.ContainsFunc(s.Instances, func(i Instance) bool {
		_, ok := i.Queues[queue]
		return ok || i.OwnQueue == queue
	})
}

// Status reads how everything stands. It is nil if Redis can't be read, with Redis' error;
// an error beside a status is the database's, and the status has the rest.
func (a *Admin) Status(ctx context.Context) (*Status, error) {
	now := &Status{At: time.Now().UTC()}
	var err error
	if now.Instances, now.Missing, err = readInstances(ctx, a.rdb); err != nil {
		return nil, err
	}
	if now.Queues, err = a.queues(); err != nil {
		return nil, err
	}
	if a.db == nil {
		now.OutboxNote = "not read, as DATABASE_URL is not set"
		return now, nil
	}
	now.Outbox, err = a.outbox(ctx)
	if e, ok := errors.AsType[*pgconn.PgError](err); ok && e.Code == pgerrcode.UndefinedTable {
		now.OutboxNote = "this database has no table carpool.outbox; run the command migrate"
		return now, nil
	}
	if err != nil {
		now.OutboxNote = "it could not be read"
		return now, err
	}
	return now, nil
}

// queues leaves out the instances' own queues, which hold nothing but the validations of
// their pools.
func (a *Admin) queues() ([]Queue, error) {
	names, err := a.inspector.Queues()
	if err != nil {
		return nil, fmt.Errorf("read the names of the queues: %w", err)
	}
	slices.Sort(names)
	queues := []Queue{}
	for _, name := range names {
		if instance.IsQueue(name) {
			continue
		}
		info, err := a.inspector.GetQueueInfo(name)
		if errors.Is(err, asynq.ErrQueueNotFound) {
			continue // it was removed meanwhile
		}
		if err != nil {
			return nil, fmt.Errorf("read the queue %s: %w", name, err)
		}
		queues = append(queues, Queue{
			Name: name, Pending: info.Pending, Active: info.Active, Scheduled: info.Scheduled,
			Retry: info.Retry, Archived: info.Archived, Completed: info.Completed,
			LatencyMS: info.Latency.Milliseconds(), Paused: info.Paused,
			ArchiveNearlyFull: info.Archived >= ArchiveWarning,
		})
	}
	return queues, nil
}

func (a *Admin) outbox(ctx context.Context) (*Outbox, error) {
	ctx, cancel := context.WithTimeout(ctx, outboxTimeout)
	defer cancel()
	stands, err := outbox.ReadStats(ctx, a.db)
	if err != nil {
		return nil, err
	}
	o := Outbox{Waiting: stands.Waiting, OldestMS: stands.Oldest.Milliseconds(), Rejected: stands.Rejected, Problems: []OutboxProblem{}}
	problems, err := outbox.Problems(ctx, a.db, problemsShown)
	if err != nil {
		return nil, err
	}
	for _, p := range problems {
		o.Problems = append(o.Problems, OutboxProblem{p.Problem, p.Rows})
	}
	return &o, nil
}
