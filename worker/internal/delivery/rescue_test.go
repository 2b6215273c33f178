package delivery

import (
	"context"
	"log/slog"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hibiken/asynq"
	"github.com/redis/go-redis/v9"

	"github.com/carpool-go/carpool/internal/asynqwire"
	"github.com/carpool-go/carpool/tasks"
	"github.com/carpool-go/carpool/worker/internal/workertest"
)

// startRescue starts a rescue of leases that have stayed the same for so long.
func startRescue(t *testing.T, rdb redis.UniversalClient, queues []string, still time.Duration, log *slog.Logger) *Rescue {
	t.Helper()
	r := newRescue(rdb, queues, still, log)
	if err := r.Start(); err != nil {
		t.Fatal(err)
	}
	return r
}

// loses does to Redis what a fetch does whose answer is lost.
func loses(t *testing.T, rdb redis.UniversalClient, info *tasks.Info) {
	t.Helper()
	losesWith(t, rdb, info, time.Now().Add(30*time.Second))
}

// losesWith is loses with a lease until then; the zero time for none.
func losesWith(t *testing.T, rdb redis.UniversalClient, info *tasks.Info, until time.Time) {
	t.Helper()
	workertest.Eventually(t, "the job can be fetched", func() bool {
		return rdb.LRem(t.Context(), asynqwire.Pending(info.Queue), 1, info.ID).Val() == 1
	})
	pipe := rdb.TxPipeline()
	pipe.LPush(t.Context(), asynqwire.Active(info.Queue), info.ID)
	if !until.IsZero() {
		pipe.ZAdd(t.Context(), asynqwire.Leases(info.Queue), redis.Z{Score: float64(until.Unix()), Member: info.ID})
	}
	pipe.HSet(t.Context(), asynqwire.Task(info.Queue, info.ID), "state", "active")
	pipe.HDel(t.Context(), asynqwire.Task(info.Queue, info.ID), "pending_since")
	if _, err := pipe.Exec(t.Context()); err != nil {
		t.Fatal(err)
	}
}

// dies does to Redis what a worker does that fetches the job and dies, so that it
// counts: it had its free passes.
func dies(t *testing.T, rdb redis.UniversalClient, info *tasks.Info) {
	t.Helper()
	if err := rdb.HSet(t.Context(), asynqwire.Task(info.Queue, info.ID), asynqwire.FreeRedeliveries, 1000).Err(); err != nil {
		t.Fatal(err)
	}
	loses(t, rdb, info)
}

func TestRescue_JobOfADeadWorkerIsRunAgainAndItsTryIsCounted(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		end     func(t *testing.T, rdb redis.UniversalClient, info *tasks.Info)
		attempt float64
	}{
		"its lease was extended": {func(t *testing.T, rdb redis.UniversalClient, info *tasks.Info) {
			loses(t, rdb, info)
			time.Sleep(600 * time.Millisecond) // it has been looked at
			rdb.ZIncrBy(t.Context(), asynqwire.Leases("default"), 5, info.ID)
		}, 2},
		"its fetch was lost before":             {dies, 2},
		"it has not begun, for all one can see": {loses, 1},
		"nobody was there for a minute": {func(t *testing.T, rdb redis.UniversalClient, info *tasks.Info) {
			losesWith(t, rdb, info, time.Now().Add(-70*time.Second))
		}, 1},
		"it has no lease": {func(t *testing.T, rdb redis.UniversalClient, info *tasks.Info) {
			losesWith(t, rdb, info, time.Time{})
		}, 1},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := setup(t)
			rdb := b.Redis(t)
			info, err := b.Client.Enqueue(t.Context(), probe{"x"}, nil)
			if err != nil {
				t.Fatal(err)
			}
			r := startRescue(t, rdb, []string{"default"}, time.Second, workertest.Discard())
			defer r.Stop()
			c.end(t, rdb, info)
			f := b.execute(t, b, func(s *tasks.Set) {
				tasks.Register(s, func(_ context.Context, _ *tasks.Job, p probe) (string, error) { return p.Word, nil })
			})
			if result, err := f.Wait(t, info); string(result) != `"x"` || err != nil {
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
	rdb := b.Redis(t)
	r := startRescue(t, rdb, []string{"default"}, time.Second, workertest.Discard())
	defer r.Stop()
	info, err := b.Client.Enqueue(t.Context(), probe{"x"}, nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []int{0, 1, 1, 2} {
		loses(t, rdb, info)
		var got *asynq.TaskInfo
		workertest.Eventually(t, "it is given back", func() bool {
			got, err = b.Inspector.GetTaskInfo("default", info.ID)
			return err == nil && got.State == asynq.TaskStateRetry
		})
		if got.Retried != want {
			t.Errorf("%d tries are used up, want %d", got.Retried, want)
		}
		key := asynqwire.Task("default", info.ID)
		msg, err := asynqwire.ParseMessage([]byte(rdb.HGet(t.Context(), key, "msg").Val()))
		if err != nil {
			t.Fatal(err)
		}
		msg.LastErr = "snoozed for 1s" // as if it had been delivered, and put off
		rdb.HSet(t.Context(), key, "msg", msg.Encode(), "carpool_unended", "")
		if err := b.Inspector.RunTask("default", info.ID); err != nil {
			t.Fatal(err)
		}
	}
}

// lostFetches enqueues a job on each queue and does to it what [loses] does.
func (b *bundle) lostFetches(t *testing.T, queues ...string) (jobs []*tasks.Info) {
	t.Helper()
	for _, queue := range queues {
		info, err := b.Client.Enqueue(t.Context(), probe{"x"}, &tasks.EnqueueOptions{Queue: queue})
		if err != nil {
			t.Fatal(err)
		}
		loses(t, b.Redis(t), info)
		jobs = append(jobs, info)
	}
	return jobs
}

func TestRescue_GoesOnBehindAJobThatCanNotBeRead(t *testing.T) {
	t.Parallel()
	b := setup(t)
	rdb := b.Redis(t)
	jobs := b.lostFetches(t, "a", "b")
	rdb.HSet(t.Context(), asynqwire.Task("a", jobs[0].ID), "msg", "\xff\xff")
	log := workertest.NewLog()
	r := startRescue(t, rdb, []string{"a", "b"}, time.Second, slog.New(slog.NewJSONHandler(log, nil)))
	defer r.Stop()
	workertest.Eventually(t, "the other is given back", func() bool {
		got, err := b.Inspector.GetTaskInfo("b", jobs[1].ID)
		return err == nil && got.State == asynq.TaskStateRetry
	})
	log.Wait(t, "a job can't be given back")
}

func TestRescue_GoesOnBehindAJobThatHasLostItsData(t *testing.T) {
	t.Parallel()
	for name, lose := range map[string]func(rdb redis.UniversalClient, key string){
		"it was evicted":     func(rdb redis.UniversalClient, key string) { rdb.Del(t.Context(), key) },
		"it was overwritten": func(rdb redis.UniversalClient, key string) { rdb.Set(t.Context(), key, "x", 0) },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := setup(t)
			rdb := b.Redis(t)
			jobs := b.lostFetches(t, "a", "b")
			key := asynqwire.Task("a", jobs[0].ID)
			rdb.Del(t.Context(), key)
			lose(rdb, key)
			log := workertest.NewLog()
			r := startRescue(t, rdb, []string{"a", "b"}, time.Second, slog.New(slog.NewJSONHandler(log, nil)))
			defer r.Stop()
			workertest.Eventually(t, "the other is given back", func() bool {
				got, err := b.Inspector.GetTaskInfo("b", jobs[1].ID)
				return err == nil && got.State == asynq.TaskStateRetry
			})
			log.Wait(t, "has lost its data")
			workertest.Eventually(t, "its id is taken off", func() bool { return rdb.LLen(t.Context(), asynqwire.Active("a")).Val() == 0 })
		})
	}
}

func TestRescue_AnOutageOfRedisDoesNotCountAndAHiccupCostsLittle(t *testing.T) {
	t.Parallel()
	b := setup(t)
	at, _, proxy := b.behindProxies(t)
	direct := b.Redis(t)
	info, err := b.Client.Enqueue(t.Context(), probe{"x"}, nil)
	if err != nil {
		t.Fatal(err)
	}
	dies(t, direct, info)
	rdb := at.Redis(t)
	r := startRescue(t, rdb, []string{"default"}, 4*time.Second, workertest.Discard())
	defer r.Stop()
	state := func() asynq.TaskState {
		got, err := b.Inspector.GetTaskInfo("default", info.ID)
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
	workertest.Eventually(t, "it is given back", func() bool { return state() == asynq.TaskStateRetry })
}

func TestRescue_JobOfALivingWorkerIsLeftAlone(t *testing.T) {
	t.Parallel()
	b := setup(t)
	var runs atomic.Int32
	f := b.execute(t, b, func(s *tasks.Set) {
		tasks.Register(s, func(context.Context, *tasks.Job, probe) (string, error) {
			runs.Add(1)
			time.Sleep(16 * time.Second) // asynq extends the lease every 5 s
			return "", nil
		})
	})
	r := startRescue(t, b.Redis(t), []string{"default"}, 8*time.Second, workertest.Discard())
	defer r.Stop()
	if _, err := f.Wait(t, f.enqueue(t, "x", nil)); err != nil {
		t.Error(err)
	}
	if runs.Load() != 1 {
		t.Errorf("it ran %d times", runs.Load())
	}
}

func TestRescue_SaysThatAnArchiveIsNearlyFull(t *testing.T) {
	t.Parallel()
	b := setup(t)
	rdb := b.Redis(t)
	var jobs []redis.Z
	for i := range asynqwire.ArchiveWarning {
		jobs = append(jobs, redis.Z{Score: float64(i), Member: i})
	}
	if err := rdb.ZAdd(t.Context(), asynqwire.Archived("default"), jobs...).Err(); err != nil {
		t.Fatal(err)
	}
	log := workertest.NewLog()
	r := startRescue(t, rdb, []string{"default"}, time.Second, slog.New(slog.NewJSONHandler(log, nil)))
	defer r.Stop()
	log.Wait(t, "the archive of a queue is nearly full")
}

func TestExecutor_JobThatKillsItsWorkersEndsInTheArchive(t *testing.T) {
	t.Parallel()
	b := setup(t)
	rdb := b.Redis(t)
	r := startRescue(t, rdb, []string{"default"}, time.Second, workertest.Discard())
	defer r.Stop()
	info, err := b.Client.Enqueue(t.Context(), probe{"poison"}, &tasks.EnqueueOptions{MaxRetry: 1})
	if err != nil {
		t.Fatal(err)
	}
	for range 2 {
		dies(t, rdb, info)
		workertest.Eventually(t, "it is given back", func() bool {
			got, err := b.Inspector.GetTaskInfo("default", info.ID)
			if err != nil || got.State != asynq.TaskStateRetry {
				return false
			}
			return b.Inspector.RunTask("default", info.ID) == nil // nobody else moves what is due
		})
	}
	var runs atomic.Int32
	f := b.execute(t, b, func(s *tasks.Set) {
		tasks.Register(s, func(context.Context, *tasks.Job, probe) (string, error) {
			runs.Add(1)
			return "cured", nil
		})
	})
	_, err = f.Wait(t, info)
	if want := "given up: its worker died, or lost its lease, while it ran (try 2)"; err == nil || !strings.HasSuffix(err.Error(), want) {
		t.Errorf("error %v, want one that ends with %q", err, want)
	}
	if runs.Load() != 0 {
		t.Error("it was run once more")
	}

	// Whoever puts it back has it run.
	if err := b.Inspector.RunTask("default", info.ID); err != nil {
		t.Fatal(err)
	}
	if result, err := f.Wait(t, info); string(result) != `"cured"` || err != nil {
		t.Errorf("put back: result %s, error %v", result, err)
	}
}
