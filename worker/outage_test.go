package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/url"
	"regexp"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hibiken/asynq"
	"github.com/jackc/pgx/v5"
	"github.com/redis/go-redis/v9"

	"github.com/carpool-go/carpool/internal/testservers"
	"github.com/carpool-go/carpool/tasks"
)

// behindProxies returns the bundle's servers as they are seen through proxies.
func (b *bundle) behindProxies(t *testing.T) (at *bundle, forPostgres, forRedis *testservers.Proxy) {
	t.Helper()
	at = &bundle{}
	at.databaseURL, forPostgres = throughProxy(t, b.databaseURL)
	at.redisURL, forRedis = throughProxy(t, b.redisURL)
	return at, forPostgres, forRedis
}

func TestFrame_JobsWaitWhileTheDatabaseIsAwayAndNoTryIsUsedUp(t *testing.T) {
	t.Parallel()
	b := setup(t)
	at, postgres, _ := b.behindProxies(t)
	var inside atomic.Int32
	cut := make(chan struct{})
	f := b.runFrame(t, at, func(s *tasks.Set) {
		tasks.Register(s, func(ctx context.Context, job *tasks.Job, p probe) (string, error) {
			if p.Word == "needs no database" {
				return "", nil
			}
			inside.Add(1)
			<-cut
			var word string
			err := job.DB.QueryRow(ctx, "SELECT $1", p.Word).Scan(&word)
			return word, err
		})
	})
	var waiting []*asynq.TaskInfo
	for range 12 { // three times the hands
		waiting = append(waiting, f.enqueue(t, "needs it", &tasks.EnqueueOptions{MaxRetry: tasks.NoRetry}))
	}
	eventually(t, "every hand has a job", func() bool { return inside.Load() == 4 })
	postgres.Refuse()
	postgres.Reset()
	close(cut)
	f.log.wait(t, "the database is away")
	if _, err := f.wait(t, f.enqueue(t, "needs no database", nil)); err != nil {
		t.Errorf("a job that needs no database: %v", err)
	}
	foreign := b.enqueueAsOthersDo(t)
	eventually(t, "it waits too", func() bool {
		info, err := b.inspector.GetTaskInfo(foreign.Queue, foreign.ID)
		return err == nil && info.State == asynq.TaskStateActive
	})
	if s := f.log.String(); strings.Contains(s, "the database is back") {
		t.Fatal("the database has come back by itself")
	}
	postgres.Heal()
	for _, info := range waiting {
		if result, err := f.wait(t, info); err != nil || string(result) != `"needs it"` {
			t.Errorf("result %s, error %v", result, err)
		}
	}
	if _, err := f.wait(t, foreign); err != nil {
		t.Errorf("the job of others: %v", err)
	}
	for _, r := range f.records(t, 14) {
		if attempt := r["job"].(map[string]any)["attempt"]; attempt != 1.0 {
			t.Errorf("an outage has used up a try: %v", r)
		}
	}
}

func TestFrame_HandlerThatEndsItsGoroutineFailsAndLeavesNothingBehind(t *testing.T) {
	t.Parallel()
	f := runFrame(t, func(ctx context.Context, job *tasks.Job, _ probe) (string, error) {
		_, _ = job.DB.Acquire(ctx)
		runtime.Goexit()
		return "", nil
	})
	_, err := f.wait(t, f.enqueue(t, "x", &tasks.EnqueueOptions{MaxRetry: tasks.NoRetry}))
	if want := "the handler ended its goroutine"; err == nil || !strings.Contains(err.Error(), want) {
		t.Errorf("error %v, want %q", err, want)
	}
	if s := f.db.Stats(); s.CheckedOut != 0 {
		t.Errorf("%d connections are still out", s.CheckedOut)
	}
}

func TestFrame_JobThatBringsItsConnectionDownEachTimeFails(t *testing.T) {
	t.Parallel()
	var runs atomic.Int32
	f := runFrame(t, func(ctx context.Context, job *tasks.Job, _ probe) (string, error) {
		runs.Add(1)
		_, err := job.DB.Exec(ctx, "SELECT pg_terminate_backend(pg_backend_pid())")
		return "", err
	})
	_, err := f.wait(t, f.enqueue(t, "x", &tasks.EnqueueOptions{MaxRetry: tasks.NoRetry}))
	if want := "the database went away 6 times in a row while this job ran"; err == nil || !strings.Contains(err.Error(), want) {
		t.Errorf("error %v, want %q", err, want)
	}
	if n := runs.Load(); n != 6 {
		t.Errorf("it ran %d times", n)
	}
}

func TestFrame_TransactionThatPostgresSacrificesIsRunAgainAtOnce(t *testing.T) {
	t.Parallel()
	b := setup(t)
	var runs atomic.Int32
	f := b.runFrame(t, b, func(s *tasks.Set) {
		tasks.RegisterTx(s, func(ctx context.Context, _ *tasks.Job, tx pgx.Tx, p probe) (string, error) {
			if n := runs.Add(1); n <= 3 {
				state := []string{"40001", "40P01"}[n%2]
				_, err := tx.Exec(ctx, fmt.Sprintf(`DO $$ BEGIN RAISE 'sacrificed' USING ERRCODE = '%s'; END $$`, state))
				return "", err
			}
			return p.Word, nil
		})
	})
	result, err := f.wait(t, f.enqueue(t, "x", &tasks.EnqueueOptions{MaxRetry: tasks.NoRetry}))
	if string(result) != `"x"` || err != nil || runs.Load() != 4 {
		t.Errorf("result %s, error %v after %d runs", result, err, runs.Load())
	}
}

func TestFrame_SnoozedJobComesBackWithoutUsingUpATry(t *testing.T) {
	t.Parallel()
	var runs atomic.Int32
	f := runFrame(t, func(context.Context, *tasks.Job, probe) (string, error) {
		if runs.Add(1) < 3 {
			return "", tasks.Snooze(time.Millisecond)
		}
		return "awake", nil
	})
	result, err := f.wait(t, f.enqueue(t, "x", &tasks.EnqueueOptions{MaxRetry: tasks.NoRetry}))
	if string(result) != `"awake"` || err != nil {
		t.Errorf("result %s, error %v", result, err)
	}
	for i, r := range f.records(t, 3) {
		job := r["job"].(map[string]any)
		if want := []string{outcomeSnoozed, outcomeSnoozed, outcomeDone}[i]; job["attempt"] != 1.0 || job["outcome"] != want {
			t.Errorf("record %d: %v", i, job)
		}
	}
}

func TestFrame_HandlerThatIgnoresItsContextIsReportedAndNotRunBesideItself(t *testing.T) {
	t.Parallel()
	var runs, atOnce atomic.Int32
	f := runFrame(t, func(_ context.Context, _ *tasks.Job, _ probe) (string, error) {
		if atOnce.Add(1) > 1 {
			t.Error("the job runs beside itself")
		}
		defer atOnce.Add(-1)
		if runs.Add(1) == 1 {
			sleepLikeAStone()
		}
		return "", nil
	})
	info := f.enqueue(t, "x", &tasks.EnqueueOptions{Timeout: time.Second})
	f.log.wait(t, "the handler goes on although its context has ended")
	if log := f.log.String(); !strings.Contains(log, "worker.sleepLikeAStone") {
		t.Error("the report does not show where it is")
	}
	f.log.wait(t, "the handler has ended at last")
	if _, err := f.wait(t, info); err != nil {
		t.Error(err)
	}
	job := f.records(t, 2)[0]["job"].(map[string]any)
	if job["outcome"] != outcomeRetry || runs.Load() != 2 {
		t.Errorf("first %v, %d runs", job, runs.Load())
	}
}

func sleepLikeAStone() { time.Sleep(6 * time.Second) }

func TestCancel_RunningJobStopsAndIsNotRunAgain(t *testing.T) {
	t.Parallel()
	for name, cancel := range map[string]func(f *framed, id string) error{
		"by carpool": func(f *framed, id string) error { return f.client.Cancel(t.Context(), id) },
		"in asynqmon": func(f *framed, id string) error {
			// Its subscription may not be there yet.
			for {
				if err := f.inspector.CancelProcessing(id); err != nil {
					return err
				}
				time.Sleep(100 * time.Millisecond)
				if info, err := f.inspector.GetTaskInfo("default", id); err != nil || info.State == asynq.TaskStateArchived {
					return err
				}
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var runs atomic.Int32
			f := runFrame(t, func(ctx context.Context, _ *tasks.Job, _ probe) (string, error) {
				runs.Add(1)
				<-ctx.Done()
				return "", ctx.Err()
			})
			info := f.enqueue(t, "x", &tasks.EnqueueOptions{UniqueKey: "k"})
			eventually(t, "it runs", func() bool { return runs.Load() == 1 })
			if err := cancel(f, info.ID); err != nil {
				t.Fatal(err)
			}
			got, err := f.inspector.GetTaskInfo("default", info.ID)
			if err != nil || got.State != asynq.TaskStateArchived {
				t.Fatalf("it is %+v, error %v; want it archived", got, err)
			}
			if job := f.records(t, 1)[0]["job"].(map[string]any); job["outcome"] != outcomeCancelled {
				t.Errorf("the record is %v", job)
			}
			if err := f.client.Cancel(t.Context(), info.ID); !errors.Is(err, tasks.ErrJobEnded) {
				t.Errorf("cancelled again: %v", err)
			}
			if runs.Load() != 1 {
				t.Errorf("it ran %d times", runs.Load())
			}
			f.enqueue(t, "its key is free", &tasks.EnqueueOptions{UniqueKey: "k"})
		})
	}
}

func TestCancel_JobThatSucceedsNeverthelessIsDoneAndKeepsItsResult(t *testing.T) {
	t.Parallel()
	for name, retention := range map[string]time.Duration{"retained": time.Hour, "not retained": 0} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			started := make(chan struct{})
			f := runFrame(t, func(ctx context.Context, _ *tasks.Job, _ probe) (string, error) {
				close(started)
				<-ctx.Done()
				return "result", nil // it was past the point of no return
			})
			info, err := asynq.NewClientFromRedisClient(f.redis(t)).EnqueueContext(t.Context(),
				asynq.NewTask("probe", []byte(`{"word":"x"}`)), asynq.MaxRetry(5), asynq.Retention(retention))
			if err != nil {
				t.Fatal(err)
			}
			<-started
			if err := f.client.Cancel(t.Context(), info.ID); err != nil {
				t.Fatal(err)
			}
			got, err := f.inspector.GetTaskInfo("default", info.ID)
			if retention == 0 {
				if !errors.Is(err, asynq.ErrTaskNotFound) {
					t.Errorf("%+v, %v; want it gone", got, err)
				}
				return
			}
			if err != nil || got.State != asynq.TaskStateCompleted || string(got.Result) != `"result"` || got.LastErr != "" ||
				time.Since(got.CompletedAt) > time.Minute {
				t.Errorf("%+v, %v; want it completed, with its result", got, err)
			}
		})
	}
}

// asynq archives it by itself.
func TestCancel_LastTryOfAJobOfOthersIsArchivedWithoutAWarning(t *testing.T) {
	t.Parallel()
	started := make(chan struct{})
	f := runFrame(t, func(ctx context.Context, _ *tasks.Job, _ probe) (string, error) {
		close(started)
		<-ctx.Done()
		return "", ctx.Err()
	})
	info := f.enqueueAsOthersDo(t)
	<-started
	if err := f.client.Cancel(t.Context(), info.ID); err != nil {
		t.Fatal(err)
	}
	f.stop() // waits for what is put away
	if strings.Contains(f.log.String(), "could not be put away") {
		t.Error("there is a false warning")
	}
}

// The handler needs longer than the shutdown timeout, as at a deploy.
func TestCancel_WhileTheWorkerStopsLeavesNothingBehind(t *testing.T) {
	t.Parallel()
	started := make(chan struct{})
	f := runFrame(t, func(ctx context.Context, _ *tasks.Job, _ probe) (string, error) {
		close(started)
		<-ctx.Done()
		time.Sleep(2500 * time.Millisecond) // winds up; the shutdown timeout is 1 s
		return "", ctx.Err()
	})
	info := f.enqueue(t, "x", nil)
	<-started
	cancelled := make(chan error)
	go func() { cancelled <- f.client.Cancel(t.Context(), info.ID) }()
	time.Sleep(300 * time.Millisecond)
	f.stop()
	if err := <-cancelled; err != nil {
		t.Error(err)
	}
	if got, err := f.inspector.GetTaskInfo("default", info.ID); err != nil || got.State != asynq.TaskStateArchived {
		t.Errorf("it is %+v, %v; want it archived", got, err)
	}
}

func TestCancel_WaitingJobIsRemoved(t *testing.T) {
	t.Parallel()
	b := setup(t)
	for name, opts := range map[string]*tasks.EnqueueOptions{
		"pending":   {UniqueKey: "a"},
		"scheduled": {UniqueKey: "b", RunAt: time.Now().Add(time.Hour)},
	} {
		info, err := b.client.Enqueue(t.Context(), probe{name}, opts)
		if err != nil {
			t.Fatal(err)
		}
		if err := b.client.Cancel(t.Context(), info.ID); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if _, err := b.inspector.GetTaskInfo("default", info.ID); !errors.Is(err, asynq.ErrTaskNotFound) {
			t.Errorf("%s: it is still there: %v", name, err)
		}
		if _, err := b.client.Enqueue(t.Context(), probe{name}, opts); err != nil {
			t.Errorf("%s: its key is not free: %v", name, err)
		}
	}
	if err := b.client.Cancel(t.Context(), "nobody"); !errors.Is(err, tasks.ErrNoSuchJob) {
		t.Errorf("an unknown id: %v", err)
	}
}

func TestAck_ArrivesAlthoughRedisIsAwayWhenTheJobEnds(t *testing.T) {
	t.Parallel()
	for name, fault := range map[string]func(*testservers.Proxy){
		"refused":         func(p *testservers.Proxy) { p.Refuse(); p.Reset() },
		"does not answer": (*testservers.Proxy).Blackhole,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := setup(t)
			at, _, proxy := b.behindProxies(t)
			var runs atomic.Int32
			ended := make(chan struct{}, 10)
			f := b.runFrame(t, at, func(s *tasks.Set) {
				// A handler without a result, which would be written first.
				tasks.Register(s, func(context.Context, *tasks.Job, probe) (any, error) {
					runs.Add(1)
					fault(proxy)
					ended <- struct{}{}
					return nil, nil
				})
			})
			// asynq waits without an end for the answer to its subscription, and can't
			// be shut down meanwhile.
			rdb := b.redis(t)
			db, err := url.Parse(b.redisURL)
			if err != nil {
				t.Fatal(err)
			}
			eventually(t, "the three servers have subscribed", func() bool {
				clients := rdb.ClientList(t.Context()).Val()
				return len(regexp.MustCompile(` db=`+strings.Trim(db.Path, "/")+` sub=1 `).FindAllString(clients, -1)) == 3
			})
			info := f.enqueue(t, "x", nil)
			<-ended
			f.records(t, 1)
			time.Sleep(5 * time.Second) // longer than asynq and go-redis alone go on trying
			proxy.Heal()
			if _, err := f.wait(t, info); err != nil {
				t.Error(err)
			}
			if n := runs.Load(); n != 1 {
				t.Errorf("it ran %d times", n)
			}
		})
	}
}

// losing is a Redis whose answer is lost once, or the question.
type losing struct {
	lost     *atomic.Bool
	is       func(ctx context.Context, cmd redis.Cmder) bool // what is lost; asked when it has been answered
	question bool
	after    func() // called before the loss is noticed
}

func (losing) DialHook(next redis.DialHook) redis.DialHook { return next }
func (losing) ProcessPipelineHook(next redis.ProcessPipelineHook) redis.ProcessPipelineHook {
	return next
}

func (l losing) ProcessHook(next redis.ProcessHook) redis.ProcessHook {
	return func(ctx context.Context, cmd redis.Cmder) error {
		if !l.question {
			if err := next(ctx, cmd); err != nil {
				return err
			}
		}
		if l.is(ctx, cmd) && l.lost.CompareAndSwap(false, true) {
			if l.after != nil {
				l.after()
			}
			cmd.SetErr(io.ErrUnexpectedEOF)
			return io.ErrUnexpectedEOF
		}
		if l.question {
			return next(ctx, cmd)
		}
		return nil
	}
}

func ackTo(list string) func(context.Context, redis.Cmder) bool {
	return func(ctx context.Context, cmd redis.Cmder) bool {
		return isAck(ctx, cmd) && strings.Contains(fmt.Sprint(cmd.Args()...), "}:"+list)
	}
}

// Meanwhile the job runs elsewhere.
func TestAck_ThatArrivedIsNotSaidAgain(t *testing.T) {
	t.Parallel()
	b := setup(t)
	var runs, atOnce, most atomic.Int32
	again := make(chan struct{})
	register := func(s *tasks.Set) {
		tasks.Register(s, func(context.Context, *tasks.Job, probe) (any, error) {
			if runs.Add(1) == 1 {
				return nil, tasks.RetryAfter(time.Millisecond, errors.New("not today"))
			}
			close(again)
			most.Store(max(most.Load(), atOnce.Add(1)))
			time.Sleep(5 * time.Second)
			atOnce.Add(-1)
			return nil, nil
		})
	}
	var lost atomic.Bool
	b.runFrameWith(t, frameConfig{hands: 1, hook: losing{lost: &lost, is: ackTo("retry"), after: func() { <-again }}}, register)
	info, err := b.client.Enqueue(t.Context(), probe{"x"}, nil)
	if err != nil {
		t.Fatal(err)
	}
	eventually(t, "it has failed", lost.Load)
	b.runFrame(t, b, register)
	if _, err := b.wait(t, info); err != nil {
		t.Error(err)
	}
	time.Sleep(2 * time.Second)
	if runs.Load() != 2 || most.Load() != 1 {
		t.Errorf("%d runs, %d at once", runs.Load(), most.Load())
	}
}

// It is pushed back at the end of the worker.
func TestAck_OfAJobThatIsPushedBackIsSettledByLooking(t *testing.T) {
	t.Parallel()
	for name, arrives := range map[string]bool{"arrived": true, "did not arrive": false} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := setup(t)
			var lost atomic.Bool
			started := make(chan struct{})
			f := b.runFrameWith(t, frameConfig{hook: losing{lost: &lost, is: ackTo("pending"), question: !arrives}}, func(s *tasks.Set) {
				tasks.Register(s, func(ctx context.Context, _ *tasks.Job, _ probe) (any, error) {
					close(started)
					<-ctx.Done()
					return nil, ctx.Err()
				})
			})
			info := f.enqueue(t, "x", nil)
			<-started
			f.stop()
			if !lost.Load() {
				t.Error("no answer was lost")
			}
			if got, err := f.inspector.GetTaskInfo("default", info.ID); err != nil || got.State != asynq.TaskStatePending || got.Retried != 0 {
				t.Errorf("it is %+v, %v; want it pending", got, err)
			}
		})
	}
}

func TestFrame_KindThatANewerWorkerKnowsIsLeftToIt(t *testing.T) {
	t.Parallel()
	b := setup(t)
	info, err := b.client.Enqueue(t.Context(), probe{"x"}, nil)
	if err != nil {
		t.Fatal(err)
	}
	foreign := b.enqueueAsOthersDo(t)
	newer := new(tasks.Set)
	tasks.Register(newer, func(_ context.Context, _ *tasks.Job, p probe) (string, error) { return p.Word, nil })
	conn, err := pgx.Connect(t.Context(), b.databaseURL)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(context.Background())
	if err := tasks.RecordKinds(t.Context(), conn, newer); err != nil {
		t.Fatal(err)
	}
	older := b.runFrame(t, b, func(*tasks.Set) {})
	for _, r := range older.records(t, 2) {
		if job := r["job"].(map[string]any); job["outcome"] != outcomePostponed {
			t.Errorf("the older worker's record is %v", job)
		}
	}
	b.runFrame(t, b, func(s *tasks.Set) {
		tasks.Register(s, func(_ context.Context, _ *tasks.Job, p probe) (string, error) { return p.Word, nil })
	})
	for _, info := range []*asynq.TaskInfo{info, foreign} {
		if result, err := b.wait(t, info); string(result) != `"x"` || err != nil {
			t.Errorf("result %s, error %v", result, err)
		}
	}
}

// enqueueAsOthersDo enqueues a probe in asynq's format, with a single try, which asynq
// alone archives whatever comes of it.
func (b *bundle) enqueueAsOthersDo(t *testing.T) *asynq.TaskInfo {
	t.Helper()
	info, err := asynq.NewClientFromRedisClient(b.redis(t)).EnqueueContext(t.Context(),
		asynq.NewTask("probe", []byte(`{"word": "x"}`)), asynq.MaxRetry(0), asynq.Retention(time.Hour))
	if err != nil {
		t.Fatal(err)
	}
	return info
}

func TestFrame_LastTryOfAJobOfOthersMaySnoozeAndThenFail(t *testing.T) {
	t.Parallel()
	b := setup(t)
	var runs atomic.Int32
	var lost atomic.Bool
	f := b.runFrameWith(t, frameConfig{hook: losing{lost: &lost, is: ackTo("retry")}}, func(s *tasks.Set) {
		tasks.Register(s, func(context.Context, *tasks.Job, probe) (string, error) {
			if runs.Add(1) < 3 {
				return "", tasks.Snooze(time.Millisecond)
			}
			return "", errors.New("not today")
		})
	})
	_, err := f.wait(t, b.enqueueAsOthersDo(t))
	if err == nil || !strings.Contains(err.Error(), "not today") || runs.Load() != 3 {
		t.Errorf("error %v after %d runs; want two snoozes and a failure", err, runs.Load())
	}
	if !lost.Load() {
		t.Error("no answer was lost")
	}
}
