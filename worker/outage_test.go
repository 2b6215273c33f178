package main

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"regexp"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hibiken/asynq"
	"github.com/jackc/pgx/v5"

	"github.com/carpool-go/carpool/internal/testservers"
	"github.com/carpool-go/carpool/tasks"
)

// behindProxies returns the bundle's servers as they are seen through proxies.
func (b *bundle) behindProxies(t *testing.T) (at *bundle, postgres, redis *testservers.Proxy) {
	t.Helper()
	through := func(raw string) (string, *testservers.Proxy) {
		u, err := url.Parse(raw)
		if err != nil {
			t.Fatal(err)
		}
		proxy := testservers.NewProxy(t, u.Host)
		u.Host = proxy.Addr()
		return u.String(), proxy
	}
	at = &bundle{}
	at.databaseURL, postgres = through(b.databaseURL)
	at.redisURL, redis = through(b.redisURL)
	return at, postgres, redis
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
	// One of another producer, whose last try asynq would archive whatever it fails of.
	foreign, err := asynq.NewClientFromRedisClient(b.redis(t)).EnqueueContext(t.Context(),
		asynq.NewTask("probe", []byte(`{"word": "needs it"}`)), asynq.MaxRetry(0), asynq.Retention(time.Hour))
	if err != nil {
		t.Fatal(err)
	}
	waiting = append(waiting, foreign)
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
	// asynq hears nothing of it, until the job's time is up.
	_, err := f.wait(t, f.enqueue(t, "x", &tasks.EnqueueOptions{Timeout: time.Second, MaxRetry: tasks.NoRetry}))
	if !errors.Is(err, tasks.ErrJobFailed) {
		t.Errorf("error %v", err)
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
			at, _, redis := b.behindProxies(t)
			var runs atomic.Int32
			ended := make(chan struct{}, 10)
			f := b.runFrame(t, at, func(s *tasks.Set) {
				// A handler without a result, which would be written first.
				tasks.Register(s, func(context.Context, *tasks.Job, probe) (any, error) {
					runs.Add(1)
					fault(redis)
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
			redis.Heal()
			if _, err := f.wait(t, info); err != nil {
				t.Error(err)
			}
			if n := runs.Load(); n != 1 {
				t.Errorf("it ran %d times", n)
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
	if job := older.records(t, 1)[0]["job"].(map[string]any); job["outcome"] != outcomePostponed {
		t.Errorf("the older worker's record is %v", job)
	}
	b.runFrame(t, b, func(s *tasks.Set) {
		tasks.Register(s, func(_ context.Context, _ *tasks.Job, p probe) (string, error) { return p.Word, nil })
	})
	if result, err := b.wait(t, info); string(result) != `"x"` || err != nil {
		t.Errorf("result %s, error %v", result, err)
	}
}
