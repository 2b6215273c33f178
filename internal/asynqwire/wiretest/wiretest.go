// Package wiretest puts jobs into any state, and damages them, for tests of what copes with
// that.
package wiretest

import (
	"context"
	"testing"
	"time"

	"github.com/hibiken/asynq"
	"github.com/redis/go-redis/v9"

	"github.com/carpool-go/carpool/internal/asynqwire"
)

// Put enqueues a job of a kind that no worker knows, with an id of its own, and moves it into
// a state, as asynq would: it is due in an hour, was archived just now, is retained for an
// hour, or has a lease that has been over for an hour.
func Put(t testing.TB, rdb redis.UniversalClient, queue, id, state string) {
	t.Helper()
	_, err := asynq.NewClientFromRedisClient(rdb).EnqueueContext(context.Background(),
		asynq.NewTask("wiretest", []byte("{}")), asynq.Queue(queue), asynq.TaskID(id))
	if err != nil {
		t.Fatal(err)
	}
	now := time.Now()
	_, err = rdb.TxPipelined(context.Background(), func(p redis.Pipeliner) error {
		ctx := context.Background()
		if state == "pending" {
			return nil
		}
		p.LRem(ctx, asynqwire.Pending(queue), 0, id)
		p.HSet(ctx, asynqwire.Task(queue, id), "state", state)
		switch at := float64(now.Add(time.Hour).Unix()); state {
		case "active":
			p.LPush(ctx, asynqwire.Active(queue), id)
			p.ZAdd(ctx, asynqwire.Leases(queue), redis.Z{Score: float64(now.Add(-time.Hour).Unix()), Member: id})
		case "scheduled":
			p.ZAdd(ctx, asynqwire.Scheduled(queue), redis.Z{Score: at, Member: id})
		case "retry":
			p.ZAdd(ctx, asynqwire.Retry(queue), redis.Z{Score: at, Member: id})
		case "archived":
			p.ZAdd(ctx, asynqwire.Archived(queue), redis.Z{Score: float64(now.Unix()), Member: id})
		case "completed":
			p.ZAdd(ctx, asynqwire.Completed(queue), redis.Z{Score: at, Member: id})
		default:
			t.Fatalf("there is no state %q", state)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

// Losses are the ways in which a job loses its data.
func Losses() []string { return []string{"deleted", "without message", "overwritten"} }

// Lose takes a job's data away, in one of the ways of [Losses], or has it "unreadable": with a
// message that is none.
func Lose(t testing.TB, rdb redis.UniversalClient, queue, id, how string) {
	t.Helper()
	ctx, key := context.Background(), asynqwire.Task(queue, id)
	var err error
	switch how {
	case "deleted":
		err = rdb.Del(ctx, key).Err()
	case "without message":
		err = rdb.HDel(ctx, key, "msg").Err()
	case "overwritten":
		err = rdb.Set(ctx, key, "mine", 0).Err()
	case "unreadable":
		err = rdb.HSet(ctx, key, "msg", "\xff\xff").Err()
	default:
		t.Fatalf("there is no loss %q", how)
	}
	if err != nil {
		t.Fatal(err)
	}
}
