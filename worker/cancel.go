package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/hibiken/asynq"
	"github.com/redis/go-redis/v9"

	"github.com/carpool-go/carpool/internal/asynqkey"
	"github.com/carpool-go/carpool/internal/outbox"
	"github.com/carpool-go/carpool/tasks"
)

type cancelCmd struct {
	ID string `arg:"" help:"The job's id."`

	redisSettings    `embed:""`
	databaseSettings `embed:""`
}

// Run is `worker cancel`. A job that is still in the outbox, for which
// DATABASE_URL must be set, is removed there.
func (c *cancelCmd) Run() error {
	return c.withArchive(func(ctx context.Context, a *archive) error {
		if err := c.cancel(ctx, tasks.NewClient(a.rdb)); err != nil {
			return err
		}
		fmt.Println(c.ID, "cancelled")
		return nil
	})
}

func (c *cancelCmd) cancel(ctx context.Context, client *tasks.Client) error {
	err := client.Cancel(ctx, c.ID)
	switch {
	case !errors.Is(err, tasks.ErrNoSuchJob) || !outbox.IsID(c.ID):
		return err
	case c.DatabaseURL == "":
		return fmt.Errorf("%w in Redis; the outbox was not looked at, as DATABASE_URL is not set", err)
	}
	removed, outboxErr := c.removeFromOutbox(ctx)
	if outboxErr != nil {
		return fmt.Errorf("%w in Redis; look for it in the outbox: %w", err, outboxErr)
	}
	if removed {
		return nil
	}
	return client.Cancel(ctx, c.ID) // a relay may have moved it meanwhile
}

func (c *cancelCmd) removeFromOutbox(ctx context.Context) (removed bool, err error) {
	var f faults
	url := f.databaseURL(c.DatabaseURL)
	if err := f.err(); err != nil {
		return false, err
	}
	db, err := openOne(url)
	if err != nil {
		return false, err
	}
	defer db.Close()
	return outbox.Remove(ctx, db, c.ID)
}

// putAway takes a job that was cancelled while it ran from those to be retried,
// where asynq puts it whatever the handler returns: into the archive, or where jobs
// go that are done if it is nevertheless. run is nil if it had not begun.
func (f *frame) putAway(queue, id string, run *jobRun) {
	began := time.Now()
	for time.Since(began) < 2*time.Second || time.Since(began) < time.Minute && f.ending.Err() == nil {
		time.Sleep(20 * time.Millisecond)
		info, err := f.inspector.GetTaskInfo(queue, id)
		switch {
		case errors.Is(err, asynq.ErrTaskNotFound):
			return
		case err != nil, info.State == asynq.TaskStateActive:
			continue // not yet
		case info.State != asynq.TaskStateRetry:
			return // asynq archives it by itself if it has no retry left
		case run == nil || !run.done:
			err = f.inspector.ArchiveTask(queue, id)
		case info.Retention == 0:
			err = f.inspector.DeleteTask(queue, id)
		default:
			err = complete(context.Background(), f.rdb, info, run.result)
		}
		if err == nil {
			return
		}
	}
	f.log.Warn("a cancelled job could not be put away; it stays among those to be retried, in a hundred years", slog.Group("job", "id", id, "queue", queue))
}

// completeScript moves a job from retry to completed.
var completeScript = redis.NewScript(`
if redis.call("ZREM", KEYS[1], ARGV[1]) == 0 then return 0 end
redis.call("HSET", KEYS[3], "msg", ARGV[2], "state", "completed", "result", ARGV[4])
redis.call("ZADD", KEYS[2], ARGV[3], ARGV[1])
return 1`)

// complete does to a job that is to be retried what asynq does to one that is done
// and retained.
func complete(ctx context.Context, rdb redis.UniversalClient, info *asynq.TaskInfo, result []byte) error {
	key := asynqkey.Task(info.Queue, info.ID)
	data, err := rdb.HGet(ctx, key, "msg").Bytes()
	if err != nil {
		return err
	}
	msg, err := parseMessage(data)
	if err != nil {
		return err
	}
	now := time.Now()
	msg.lastErr, msg.lastFailedAt, msg.completedAt = "", 0, now.Unix()
	keys := []string{asynqkey.List(info.Queue, "retry"), asynqkey.List(info.Queue, "completed"), key}
	return completeScript.Run(ctx, rdb, keys, info.ID, msg.encode(), now.Add(info.Retention).Unix(), result).Err()
}
