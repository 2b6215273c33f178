package delivery

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/hibiken/asynq"
	"github.com/redis/go-redis/v9"

	"github.com/carpool-go/carpool/internal/asynqwire"
	"github.com/carpool-go/carpool/internal/reason"
	"github.com/carpool-go/carpool/tasks"
	"github.com/carpool-go/carpool/worker/internal/workertest"
)

// recorder counts the commands that reach Redis.
type recorder struct{ commands *atomic.Int32 }

func (recorder) DialHook(next redis.DialHook) redis.DialHook { return next }

func (r recorder) ProcessHook(next redis.ProcessHook) redis.ProcessHook {
	return func(ctx context.Context, cmd redis.Cmder) error {
		r.commands.Add(1)
		return next(ctx, cmd)
	}
}

func (r recorder) ProcessPipelineHook(next redis.ProcessPipelineHook) redis.ProcessPipelineHook {
	return func(ctx context.Context, cmds []redis.Cmder) error {
		r.commands.Add(int32(len(cmds)))
		return next(ctx, cmds)
	}
}

func TestClient_ScriptThatIsNotKnownIsNotPassedOnAndEndsTheWorker(t *testing.T) {
	t.Parallel()
	const key = "moved"
	script := redis.NewScript(`redis.call("SET", KEYS[1], "by a script of another asynq") return 1`)
	for name, run := range map[string]func(context.Context, redis.UniversalClient) *redis.Cmd{
		"by its hash": func(ctx context.Context, rdb redis.UniversalClient) *redis.Cmd {
			return script.EvalSha(ctx, rdb, []string{key})
		},
		"by its text": func(ctx context.Context, rdb redis.UniversalClient) *redis.Cmd {
			return script.Eval(ctx, rdb, []string{key})
		},
		"as asynq does": func(ctx context.Context, rdb redis.UniversalClient) *redis.Cmd {
			return script.Run(ctx, rdb, []string{key})
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := setup(t)
			rdb, looks := b.Redis(t), b.Redis(t)
			var commands atomic.Int32
			rdb.AddHook(recorder{&commands})
			looks.AddHook(recorder{&commands})
			var failed []error
			d := New(Config{
				Tasks: new(tasks.Set), Redis: rdb, ServersRedis: rdb, LooksRedis: looks,
				Queues: map[string]int{"default": 1}, OwnQueue: "own", Concurrency: 1,
				ShutdownTimeout: time.Second, BaseContext: context.Background(), Fail: func(err error) { failed = append(failed, err) }, Log: workertest.Discard(),
			})
			err := run(t.Context(), d.Servers.clients[0]).Err()
			if err == nil || len(failed) != 1 || !errors.Is(failed[0], err) {
				t.Fatalf("it is answered %v, and the worker ended for %v; want one error", err, failed)
			}
			for _, part := range []string{script.Hash(), "asynq " + asynqVersion() + " ", strings.Join(asynqwire.TestedAsynq, ", ")} {
				if !strings.Contains(err.Error(), part) {
					t.Errorf("error %q doesn't say %q", err, part)
				}
			}
			if n := commands.Load(); n != 0 {
				t.Errorf("%d commands have reached Redis", n)
			}
			// asynq asks again for the next job.
			if job := d.Servers.clients[0].fetcher.next(); job != nil || commands.Load() != 0 {
				t.Errorf("it goes on fetching, with %d commands", commands.Load())
			}
			if b.Redis(t).Exists(t.Context(), key).Val() != 0 {
				t.Error("it was run")
			}
		})
	}
}

// plain is an asynq server without carpool. While the test runs it works off the queue
// default.
func (b *bundle) plain(t *testing.T, cfg asynq.Config, handler func(context.Context, *asynq.Task) error) *asynq.Server {
	t.Helper()
	cfg.Logger, cfg.LogLevel = &asynqLog{log: slog.New(slog.DiscardHandler)}, asynq.FatalLevel
	cfg.TaskCheckInterval = 10 * time.Millisecond
	server := asynq.NewServerFromRedisClient(b.Redis(t), cfg)
	if err := server.Start(asynq.HandlerFunc(handler)); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(server.Shutdown)
	return server
}

// left is what a job leaves behind, as asynq's Inspector reads it.
type left struct {
	Job     *asynq.TaskInfo // nil if it is gone
	Queue   *asynq.QueueInfo
	History []*asynq.DailyStats
	Keys    []string                 // of the queue
	Fields  []string                 // of the job's hash, without those that a later delivery reads
	Expire  map[string]time.Duration // the keys that Redis removes by itself, and when
	Active  []string
	Leases  []redis.Z
}

func (b *bundle) leftOf(t *testing.T, id string) (l left) {
	t.Helper()
	ctx, rdb := t.Context(), b.Redis(t)
	var err error
	if l.Job, err = b.Inspector.GetTaskInfo("default", id); err != nil && !errors.Is(err, asynq.ErrTaskNotFound) {
		t.Fatal(err)
	}
	if l.Queue, err = b.Inspector.GetQueueInfo("default"); err != nil {
		t.Fatal(err)
	}
	if l.History, err = b.Inspector.History("default", 2); err != nil {
		t.Fatal(err)
	}
	l.Keys = rdb.Keys(ctx, "asynq:{default}:*").Val()
	slices.Sort(l.Keys)
	l.Expire = make(map[string]time.Duration)
	for _, key := range l.Keys {
		if ttl := rdb.TTL(ctx, key).Val(); ttl > 0 {
			l.Expire[key] = ttl
		}
	}
	for _, field := range rdb.HKeys(ctx, asynqwire.Task("default", id)).Val() {
		if !strings.HasPrefix(field, "carpool_") || l.Job != nil && l.Job.State != asynq.TaskStateRetry && l.Job.State != asynq.TaskStatePending {
			l.Fields = append(l.Fields, field)
		}
	}
	slices.Sort(l.Fields)
	l.Active = rdb.LRange(ctx, asynqwire.Active("default"), 0, -1).Val()
	l.Leases = rdb.ZRangeWithScores(ctx, asynqwire.Leases("default"), 0, -1).Val()
	return l
}

// asAsynq are the options by which what carpool and asynq have left is compared.
func asAsynq() cmp.Options {
	return cmp.Options{
		cmpopts.EquateEmpty(),
		cmpopts.EquateApproxTime(30 * time.Second),
		cmp.Comparer(func(a, b time.Duration) bool { return (a - b).Abs() < time.Minute }),
		cmpopts.IgnoreFields(asynq.QueueInfo{}, "MemoryUsage"), // of a sample, and with what follows
	}
}

var (
	errNotToday = errors.New("not today")
	errNever    = fmt.Errorf("never: %w", asynq.SkipRetry)
	errAway     = &postponedError{errors.New("the database is away"), time.Hour}
)

// An end leaves in Redis what asynq leaves, so that all who read it, such as asynqmon and
// programs with an Inspector, read it as before.
func TestClient_EveryEndReadsAsAsynqItselfLeavesIt(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		opts   []asynq.Option
		err    error  // what the handler returns
		result string // what it returns without an error; "" for none
		state  asynq.TaskState
		gone   bool
		fails  bool // is counted
	}{
		"done":                            {gone: true},
		"done with a result, not kept":    {gone: true, result: "r"},
		"done and kept":                   {opts: []asynq.Option{asynq.Retention(time.Hour)}, state: asynq.TaskStateCompleted},
		"done and kept, with a result":    {opts: []asynq.Option{asynq.Retention(time.Hour)}, state: asynq.TaskStateCompleted, result: "r"},
		"done, unique":                    {opts: []asynq.Option{asynq.Unique(time.Hour)}, gone: true},
		"done and kept, unique":           {opts: []asynq.Option{asynq.Unique(time.Hour), asynq.Retention(time.Hour)}, state: asynq.TaskStateCompleted},
		"failed":                          {opts: []asynq.Option{asynq.MaxRetry(3)}, err: tasks.RetryAfter(time.Hour, errNotToday), state: asynq.TaskStateRetry, fails: true},
		"failed, unique":                  {opts: []asynq.Option{asynq.MaxRetry(3), asynq.Unique(2 * time.Hour)}, err: tasks.RetryAfter(time.Hour, errNotToday), state: asynq.TaskStateRetry, fails: true},
		"failed with a deadline":          {opts: []asynq.Option{asynq.MaxRetry(3), asynq.Deadline(time.Now().Add(time.Hour))}, err: tasks.RetryAfter(time.Hour, errNotToday), state: asynq.TaskStateRetry, fails: true},
		"failed for the last time":        {opts: []asynq.Option{asynq.MaxRetry(0)}, err: errNotToday, state: asynq.TaskStateArchived, fails: true},
		"archived":                        {opts: []asynq.Option{asynq.MaxRetry(3), asynq.Retention(time.Hour)}, err: errNever, state: asynq.TaskStateArchived, fails: true},
		"archived, unique":                {opts: []asynq.Option{asynq.Unique(time.Hour)}, err: errNever, state: asynq.TaskStateArchived, fails: true},
		"snoozed":                         {opts: []asynq.Option{asynq.MaxRetry(3)}, err: tasks.Snooze(time.Hour), state: asynq.TaskStateRetry},
		"postponed":                       {opts: []asynq.Option{asynq.MaxRetry(3)}, err: errAway, state: asynq.TaskStateRetry},
		"its deadline was over":           {opts: []asynq.Option{asynq.MaxRetry(0), asynq.Deadline(time.Now().Add(-time.Minute))}, state: asynq.TaskStateArchived, fails: true},
		"its deadline was over, retried":  {opts: []asynq.Option{asynq.MaxRetry(3), asynq.Deadline(time.Now().Add(-time.Minute))}, state: asynq.TaskStateRetry, fails: true},
		"its deadline was over, and kept": {opts: []asynq.Option{asynq.MaxRetry(0), asynq.Deadline(time.Now().Add(-time.Minute)), asynq.Retention(time.Hour)}, state: asynq.TaskStateArchived, fails: true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			ours, theirs := setup(t), setup(t)
			task := asynq.NewTask("probe", []byte(`{"word": "x"}`))
			opts := append([]asynq.Option{asynq.TaskID("job")}, c.opts...)
			for _, b := range []*bundle{ours, theirs} {
				if _, err := asynq.NewClientFromRedisClient(b.Redis(t)).EnqueueContext(t.Context(), task, opts...); err != nil {
					t.Fatal(err)
				}
			}
			inAnHour := func(int, error) time.Duration { return time.Hour }
			ours.executeWith(t, executionConfig{retryDelay: inAnHour}, func(s *tasks.Set) {
				tasks.Register(s, func(context.Context, *tasks.Job, probe) (any, error) {
					if c.result == "" {
						return nil, c.err
					}
					return c.result, c.err
				})
			})
			theirs.plain(t, asynq.Config{
				Concurrency:    1,
				IsFailure:      isFailure,
				RetryDelayFunc: func(int, error, *asynq.Task) time.Duration { return time.Hour },
			}, func(_ context.Context, task *asynq.Task) error {
				if c.result != "" {
					if _, err := fmt.Fprintf(task.ResultWriter(), "%q", c.result); err != nil {
						return err
					}
				}
				return c.err
			})
			got, want := ours.hasEnded(t, "job"), theirs.hasEnded(t, "job")
			if strings.HasPrefix(name, "its deadline was over") { // which are other words
				if !strings.Contains(got.Job.LastErr, want.Job.LastErr) {
					t.Errorf("the reason is %q, want it to have asynq's %q", got.Job.LastErr, want.Job.LastErr)
				}
				want.Job.LastErr = got.Job.LastErr
			}
			if diff := cmp.Diff(want, got, asAsynq()); diff != "" {
				t.Errorf("carpool leaves other things than asynq (-asynq +carpool):\n%s", diff)
			}
			if (got.Job == nil) != c.gone || got.Job != nil && got.Job.State != c.state {
				t.Errorf("the job is %+v; want it %v, gone %v", got.Job, c.state, c.gone)
			}
			if n := got.Queue; (n.Failed == 1) != c.fails || len(got.Active)+len(got.Leases) != 0 {
				t.Errorf("%d have failed; active %v, leases %v", n.Failed, got.Active, got.Leases)
			}
		})
	}
}

// hasEnded waits for the end of the one job of the queue default, and returns what is left.
func (b *bundle) hasEnded(t *testing.T, id string) left {
	t.Helper()
	workertest.Eventually(t, "the job's attempt has ended", func() bool {
		q, err := b.Inspector.GetQueueInfo("default")
		return err == nil && q.Pending == 0 && q.Active == 0
	})
	return b.leftOf(t, id)
}

func TestClient_CancelledJobReadsAsArchived(t *testing.T) {
	t.Parallel()
	for name, opts := range map[string]tasks.EnqueueOptions{"with tries left": {MaxRetry: 3}, "on the last try": {MaxRetry: tasks.NoRetry}} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			started := make(chan struct{})
			f := execute(t, func(ctx context.Context, _ *tasks.Job, _ probe) (string, error) {
				close(started)
				<-ctx.Done()
				return "", ctx.Err()
			})
			info := f.enqueue(t, "x", &opts)
			<-started
			if err := f.Client.Cancel(t.Context(), info.ID); err != nil {
				t.Fatal(err)
			}
			got := f.hasEnded(t, info.ID)
			if j := got.Job; j == nil || j.State != asynq.TaskStateArchived || j.LastErr != reason.Cancelled || j.Retried != 0 ||
				time.Since(j.LastFailedAt) > 30*time.Second || !j.NextProcessAt.IsZero() {
				t.Errorf("the job is %+v", j)
			}
			if q := got.Queue; q.Archived != 1 || q.Retry != 0 || q.Processed != 1 || q.Failed != 1 || q.ProcessedTotal != 1 || q.FailedTotal != 1 || got.History[0].Failed != 1 {
				t.Errorf("the queue is %+v, its day %+v", q, got.History[0])
			}
			if len(got.Active)+len(got.Leases) != 0 {
				t.Errorf("active %v, leases %v", got.Active, got.Leases)
			}
		})
	}
}

// asynq puts such a job back before all others.
func TestClient_JobThatStopInterruptsReadsAsAsynqLeavesIt(t *testing.T) {
	t.Parallel()
	for name, ignores := range map[string]bool{"its handler heeds its context": false, "its handler ignores its context": true} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			ours, theirs := setup(t), setup(t)
			for _, b := range []*bundle{ours, theirs} {
				for _, id := range []string{"job", "next"} {
					if _, err := asynq.NewClientFromRedisClient(b.Redis(t)).EnqueueContext(t.Context(),
						asynq.NewTask("probe", []byte(`{"word": "x"}`)), asynq.TaskID(id), asynq.MaxRetry(0)); err != nil {
						t.Fatal(err)
					}
				}
			}
			started, end := make(chan struct{}), make(chan struct{})
			handle := func(ctx context.Context) error {
				started <- struct{}{}
				if ignores {
					<-end
					return nil
				}
				select {
				case <-ctx.Done():
				case <-end:
				}
				return ctx.Err()
			}
			f := ours.executeWith(t, executionConfig{slots: 1}, func(s *tasks.Set) {
				tasks.Register(s, func(ctx context.Context, _ *tasks.Job, _ probe) (any, error) { return nil, handle(ctx) })
			})
			<-started
			server := theirs.plain(t, asynq.Config{Concurrency: 1, ShutdownTimeout: 100 * time.Millisecond}, func(ctx context.Context, _ *asynq.Task) error { return handle(ctx) })
			<-started
			var stopping sync.WaitGroup
			stopping.Go(server.Shutdown)
			stopping.Go(f.servers.Stop)
			stopping.Wait()
			got, want := ours.leftOf(t, "job"), theirs.leftOf(t, "job")
			close(end)
			f.stop()
			want.Fields = append(want.Fields[:1:1], "pending_since", "state") // asynq forgets since when it waits
			got.Queue.Latency, want.Queue.Latency = 0, 0
			if diff := cmp.Diff(want, got, asAsynq()); diff != "" {
				t.Errorf("carpool leaves other things than asynq (-asynq +carpool):\n%s", diff)
			}
			if j := got.Job; j == nil || j.State != asynq.TaskStatePending || j.Retried != 0 || j.LastErr != "" {
				t.Errorf("the job is %+v; want it pending, as if nothing had been", j)
			}
			pending := ours.Redis(t).LRange(t.Context(), asynqwire.Pending("default"), 0, -1).Val()
			if diff := cmp.Diff([]string{"next", "job"}, pending); diff != "" {
				t.Errorf("the pending ones, the last of which is the next (-want +got):\n%s", diff)
			}
			// What the handler says now is not heard.
			if diff := cmp.Diff(got, ours.leftOf(t, "job"), asAsynq()); diff != "" {
				t.Errorf("after the handler's end (-before +after):\n%s", diff)
			}
		})
	}
}

func TestClient_InspectorShowsTwoServersAndTheirJobsUntilStop(t *testing.T) {
	t.Parallel()
	b := setup(t)
	started, end := make(chan struct{}), make(chan struct{})
	f := b.executeWith(t, executionConfig{slots: 3, queues: map[string]int{"default": 5, "bulk": 2}}, func(s *tasks.Set) {
		tasks.Register(s, func(context.Context, *tasks.Job, probe) (any, error) {
			started <- struct{}{}
			<-end
			return nil, nil
		})
	})
	stopped := false
	defer func() {
		if !stopped {
			close(end)
		}
	}()
	inBulk := f.enqueue(t, "in bulk", &tasks.EnqueueOptions{Queue: "bulk", Timeout: time.Hour})
	<-started
	inDefault := f.enqueue(t, "in default", &tasks.EnqueueOptions{Timeout: time.Hour})
	<-started
	var shared, own *asynq.ServerInfo
	workertest.Eventually(t, "it shows two servers and their jobs", func() bool {
		servers, err := b.Inspector.Servers()
		if err != nil {
			t.Fatal(err)
		}
		shared, own = nil, nil
		for _, s := range servers {
			if s.Queues["default"] > 0 {
				shared = s
			} else {
				own = s
			}
		}
		return len(servers) == 2 && shared != nil && own != nil && len(shared.ActiveWorkers) == 2
	})
	if !maps.Equal(shared.Queues, map[string]int{"default": 5, "bulk": 2}) || shared.Concurrency != 3 || shared.Status != "active" || shared.StrictPriority {
		t.Errorf("the server of the queues is %+v", shared)
	}
	if !maps.Equal(own.Queues, map[string]int{"instance-of-" + t.Name(): 1}) || own.Concurrency != 1 || own.Status != "active" || len(own.ActiveWorkers) != 0 {
		t.Errorf("the server of the instance's own queue is %+v", own)
	}
	for _, info := range []*tasks.Info{inBulk, inDefault} {
		i := slices.IndexFunc(shared.ActiveWorkers, func(w *asynq.WorkerInfo) bool { return w.TaskID == info.ID })
		if i < 0 {
			t.Fatalf("job %s is not among %v", info.ID, shared.ActiveWorkers)
		}
		w := shared.ActiveWorkers[i]
		if w.Queue != info.Queue || w.TaskType != "probe" || !strings.Contains(string(w.TaskPayload), "in "+info.Queue) ||
			time.Since(w.Started) > time.Minute || time.Until(w.Deadline) < 50*time.Minute {
			t.Errorf("the job in %s is shown as %+v", info.Queue, w)
		}
	}
	stopped = true
	close(end)
	f.stop()
	if servers, err := b.Inspector.Servers(); err != nil || len(servers) != 0 {
		t.Errorf("after the end there are the servers %v, %v", servers, err)
	}
	rdb := b.Redis(t)
	if keys := rdb.Keys(t.Context(), "asynq:servers*").Val(); len(keys) != 0 {
		t.Errorf("there is still %v", keys)
	}
	if keys := rdb.Keys(t.Context(), "asynq:workers*").Val(); len(keys) != 0 {
		t.Errorf("there is still %v", keys)
	}
}

func TestClient_PlainServerBesideItOnTheSameQueueDoesNoHarm(t *testing.T) {
	t.Parallel()
	b := setup(t)
	const jobs = 500
	var mu sync.Mutex
	runs := make(map[string]int)
	var byUs, byThem atomic.Int32
	ran := func(id string, by *atomic.Int32) {
		by.Add(1)
		time.Sleep(5 * time.Millisecond)
		mu.Lock()
		defer mu.Unlock()
		runs[id]++
	}
	client := asynq.NewClientFromRedisClient(b.Redis(t))
	for i := range jobs {
		opts := []asynq.Option{asynq.TaskID(fmt.Sprint("job-", i)), asynq.MaxRetry(0)}
		if i%2 == 0 {
			opts = append(opts, asynq.Retention(time.Hour))
		}
		if i%3 == 0 {
			opts = append(opts, asynq.Unique(time.Hour))
		}
		if i%5 == 0 {
			opts = append(opts, asynq.ProcessIn(time.Second))
		}
		if _, err := client.EnqueueContext(t.Context(), asynq.NewTask("probe", fmt.Appendf(nil, `{"word": "%d"}`, i)), opts...); err != nil {
			t.Fatal(err)
		}
	}
	b.plain(t, asynq.Config{Concurrency: 4, DelayedTaskCheckInterval: time.Second}, func(_ context.Context, task *asynq.Task) error {
		ran(task.ResultWriter().TaskID(), &byThem)
		return nil
	})
	f := b.execute(t, b, func(s *tasks.Set) {
		tasks.Register(s, func(_ context.Context, job *tasks.Job, _ probe) (any, error) {
			ran(job.ID, &byUs)
			return nil, nil
		})
	})
	workertest.Eventually(t, "all jobs are done", func() bool {
		q, err := b.Inspector.GetQueueInfo("default")
		return err == nil && q.ProcessedTotal >= jobs && q.Active == 0
	})
	f.stop()
	mu.Lock()
	defer mu.Unlock()
	for id, n := range runs {
		if n != 1 {
			t.Errorf("%s ran %d times", id, n)
		}
	}
	if len(runs) != jobs || byUs.Load() == 0 || byThem.Load() == 0 {
		t.Errorf("%d jobs were run, in %d runs by carpool and %d by the other; want %d, by both", len(runs), byUs.Load(), byThem.Load(), jobs)
	}
	q, err := b.Inspector.GetQueueInfo("default")
	if err != nil {
		t.Fatal(err)
	}
	if q.ProcessedTotal != jobs || q.FailedTotal != 0 || q.Archived != 0 || q.Retry != 0 || q.Size != jobs/2 || q.Completed != jobs/2 {
		t.Errorf("the queue is %+v", q)
	}
	rdb := b.Redis(t)
	if n := rdb.ZCard(t.Context(), asynqwire.Leases("default")).Val(); n != 0 {
		t.Errorf("%d leases are left", n)
	}
	if keys := rdb.Keys(t.Context(), "asynq:{default}:unique:*").Val(); len(keys) != 0 {
		t.Errorf("%d unique locks are left", len(keys))
	}
	if keys := rdb.Keys(t.Context(), "asynq:{default}:t:*").Val(); len(keys) != jobs/2 {
		t.Errorf("there are %d hashes of jobs; want those of the kept ones, %d", len(keys), jobs/2)
	}
}
