package main

import (
	"context"
	"log/slog"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/hibiken/asynq"
	"github.com/redis/go-redis/v9"

	"github.com/carpool-go/carpool/internal/asynqkey"
	"github.com/carpool-go/carpool/tasks"
)

// loses does to Redis what a fetch does whose answer is lost.
func loses(t *testing.T, rdb redis.UniversalClient, info *asynq.TaskInfo) {
	t.Helper()
	losesWith(t, rdb, info, time.Now().Add(30*time.Second))
}

// losesWith is loses with a lease until then; the zero time for none.
func losesWith(t *testing.T, rdb redis.UniversalClient, info *asynq.TaskInfo, until time.Time) {
	t.Helper()
	eventually(t, "the job can be fetched", func() bool {
		return rdb.LRem(t.Context(), asynqkey.List(info.Queue, "pending"), 1, info.ID).Val() == 1
	})
	pipe := rdb.TxPipeline()
	pipe.LPush(t.Context(), asynqkey.List(info.Queue, "active"), info.ID)
	if !until.IsZero() {
		pipe.ZAdd(t.Context(), asynqkey.List(info.Queue, "lease"), redis.Z{Score: float64(until.Unix()), Member: info.ID})
	}
	pipe.HSet(t.Context(), asynqkey.Task(info.Queue, info.ID), "state", "active")
	pipe.HDel(t.Context(), asynqkey.Task(info.Queue, info.ID), "pending_since")
	if _, err := pipe.Exec(t.Context()); err != nil {
		t.Fatal(err)
	}
}

// dies does to Redis what a worker does that fetches the job and dies, so that it
// counts: it had its free passes.
func dies(t *testing.T, rdb redis.UniversalClient, info *asynq.TaskInfo) {
	t.Helper()
	if err := rdb.HSet(t.Context(), asynqkey.Task(info.Queue, info.ID), freeField, 1000).Err(); err != nil {
		t.Fatal(err)
	}
	loses(t, rdb, info)
}

func TestRescue_JobOfADeadWorkerIsRunAgainAndItsTryIsCounted(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		end     func(t *testing.T, rdb redis.UniversalClient, info *asynq.TaskInfo)
		attempt float64
	}{
		"its lease was extended": {func(t *testing.T, rdb redis.UniversalClient, info *asynq.TaskInfo) {
			loses(t, rdb, info)
			time.Sleep(600 * time.Millisecond) // it has been looked at
			rdb.ZIncrBy(t.Context(), asynqkey.List("default", "lease"), 5, info.ID)
		}, 2},
		"its fetch was lost before":             {dies, 2},
		"it has not begun, for all one can see": {loses, 1},
		"nobody was there for a minute": {func(t *testing.T, rdb redis.UniversalClient, info *asynq.TaskInfo) {
			losesWith(t, rdb, info, time.Now().Add(-70*time.Second))
		}, 1},
		"it has no lease": {func(t *testing.T, rdb redis.UniversalClient, info *asynq.TaskInfo) {
			losesWith(t, rdb, info, time.Time{})
		}, 1},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := setup(t)
			rdb := b.redis(t)
			info, err := b.client.Enqueue(t.Context(), probe{"x"}, nil)
			if err != nil {
				t.Fatal(err)
			}
			r := startRescue(rdb, []string{"default"}, time.Second, discard())
			defer r.stop()
			c.end(t, rdb, info)
			f := b.runFrame(t, b, func(s *tasks.Set) {
				tasks.Register(s, func(_ context.Context, _ *tasks.Job, p probe) (string, error) { return p.Word, nil })
			})
			if result, err := f.wait(t, info); string(result) != `"x"` || err != nil {
				t.Errorf("result %s, error %v", result, err)
			}
			if job := f.records(t, 1)[0]["job"].(map[string]any); job["attempt"] != c.attempt {
				t.Errorf("the record is %v; want attempt %v", job, c.attempt)
			}
		})
	}
}

// A job may be put off between two deaths of its workers.
func TestRescue_AJobIsGivenBackForNothingOnceForEachTry(t *testing.T) {
	t.Parallel()
	b := setup(t)
	rdb := b.redis(t)
	r := startRescue(rdb, []string{"default"}, time.Second, discard())
	defer r.stop()
	info, err := b.client.Enqueue(t.Context(), probe{"x"}, nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []int{0, 1, 1, 2} {
		loses(t, rdb, info)
		var got *asynq.TaskInfo
		eventually(t, "it is given back", func() bool {
			got, err = b.inspector.GetTaskInfo("default", info.ID)
			return err == nil && got.State == asynq.TaskStateRetry
		})
		if got.Retried != want {
			t.Errorf("%d tries are used up, want %d", got.Retried, want)
		}
		key := asynqkey.Task("default", info.ID)
		msg, err := parseMessage([]byte(rdb.HGet(t.Context(), key, "msg").Val()))
		if err != nil {
			t.Fatal(err)
		}
		msg.lastErr = "snoozed for 1s" // as if it had been delivered, and put off
		rdb.HSet(t.Context(), key, "msg", msg.encode())
		if err := b.inspector.RunTask("default", info.ID); err != nil {
			t.Fatal(err)
		}
	}
}

func TestRescue_GoesOnBehindAJobThatCanNotBeRead(t *testing.T) {
	t.Parallel()
	b := setup(t)
	rdb := b.redis(t)
	var jobs []*asynq.TaskInfo
	for _, queue := range []string{"a", "b"} {
		info, err := b.client.Enqueue(t.Context(), probe{"x"}, &tasks.EnqueueOptions{Queue: queue})
		if err != nil {
			t.Fatal(err)
		}
		loses(t, rdb, info)
		jobs = append(jobs, info)
	}
	rdb.HSet(t.Context(), asynqkey.Task("a", jobs[0].ID), "msg", "\xff\xff")
	log := newLogBuffer()
	r := startRescue(rdb, []string{"a", "b"}, time.Second, slog.New(slog.NewJSONHandler(log, nil)))
	defer r.stop()
	eventually(t, "the other is given back", func() bool {
		got, err := b.inspector.GetTaskInfo("b", jobs[1].ID)
		return err == nil && got.State == asynq.TaskStateRetry
	})
	log.wait(t, "a job can't be given back")
}

func TestRescue_AnOutageOfRedisDoesNotCountAndAHiccupCostsLittle(t *testing.T) {
	t.Parallel()
	b := setup(t)
	at, _, proxy := b.behindProxies(t)
	direct := b.redis(t)
	info, err := b.client.Enqueue(t.Context(), probe{"x"}, nil)
	if err != nil {
		t.Fatal(err)
	}
	dies(t, direct, info)
	rdb := at.redis(t)
	r := startRescue(rdb, []string{"default"}, 4*time.Second, discard())
	defer r.stop()
	state := func() asynq.TaskState {
		got, err := b.inspector.GetTaskInfo("default", info.ID)
		if err != nil {
			t.Fatal(err)
		}
		return got.State
	}
	time.Sleep(2 * time.Second)
	proxy.Refuse()
	proxy.Reset()
	time.Sleep(8 * time.Second) // far longer than it takes
	proxy.Heal()
	if s := state(); s != asynq.TaskStateActive {
		t.Errorf("the job is %s when Redis comes back; want that the outage did not count", s)
	}
	for range 3 { // never as long undisturbed as it takes
		time.Sleep(1500 * time.Millisecond)
		proxy.Reset()
	}
	eventually(t, "it is given back", func() bool { return state() == asynq.TaskStateRetry })
}

func TestRescue_JobOfALivingWorkerIsLeftAlone(t *testing.T) {
	t.Parallel()
	b := setup(t)
	var runs atomic.Int32
	f := b.runFrame(t, b, func(s *tasks.Set) {
		tasks.Register(s, func(context.Context, *tasks.Job, probe) (string, error) {
			runs.Add(1)
			time.Sleep(16 * time.Second) // asynq extends the lease every 5 s
			return "", nil
		})
	})
	r := startRescue(b.redis(t), []string{"default"}, 8*time.Second, discard())
	defer r.stop()
	if _, err := f.wait(t, f.enqueue(t, "x", nil)); err != nil {
		t.Error(err)
	}
	if runs.Load() != 1 {
		t.Errorf("it ran %d times", runs.Load())
	}
}

func TestRescue_SaysThatAnArchiveIsNearlyFull(t *testing.T) {
	t.Parallel()
	b := setup(t)
	rdb := b.redis(t)
	var jobs []redis.Z
	for i := range archiveWarning {
		jobs = append(jobs, redis.Z{Score: float64(i), Member: i})
	}
	if err := rdb.ZAdd(t.Context(), asynqkey.List("default", "archived"), jobs...).Err(); err != nil {
		t.Fatal(err)
	}
	log := newLogBuffer()
	r := startRescue(rdb, []string{"default"}, time.Second, slog.New(slog.NewJSONHandler(log, nil)))
	defer r.stop()
	log.wait(t, "the archive of a queue is nearly full")
}

func TestFrame_JobThatKillsItsWorkersEndsInTheArchive(t *testing.T) {
	t.Parallel()
	b := setup(t)
	rdb := b.redis(t)
	r := startRescue(rdb, []string{"default"}, time.Second, discard())
	defer r.stop()
	info, err := b.client.Enqueue(t.Context(), probe{"poison"}, &tasks.EnqueueOptions{MaxRetry: 1})
	if err != nil {
		t.Fatal(err)
	}
	for range 2 {
		dies(t, rdb, info)
		eventually(t, "it is given back", func() bool {
			got, err := b.inspector.GetTaskInfo("default", info.ID)
			if err != nil || got.State != asynq.TaskStateRetry {
				return false
			}
			return b.inspector.RunTask("default", info.ID) == nil // nobody else moves what is due
		})
	}
	var runs atomic.Int32
	f := b.runFrame(t, b, func(s *tasks.Set) {
		tasks.Register(s, func(context.Context, *tasks.Job, probe) (string, error) {
			runs.Add(1)
			return "cured", nil
		})
	})
	_, err = f.wait(t, info)
	if want := "given up: its worker died, or lost its lease, while it ran (try 2)"; err == nil || !strings.HasSuffix(err.Error(), want) {
		t.Errorf("error %v, want one that ends with %q", err, want)
	}
	if runs.Load() != 0 {
		t.Error("it was run once more")
	}

	// Whoever puts it back has it run.
	if err := b.inspector.RunTask("default", info.ID); err != nil {
		t.Fatal(err)
	}
	if result, err := f.wait(t, info); string(result) != `"cured"` || err != nil {
		t.Errorf("put back: result %s, error %v", result, err)
	}
}

func TestMessage_ChangesWhatItShouldAndNothingElse(t *testing.T) {
	t.Parallel()
	b := setup(t)
	rdb := b.redis(t)
	before, err := b.client.Enqueue(t.Context(), probe{"x"}, &tasks.EnqueueOptions{UniqueKey: "k", Timeout: time.Minute, Retention: time.Hour})
	if err != nil {
		t.Fatal(err)
	}
	key := asynqkey.Task(before.Queue, before.ID)
	data, err := rdb.HGet(t.Context(), key, "msg").Bytes()
	if err != nil {
		t.Fatal(err)
	}
	before, err = b.inspector.GetTaskInfo(before.Queue, before.ID)
	if err != nil {
		t.Fatal(err)
	}
	for range 2 {
		msg, err := parseMessage(data)
		if err != nil {
			t.Fatal(err)
		}
		msg.retried++
		msg.lastErr, msg.lastFailedAt, msg.completedAt = "no", 1_700_000_000, 1_700_000_001
		data = msg.encode()
	}
	rdb.HSet(t.Context(), key, "msg", data)
	after, err := b.inspector.GetTaskInfo(before.Queue, before.ID)
	if err != nil {
		t.Fatal(err)
	}
	want := *before
	want.Retried, want.LastErr, want.LastFailedAt, want.CompletedAt = 2, "no", time.Unix(1_700_000_000, 0), time.Unix(1_700_000_001, 0)
	if diff := cmp.Diff(&want, after, cmpopts.IgnoreFields(asynq.TaskInfo{}, "NextProcessAt")); diff != "" {
		t.Errorf("(-want +got)\n%s", diff)
	}
	if _, err := parseMessage([]byte{0xff}); err == nil {
		t.Error("nonsense is parsed")
	}
}

func FuzzParseMessage(f *testing.F) {
	f.Add([]byte("\x0a\x05probe\x12\x02{}\x30\x03\x3a\x02no\x58\x01"))
	f.Fuzz(func(t *testing.T, data []byte) {
		msg, err := parseMessage(data)
		if err != nil {
			return
		}
		again, err := parseMessage(msg.encode())
		if diff := cmp.Diff(msg, again, cmp.AllowUnexported(message{}), cmpopts.EquateEmpty()); diff != "" || err != nil {
			t.Errorf("it is read back as another: %v (-want +got)\n%s", err, diff)
		}
	})
}
