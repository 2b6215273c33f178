package asynqwire_test

import (
	"context"
	"fmt"
	"testing"
	"time"

	"github.com/hibiken/asynq"
	"github.com/redis/go-redis/v9"

	"github.com/carpool-go/carpool/internal/asynqwire"
	"github.com/carpool-go/carpool/internal/asynqwire/wiretest"
)

func TestArchiveLimit_IsWhatAsynqKeepsWhoeverArchives(t *testing.T) {
	t.Parallel()
	for how, archive := range map[string]func(*testing.T, redis.UniversalClient){
		"by hand": func(t *testing.T, rdb redis.UniversalClient) {
			if err := asynq.NewInspectorFromRedisClient(rdb).ArchiveTask("q", "newest"); err != nil {
				t.Fatal(err)
			}
		},
		"all by hand": func(t *testing.T, rdb redis.UniversalClient) {
			if _, err := asynq.NewInspectorFromRedisClient(rdb).ArchiveAllPendingTasks("q"); err != nil {
				t.Fatal(err)
			}
		},
		"a server": func(t *testing.T, rdb redis.UniversalClient) {
			server := asynq.NewServerFromRedisClient(rdb, asynq.Config{Queues: map[string]int{"q": 1}, LogLevel: asynq.FatalLevel})
			if err := server.Start(asynq.HandlerFunc(func(context.Context, *asynq.Task) error { return asynq.SkipRetry })); err != nil {
				t.Fatal(err)
			}
			defer server.Shutdown()
			for state, giveUp := "", time.Now().Add(time.Minute); state != "archived"; time.Sleep(10 * time.Millisecond) {
				if time.Now().After(giveUp) {
					t.Fatalf("the job is %s", state)
				}
				var err error
				if state, err = rdb.HGet(t.Context(), asynqwire.Task("q", "newest"), "state").Result(); err != nil {
					t.Fatal(err)
				}
			}
		},
	} {
		t.Run(how, func(t *testing.T) {
			t.Parallel()
			rdb := openRedis(t)
			old := make([]redis.Z, asynqwire.ArchiveLimit)
			for i := range old {
				old[i] = redis.Z{Score: float64(time.Now().Add(-time.Hour).Unix() + int64(i)/10), Member: fmt.Sprintf("old-%04d", i)}
			}
			if err := rdb.ZAdd(t.Context(), asynqwire.Archived("q"), old...).Err(); err != nil {
				t.Fatal(err)
			}
			wiretest.Put(t, rdb, "q", "newest", "pending")
			archive(t, rdb)
			ids, err := rdb.ZRange(t.Context(), asynqwire.Archived("q"), 0, -1).Result()
			if err != nil {
				t.Fatal(err)
			}
			if n := len(ids); n != asynqwire.ArchiveLimit || ids[0] != "old-0001" || ids[n-1] != "newest" {
				t.Errorf("it keeps %d jobs, from %s to %s; want %d, without the oldest", n, ids[0], ids[n-1], asynqwire.ArchiveLimit)
			}
		})
	}
}
