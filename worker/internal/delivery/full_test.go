package delivery

import (
	"context"
	"errors"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hibiken/asynq"
	"github.com/redis/go-redis/v9"

	"github.com/carpool-go/carpool/internal/asynqwire"
	"github.com/carpool-go/carpool/internal/servers"
	"github.com/carpool-go/carpool/tasks"
	"github.com/carpool-go/carpool/worker/internal/workertest"
)

// setupOwnRedis is setup with a Redis server of its own, of which a test may read the
// figures and change the settings.
func setupOwnRedis(t *testing.T) *bundle {
	t.Helper()
	b := setup(t)
	server, err := servers.StartRedis(t.Context(), servers.RedisConfig{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := server.Stop(); err != nil {
			t.Error(err)
		}
	})
	b.RedisURL = server.URL()
	rdb := b.Redis(t)
	b.Client, b.Inspector = tasks.NewClient(rdb), asynq.NewInspectorFromRedisClient(rdb)
	return b
}

// fillUp has a Redis take nothing more.
func fillUp(t *testing.T, rdb redis.UniversalClient) {
	t.Helper()
	if err := rdb.ConfigSet(t.Context(), "maxmemory", "1").Err(); err != nil {
		t.Fatal(err)
	}
	if err := rdb.Set(t.Context(), "x", "x", 0).Err(); err == nil || !strings.HasPrefix(err.Error(), "OOM ") {
		t.Fatalf("Redis takes a key although it is full: %v", err)
	}
}

func TestDelivery_FullRedisCanBeDrained(t *testing.T) {
	t.Parallel()
	b := setupOwnRedis(t)
	rdb := b.Redis(t)
	enqueue := func(word string) *tasks.Info {
		info, err := b.Client.Enqueue(t.Context(), probe{word}, nil)
		if err != nil {
			t.Fatal(err)
		}
		return info
	}
	long := enqueue("long")
	var done, bad []*tasks.Info
	for range 10 {
		done = append(done, enqueue("good"), enqueue("fails first"), enqueue("snoozes first"))
		bad = append(bad, enqueue("bad"))
	}
	left, err := b.Client.Enqueue(t.Context(), forgotten{"x"}, nil)
	if err != nil {
		t.Fatal(err)
	}
	fillUp(t, rdb)
	var forgot atomic.Bool
	f := b.execute(t, b, func(s *tasks.Set) {
		tasks.Register(s, func(_ context.Context, job *tasks.Job, p probe) (string, error) {
			seen := rdb.HExists(t.Context(), asynqwire.Task("default", job.ID), "seen").Val()
			switch {
			case p.Word == "long":
				before := rdb.ZScore(t.Context(), asynqwire.Leases("default"), job.ID).Val()
				workertest.Eventually(t, "its lease is extended", func() bool {
					return rdb.ZScore(t.Context(), asynqwire.Leases("default"), job.ID).Val() > before
				})
			case p.Word == "bad":
				return "", tasks.Permanent(errors.New("never"))
			case p.Word == "fails first" && job.Attempt == 1:
				return "", tasks.RetryAfter(10*time.Millisecond, errors.New("not today"))
			case p.Word == "snoozes first" && !seen:
				// A full Redis takes writes of a script that has removed something.
				if err := rdb.Eval(t.Context(), `redis.call("DEL", KEYS[2]) redis.call("HSET", KEYS[1], "seen", "1") return 1`,
					[]string{asynqwire.Task("default", job.ID), asynqwire.Task("default", "nothing")}).Err(); err != nil {
					t.Error(err)
				}
				return "", tasks.Snooze(10 * time.Millisecond)
			}
			return p.Word, nil
		})
		tasks.Register(s, func(context.Context, *tasks.Job, forgotten) (string, error) { forgot.Store(true); return "", nil })
	})
	for _, info := range append(done, long) {
		if result, err := f.Wait(t, info); err != nil || len(result) == 0 {
			t.Errorf("result %s, error %v", result, err)
		}
	}
	for _, info := range bad {
		if _, err := f.Wait(t, info); !errors.Is(err, tasks.ErrJobFailed) {
			t.Errorf("error %v, want that it has failed", err)
		}
	}
	workertest.Eventually(t, "all is told", func() bool { return f.servers.Held() == 0 })
	if !forgot.Load() || rdb.Exists(t.Context(), asynqwire.Task("default", left.ID)).Val() != 0 {
		t.Error("the job that leaves nothing behind has left something")
	}
	if n := rdb.ZCard(t.Context(), asynqwire.Completed("default")).Val(); n != 31 {
		t.Errorf("%d jobs are completed, want 31", n)
	}
	if _, err := b.Client.Enqueue(t.Context(), probe{"x"}, nil); err == nil {
		t.Error("Redis was full no more")
	}
}

// What each script writes first is something that a full Redis takes.
func TestScripts_AFullRedisTakesThemAll(t *testing.T) {
	t.Parallel()
	b := setupOwnRedis(t)
	rdb := b.Redis(t)
	ids := fill(t, rdb, "default", "probe", 9)
	scheduled := fill(t, rdb, "other", "probe", 2)
	rdb.Del(t.Context(), asynqwire.Pending("other"))
	for i, set := range []string{asynqwire.Scheduled("other"), asynqwire.Retry("other")} {
		rdb.ZAdd(t.Context(), set, redis.Z{Score: 1, Member: scheduled[i]})
	}
	fillUp(t, rdb)

	fetch := newFetch(asynqwire.Share{Queue: "default", Jobs: 9})
	answer := mustFetch(t, rdb, fetch)
	fetch.Again = true
	if again := mustFetch(t, rdb, fetch); len(answer.Jobs) != 9 || len(again.Jobs) != 9 {
		t.Fatalf("%d jobs were fetched, and %d again", len(answer.Jobs), len(again.Jobs))
	}
	leases := make([]asynqwire.Lease, len(ids))
	for i, id := range ids {
		leases[i] = asynqwire.Lease{ID: id, Token: fetch.Token}
	}
	if extended, lost, err := asynqwire.ExtendLeases(t.Context(), rdb, map[string][]asynqwire.Lease{"default": leases}); err != nil ||
		len(extended["default"]) != 9 || len(lost) > 0 {
		t.Errorf("%v are extended, %v lost, error %v", extended, lost, err)
	}
	msg, err := asynqwire.ParseMessage([]byte(answer.Jobs[0].Data))
	if err != nil {
		t.Fatal(err)
	}
	retained := msg
	retained.Retention = time.Hour
	var ends []asynqwire.Ending
	for i, end := range []asynqwire.End{
		asynqwire.Done{Message: msg},
		asynqwire.Done{Message: retained, Result: []byte(`"x"`)},
		asynqwire.Archive{},
		asynqwire.Archive{Message: &msg},
		asynqwire.RetryAt{Message: msg, Due: time.Now(), Failed: true},
		asynqwire.RetryAt{Message: msg, Due: time.Now()},
		asynqwire.PushBack{},
		asynqwire.PushBack{Last: true, Undelivered: true},
	} {
		ends = append(ends, asynqwire.Ending{Queue: "default", Lease: leases[i], End: end})
	}
	for i, answer := range asynqwire.SendEnds(t.Context(), rdb, ends) {
		if answer.Err != nil || !answer.Held {
			t.Errorf("%#v: %+v", ends[i].End, answer)
		}
	}
	lease := rdb.ZScore(t.Context(), asynqwire.Leases("default"), ids[8]).Val()
	if moved, err := asynqwire.GiveBack(t.Context(), rdb, "default", ids[8], asynqwire.Score(time.UnixMicro(int64(lease*1e6+0.5))), msg, asynqwire.Unended{}); err != nil || !moved {
		t.Errorf("given back: %t, error %v", moved, err)
	}
	if _, err := asynqwire.MoveDue(t.Context(), rdb, []string{"other", "default"}); err != nil {
		t.Error(err)
	}
	for queue, want := range map[string]int64{"other": 2, "default": 5} {
		if n := rdb.LLen(t.Context(), asynqwire.Pending(queue)).Val(); n != want {
			t.Errorf("%d jobs are pending in %s, want %d", n, queue, want)
		}
	}
}
