package admin

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/carpool-go/carpool/internal/asynqwire"
	"github.com/carpool-go/carpool/internal/instance"
	"github.com/carpool-go/carpool/internal/outbox"
	"github.com/carpool-go/carpool/tasks"
)

// Status is how everything stood at one moment. Its JSON is what the command status --json
// prints.
type Status struct {
	// At is when it was read, in UTC.
	At time.Time `json:"at"`
	// Instances are the workers that are up, the oldest first.
	Instances []Instance `json:"instances"`
	// Missing are the workers that have fallen silent before they stopped.
	Missing []MissingInstance `json:"missing"`
	// Queues are those that instances share, by name.
	Queues []Queue `json:"queues"`
	// ServedQueues are those of [Admin.ServedQueues].
	ServedQueues []string `json:"served_queues,omitempty"`
	// Outbox is nil if it was not read; OutboxNote says why.
	Outbox     *Outbox `json:"outbox"`
	OutboxNote string  `json:"outbox_note,omitempty"`
}

// Queue is how a queue stands that instances share. The numbers of jobs are by their
// [tasks.State].
type Queue struct {
	Name      string `json:"name"`
	Pending   int    `json:"pending"`
	Active    int    `json:"active"`
	Scheduled int    `json:"scheduled"`
	Retry     int    `json:"retry"`
	Archived  int    `json:"archived"`
	Completed int    `json:"completed"`
	// Aggregating is how many jobs plain clients of asynq have put into its groups. No
	// instance fetches them: only a server of asynq's with a GroupAggregator does.
	Aggregating int `json:"aggregating"`
	// LatencyMS is how long the oldest pending job has waited, in milliseconds.
	LatencyMS int64 `json:"latency_ms"`
	// Paused is true between [Admin.Pause] and [Admin.Resume].
	Paused bool `json:"paused"`
	// ArchiveNearlyFull is true from [ArchiveWarning] archived jobs on.
	ArchiveNearlyFull bool `json:"archive_nearly_full"`
	// Lost is how many jobs have lost their data, by their [tasks.State], among the first
	// 1,000 of each: their keys in Redis were evicted, deleted or overwritten, and only their
	// ids are left. They are in the numbers above. It is nil if there is none.
	Lost map[string]int `json:"lost,omitempty"`
	// Unreadable are those of the queue's keys in Redis that should be lists of jobs and are
	// something else. Their jobs count as none.
	Unreadable []string `json:"unreadable,omitempty"`
}

// Outbox is how the table carpool.outbox stands, by which jobs go that are enqueued in a
// transaction.
type Outbox struct {
	// Waiting is how many rows are on their way to Redis.
	Waiting int `json:"waiting"`
	// OldestMS is the age of the oldest of them, in milliseconds.
	OldestMS int64 `json:"oldest_ms"`
	// UnknownKinds are the kinds of waiting rows that no instance knows that is up. It is nil
	// if all are known, and if that can't be said; see [Admin.KnownKinds].
	UnknownKinds []OutboxKind `json:"unknown_kinds,omitempty"`
	// Rejected is how many rows can't become jobs.
	Rejected int `json:"set_aside"`
	// Problems are the reasons for that, the five most frequent ones.
	Problems []OutboxProblem `json:"problems"`
}

// OutboxKind is a kind of job that rows of the outbox are of.
type OutboxKind struct {
	Kind string `json:"kind"`
	// Rows is how many rows are of it.
	Rows int `json:"rows"`
}

// OutboxProblem is a reason for which rows of the outbox can't become jobs.
type OutboxProblem struct {
	Problem string `json:"problem"`
	// Rows is how many rows have it.
	Rows int `json:"rows"`
}

const (
	// outboxTimeout bounds what the database may take.
	outboxTimeout = 10 * time.Second
	// problemsShown is how many of the outbox's problems are shown.
	problemsShown = 5
	// lostLookAt is how many jobs of each state of a queue are looked at for whether they
	// have their data.
	lostLookAt = 1000
)

// IsServed reports whether somebody pulls from a queue: an instance that is up, or another
// server of asynq's.
func (s *Status) IsServed(queue string) bool {
	return slices.Contains(s.ServedQueues, queue)
}

// Status reads how everything stands. If Redis can't be read, the status is nil and the
// error Redis'. If only the database can't be read, the error is the database's, and the
// status has all but the outbox.
func (a *Admin) Status(ctx context.Context) (*Status, error) {
	now := &Status{At: time.Now().UTC()}
	var err error
	if now.Instances, now.Missing, err = readInstances(ctx, a.rdb); err != nil {
		return nil, err
	}
	if now.Queues, err = a.queues(ctx); err != nil {
		return nil, err
	}
	if now.ServedQueues, err = a.servedQueues(now.Instances); err != nil {
		return nil, err
	}
	if a.db == nil {
		now.OutboxNote = "not read: " + ErrNoDatabase.Error()
		return now, nil
	}
	now.Outbox, err = a.outbox(ctx, now.Instances)
	if err = withoutTable(err); errors.Is(err, ErrNoOutbox) {
		now.OutboxNote = ErrNoOutbox.Error()
		return now, nil
	}
	if err != nil {
		now.OutboxNote = "it could not be read"
		return now, err
	}
	return now, nil
}

// ServedQueues returns the queues that somebody pulls from, sorted: an instance that is up,
// or another server of asynq's. The instances' own queues are among them. There is none
// while no worker is up. The error is Redis'.
func (a *Admin) ServedQueues(ctx context.Context) ([]string, error) {
	up, _, err := readInstances(ctx, a.rdb)
	if err != nil {
		return nil, err
	}
	return a.servedQueues(up)
}

func (a *Admin) servedQueues(up []Instance) ([]string, error) {
	served, err := asynqwire.ServedQueues(a.rdb)
	if err != nil {
		return nil, err
	}
	for _, i := range up {
		served = append(served, i.OwnQueue)
		served = slices.AppendSeq(served, maps.Keys(i.Queues))
	}
	slices.Sort(served)
	return slices.Compact(served), nil
}

// QueueNames returns the names of the queues that have had a job, sorted, without the
// instances' own, which hold nothing but the validations of their pools. The error is
// Redis'.
func (a *Admin) QueueNames(ctx context.Context) ([]string, error) {
	if err := ctx.Err(); err != nil {
		return nil, context.Cause(ctx)
	}
	names, err := a.inspector.Queues()
	if err != nil {
		return nil, fmt.Errorf("read the names of the queues: %w", err)
	}
	slices.Sort(names)
	return slices.DeleteFunc(names, instance.IsQueue), nil
}

func (a *Admin) queues(ctx context.Context) ([]Queue, error) {
	names, err := a.QueueNames(ctx)
	if err != nil {
		return nil, err
	}
	queues := []Queue{}
	for _, name := range names {
		q, err := a.queue(ctx, name)
		if err != nil {
			return nil, fmt.Errorf("read the queue %s: %w", name, err)
		}
		queues = append(queues, q)
	}
	return queues, nil
}

// queue reads how a queue stands. asynq's own Inspector fails at a queue of which a job is
// lost.
func (a *Admin) queue(ctx context.Context, name string) (Queue, error) {
	q, err := asynqwire.ReadQueue(ctx, a.rdb, name, lostLookAt)
	if err != nil {
		return Queue{}, err
	}
	n := func(state tasks.State) int { return q.Jobs[string(state)] }
	stands := Queue{
		Name: name, Pending: n(tasks.StatePending), Active: n(tasks.StateActive), Scheduled: n(tasks.StateScheduled),
		Retry: n(tasks.StateRetry), Archived: n(tasks.StateArchived), Completed: n(tasks.StateCompleted),
		Aggregating: n(tasks.StateAggregating),
		LatencyMS:   q.Latency.Milliseconds(), Paused: q.Paused,
		ArchiveNearlyFull: n(tasks.StateArchived) >= ArchiveWarning,
		Unreadable:        q.Unreadable,
	}
	for _, job := range q.Lost {
		if stands.Lost == nil {
			stands.Lost = make(map[string]int)
		}
		stands.Lost[job.State]++
	}
	return stands, nil
}

func (a *Admin) outbox(ctx context.Context, up []Instance) (*Outbox, error) {
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
	known, ok := knownKinds(up)
	if !ok {
		return &o, nil
	}
	unknown, err := outbox.Unknown(ctx, a.db, known, 0)
	if err != nil {
		return nil, err
	}
	for _, k := range unknown {
		o.UnknownKinds = append(o.UnknownKinds, OutboxKind{k.Kind, k.Rows})
	}
	return &o, nil
}
