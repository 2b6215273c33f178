package delivery

import (
	"context"
	"errors"
	"slices"
	"strconv"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hibiken/asynq"
	"github.com/redis/go-redis/v9"

	"github.com/carpool-go/carpool/internal/asynqwire"
	"github.com/carpool-go/carpool/tasks"
	"github.com/carpool-go/carpool/worker/internal/workertest"
)

func TestDue_WhatAHandlerPutsOffRunsThenAndNotBefore(t *testing.T) {
	t.Parallel()
	const delay = 700 * time.Millisecond
	for name, verdict := range map[string]error{"a retry": tasks.RetryAfter(delay, errors.New("not today")), "a snooze": tasks.Snooze(delay)} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			returned, again := make(chan time.Time, 2), make(chan time.Time, 2)
			f := execute(t, func(context.Context, *tasks.Job, probe) (string, error) {
				if len(returned) == 0 {
					returned <- time.Now()
					return "", verdict
				}
				again <- time.Now()
				return "", nil
			})
			if _, err := f.Wait(t, f.enqueue(t, "x", nil)); err != nil {
				t.Fatal(err)
			}
			// Redis has the time in microseconds.
			if took := (<-again).Sub(<-returned); took < delay-time.Microsecond || took > 1200*time.Millisecond {
				t.Errorf("it runs after %s, want %s and little more", took, delay)
			}
		})
	}
}

func TestDue_JobsOfOthersRunInTheirSecond(t *testing.T) {
	t.Parallel()
	ran := make(chan time.Time, 10)
	f := execute(t, func(context.Context, *tasks.Job, probe) (string, error) {
		ran <- time.Now()
		return "", nil
	})
	client := asynq.NewClientFromRedisClient(f.Redis(t))
	for range 3 {
		at := time.Now().Add(1500 * time.Millisecond)
		if _, err := client.EnqueueContext(t.Context(), asynq.NewTask("probe", []byte(`{"word":"x"}`)), asynq.ProcessAt(at)); err != nil {
			t.Fatal(err)
		}
		second := at.Truncate(time.Second)
		if late := (<-ran).Sub(second); late < 0 || late > 700*time.Millisecond {
			t.Errorf("it runs %s after its second", late)
		}
	}
}

// putOff has a job be due at a time, as another worker does.
func putOff(t *testing.T, rdb redis.UniversalClient, set, id string, at time.Time) {
	t.Helper()
	score := float64(at.UnixMicro()) / 1e6
	if err := rdb.ZAdd(t.Context(), set, redis.Z{Score: score, Member: id}).Err(); err != nil {
		t.Fatal(err)
	}
}

func TestDue_JobsThatAnotherWorkerHasPutOffAreMovedWithinASecond(t *testing.T) {
	t.Parallel()
	b := setup(t)
	rdb := b.Redis(t)
	ran := make(chan time.Time, 10)
	b.execute(t, b, func(s *tasks.Set) {
		tasks.Register(s, func(context.Context, *tasks.Job, probe) (any, error) {
			ran <- time.Now()
			return nil, nil
		})
	})
	for i, set := range []string{asynqwire.Retry("default"), asynqwire.Scheduled("default"), asynqwire.Retry("default")} {
		info, err := b.Client.Enqueue(t.Context(), probe{"x"}, &tasks.EnqueueOptions{RunAt: time.Now().Add(time.Hour)})
		if err != nil {
			t.Fatal(err)
		}
		rdb.ZRem(t.Context(), asynqwire.Scheduled("default"), info.ID)
		at := time.Now().Add(time.Duration(100+200*i) * time.Millisecond)
		putOff(t, rdb, set, info.ID, at)
		if late := (<-ran).Sub(at); late < -time.Microsecond || late > 1500*time.Millisecond {
			t.Errorf("it runs %s after it was due", late)
		}
	}
}

// counting counts the pipelines that Redis has answered.
type counting struct{ answered *atomic.Int32 }

func (counting) DialHook(next redis.DialHook) redis.DialHook          { return next }
func (counting) ProcessHook(next redis.ProcessHook) redis.ProcessHook { return next }
func (c counting) ProcessPipelineHook(next redis.ProcessPipelineHook) redis.ProcessPipelineHook {
	return func(ctx context.Context, cmds []redis.Cmder) error {
		defer c.answered.Add(1)
		return next(ctx, cmds)
	}
}

// startDue starts a due for the queue default, and returns it when it has looked once.
func startDue(t *testing.T, b *bundle) *due {
	t.Helper()
	var looks atomic.Int32
	rdb := b.Redis(t)
	rdb.AddHook(counting{&looks})
	d := newDue(rdb, []string{"default"}, workertest.Discard())
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan struct{})
	go func() { defer close(ended); d.run(ctx) }()
	t.Cleanup(func() { cancel(); <-ended })
	workertest.Eventually(t, "it has looked", func() bool { return looks.Load() > 0 })
	time.Sleep(50 * time.Millisecond) // and read the answer
	return d
}

func TestDue_HintOfALaterJobDelaysNoSoonerOne(t *testing.T) {
	t.Parallel()
	b := setup(t)
	rdb := b.Redis(t)
	// The script's first run needs two pipelines.
	if _, err := asynqwire.MoveDue(t.Context(), rdb, []string{"default"}); err != nil {
		t.Fatal(err)
	}
	soon := time.Now().Add(600 * time.Millisecond)
	putOff(t, rdb, asynqwire.Retry("default"), "soon", soon)
	d := startDue(t, b) // sees it
	d.hint(time.Now().Add(dueCheck - 10*time.Millisecond))
	workertest.Eventually(t, "it is moved", func() bool { return rdb.LLen(t.Context(), asynqwire.Pending("default")).Val() == 1 })
	if late := time.Since(soon); late > 350*time.Millisecond {
		t.Errorf("it is moved %s after it was due", late)
	}
}

func TestDue_HintOfASoonerJobIsHeard(t *testing.T) {
	t.Parallel()
	b := setup(t)
	rdb := b.Redis(t)
	d := startDue(t, b)
	at := time.Now().Add(200 * time.Millisecond)
	putOff(t, rdb, asynqwire.Retry("default"), "soon", at)
	d.hint(at.Add(300 * time.Millisecond))
	d.hint(at)
	workertest.Eventually(t, "it is moved", func() bool { return rdb.LLen(t.Context(), asynqwire.Pending("default")).Val() == 1 })
	if late := time.Since(at); late < 0 || late > 350*time.Millisecond {
		t.Errorf("it is moved %s after it was due", late)
	}
}

func TestMoveDue_ManyJobsAreMovedInTheOrderInWhichTheyAreDue(t *testing.T) {
	t.Parallel()
	b := setup(t)
	rdb := b.Redis(t)
	ids := fill(t, rdb, "default", "probe", 2500)
	rdb.Del(t.Context(), asynqwire.Pending("default"))
	now := time.Now()
	zs := make([]redis.Z, len(ids))
	for i, id := range ids {
		zs[i] = redis.Z{Score: float64(now.Add(time.Duration(i-len(ids))*time.Millisecond).UnixMicro()) / 1e6, Member: id}
	}
	rdb.ZAdd(t.Context(), asynqwire.Scheduled("default"), zs...)
	putOff(t, rdb, asynqwire.Scheduled("default"), "later", now.Add(time.Hour))
	for {
		next, err := asynqwire.MoveDue(t.Context(), rdb, []string{"default"})
		if err != nil {
			t.Fatal(err)
		}
		if next != 0 {
			if next < 59*time.Minute || next > time.Hour {
				t.Errorf("the next one is due in %s, want about an hour", next)
			}
			break
		}
	}
	pending := rdb.LRange(t.Context(), asynqwire.Pending("default"), 0, -1).Val()
	slices.Reverse(pending)
	if !slices.Equal(pending, ids) {
		t.Errorf("%d jobs are pending, want %d in their order", len(pending), len(ids))
	}
	hash := rdb.HGetAll(t.Context(), asynqwire.Task("default", ids[0])).Val()
	since, err := strconv.ParseInt(hash["pending_since"], 10, 64)
	if err != nil || hash["state"] != "pending" || time.Since(time.Unix(0, since)).Abs() > time.Minute {
		t.Errorf("its hash is %v", hash)
	}
	if next, err := asynqwire.MoveDue(t.Context(), rdb, []string{"nothing"}); err != nil || next >= 0 {
		t.Errorf("a queue that has nothing: the next one is due in %s, error %v", next, err)
	}
}

func TestMoveDue_JobOfAGroupGoesToItAsAsynqDoes(t *testing.T) {
	t.Parallel()
	grouped := func(b *bundle) *asynq.TaskInfo {
		info, err := asynq.NewClientFromRedisClient(b.Redis(t)).EnqueueContext(t.Context(), asynq.NewTask("probe", []byte(`{"word":"x"}`)),
			asynq.ProcessIn(time.Hour), asynq.Group("batch"))
		if err != nil {
			t.Fatal(err)
		}
		b.Redis(t).HSet(t.Context(), asynqwire.Task("default", info.ID), "group", "batch") // as one has it that was in the group before
		putOff(t, b.Redis(t), asynqwire.Scheduled("default"), info.ID, time.Now().Add(-time.Second))
		return info
	}
	look := func(b *bundle, info *asynq.TaskInfo) (hash map[string]string, keys []string) {
		rdb := b.Redis(t)
		hash = rdb.HGetAll(t.Context(), asynqwire.Task("default", info.ID)).Val()
		delete(hash, "msg") // has the id
		if n := rdb.ZScore(t.Context(), "asynq:{default}:g:batch", info.ID).Val(); n < float64(time.Now().Add(-time.Minute).Unix()) || n != float64(int64(n)) {
			t.Errorf("its score in the group is %f", n)
		}
		for _, key := range rdb.Keys(t.Context(), "asynq:{default}:*").Val() {
			if key != asynqwire.Task("default", info.ID) {
				keys = append(keys, key)
			}
		}
		slices.Sort(keys)
		return hash, keys
	}
	theirs := setup(t)
	their, rdb := grouped(theirs), theirs.Redis(t)
	server := asynq.NewServerFromRedisClient(theirs.Redis(t), asynq.Config{
		Queues: map[string]int{"default": 1}, DelayedTaskCheckInterval: 10 * time.Millisecond, LogLevel: asynq.FatalLevel,
	})
	if err := server.Start(asynq.HandlerFunc(func(context.Context, *asynq.Task) error { return nil })); err != nil {
		t.Fatal(err)
	}
	workertest.Eventually(t, "asynq has moved it", func() bool {
		return rdb.HGet(t.Context(), asynqwire.Task("default", their.ID), "state").Val() == "aggregating"
	})
	server.Shutdown()
	ours := setup(t)
	our := grouped(ours)
	if _, err := asynqwire.MoveDue(t.Context(), ours.Redis(t), []string{"default"}); err != nil {
		t.Fatal(err)
	}
	theirHash, theirKeys := look(theirs, their)
	ourHash, ourKeys := look(ours, our)
	if !slices.Equal(theirKeys, ourKeys) || len(theirHash) != len(ourHash) || ourHash["state"] != "aggregating" || ourHash["group"] != theirHash["group"] {
		t.Errorf("carpool: %v, keys %v; asynq: %v, keys %v", ourHash, ourKeys, theirHash, theirKeys)
	}
}
