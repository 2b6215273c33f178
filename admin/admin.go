// Package admin does what an operator does with jobs and queues: look at how everything
// stands, put back or delete jobs that were given up, cancel one, pause a queue. It is for
// tools that people use, such as a worker's command line and its monitor; they begin with
// [New].
//
// Application logic has no place here, because the calls read whole queues, what they
// answer may be over when it arrives, and what they change is for somebody who knows why.
// A service that enqueues jobs uses [tasks.Client].
package admin

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/hibiken/asynq"
	"github.com/redis/go-redis/v9"

	"github.com/carpool-go/carpool/dbpool"
	"github.com/carpool-go/carpool/internal/asynqwire"
	"github.com/carpool-go/carpool/internal/outbox"
	"github.com/carpool-go/carpool/internal/unique"
	"github.com/carpool-go/carpool/tasks"
)

// Admin works on the jobs and queues of one Redis and one database. It is safe for
// concurrent use.
type Admin struct {
	rdb       redis.UniversalClient
	db        *dbpool.Pool // nil: there is none
	inspector *asynq.Inspector
	client    *tasks.Client
	locks     *unique.Locks
}

// New returns an Admin of the Redis that has the queues ([tasks.OpenRedis] makes rdb) and
// of the database that has the outbox. With a nil db the outbox is left out: its state
// isn't read, and a job that is still there can't be cancelled. A nil rdb does for who works
// on the outbox only. The caller closes both.
func New(rdb redis.UniversalClient, db *dbpool.Pool) *Admin {
	return &Admin{rdb, db, asynq.NewInspectorFromRedisClient(rdb), tasks.NewClient(rdb), unique.NewLocks(rdb)}
}

// ErrNoDatabase is wrapped by the error of [Admin.Cancel] for a job that is not in Redis,
// but may be in the outbox of a database that [New] was not given.
var ErrNoDatabase = errors.New("there is no database to look in")

// Cancel cancels a job as [tasks.Client.Cancel] does, and removes one that is still in the
// outbox. The errors are that method's, or the database's, or wrap [ErrNoDatabase].
func (a *Admin) Cancel(ctx context.Context, id string) error {
	err := a.client.Cancel(ctx, id)
	switch {
	case !errors.Is(err, tasks.ErrNoSuchJob) || !outbox.IsID(id):
		return err
	case a.db == nil:
		return fmt.Errorf("%w in Redis; the outbox was not looked at: %w", err, ErrNoDatabase)
	}
	removed, outboxErr := outbox.Remove(ctx, a.db, id)
	if outboxErr != nil {
		return fmt.Errorf("%w in Redis; look for it in the outbox: %w", err, outboxErr)
	}
	if removed {
		return nil
	}
	return a.client.Cancel(ctx, id) // a relay may have moved it meanwhile
}

// ErrNoSuchQueue is wrapped by the error for a queue that has never had a job, and that
// nobody pulls from.
var ErrNoSuchQueue = errors.New("no queue of this name has had a job yet")

// Pause keeps workers from fetching jobs of a queue until [Admin.Resume]. Jobs that run go
// on, and jobs can be enqueued. A queue that is paused already stays so, since when it
// was. The error wraps [ErrNoSuchQueue] or is Redis'.
func (a *Admin) Pause(ctx context.Context, queue string) error {
	err := a.requireQueue(ctx, queue)
	if err == nil {
		err = a.rdb.SetArgs(ctx, asynqwire.Paused(queue), time.Now().Unix(), redis.SetArgs{Mode: "NX"}).Err()
	}
	if err != nil && !errors.Is(err, redis.Nil) {
		return fmt.Errorf("admin: pause queue %q: %w", queue, err)
	}
	return nil
}

// Resume lets workers fetch jobs of a queue again, and does nothing to one that isn't
// paused. The error wraps [ErrNoSuchQueue] or is Redis'.
func (a *Admin) Resume(ctx context.Context, queue string) error {
	err := a.requireQueue(ctx, queue)
	if err == nil {
		err = a.rdb.Del(ctx, asynqwire.Paused(queue)).Err()
	}
	if err != nil {
		return fmt.Errorf("admin: resume queue %q: %w", queue, err)
	}
	return nil
}

func (a *Admin) requireQueue(ctx context.Context, queue string) error {
	known, err := a.rdb.SIsMember(ctx, asynqwire.Queues, queue).Result()
	if err != nil || known {
		return err
	}
	served, err := a.ServedQueues(ctx)
	if err == nil && !slices.Contains(served, queue) {
		return ErrNoSuchQueue
	}
	return err
}
