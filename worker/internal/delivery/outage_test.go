package delivery

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hibiken/asynq"
	"github.com/jackc/pgx/v5"

	"github.com/carpool-go/carpool/dbpool"
	"github.com/carpool-go/carpool/internal/testservers"
	"github.com/carpool-go/carpool/tasks"
	"github.com/carpool-go/carpool/worker/internal/workertest"
)

// behindProxies returns the bundle's servers as they are seen through proxies.
func (b *bundle) behindProxies(t *testing.T) (at *bundle, forPostgres, forRedis *testservers.Proxy) {
	t.Helper()
	at = &bundle{new(workertest.Bundle)}
	at.DatabaseURL, forPostgres = workertest.ThroughProxy(t, b.DatabaseURL)
	at.RedisURL, forRedis = workertest.ThroughProxy(t, b.RedisURL)
	return at, forPostgres, forRedis
}

func TestExecutor_JobsWaitWhileTheDatabaseIsAwayAndNoTryIsUsedUp(t *testing.T) {
	t.Parallel()
	b := setup(t)
	at, postgres, _ := b.behindProxies(t)
	var inside atomic.Int32
	cut := make(chan struct{})
	f := b.execute(t, at, func(s *tasks.Set) {
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
	var waiting []*tasks.Info
	for range 12 { // three times the hands
		waiting = append(waiting, f.enqueue(t, "needs it", &tasks.EnqueueOptions{MaxRetry: tasks.NoRetry}))
	}
	workertest.Eventually(t, "every hand has a job", func() bool { return inside.Load() == 4 })
	postgres.Refuse()
	postgres.Reset()
	close(cut)
	f.log.Wait(t, "the database is away")
	if _, err := f.Wait(t, f.enqueue(t, "needs no database", nil)); err != nil {
		t.Errorf("a job that needs no database: %v", err)
	}
	foreign := b.enqueueAsOthersDo(t)
	workertest.Eventually(t, "it waits too", func() bool {
		info, err := b.Inspector.GetTaskInfo(foreign.Queue, foreign.ID)
		return err == nil && info.State == asynq.TaskStateActive
	})
	if s := f.log.String(); strings.Contains(s, "the database is back") {
		t.Fatal("the database has come back by itself")
	}
	postgres.Heal()
	for _, info := range waiting {
		if result, err := f.Wait(t, info); err != nil || string(result) != `"needs it"` {
			t.Errorf("result %s, error %v", result, err)
		}
	}
	if _, err := f.Wait(t, foreign); err != nil {
		t.Errorf("the job of others: %v", err)
	}
	for _, r := range f.records(t, 14) {
		if attempt := r["job"].(map[string]any)["attempt"]; attempt != 1.0 {
			t.Errorf("an outage has used up a try: %v", r)
		}
	}
}

func TestExecutor_HandlerThatEndsItsGoroutineFailsAndLeavesNothingBehind(t *testing.T) {
	t.Parallel()
	f := execute(t, func(ctx context.Context, job *tasks.Job, _ probe) (string, error) {
		_, _ = job.DB.Acquire(ctx)
		runtime.Goexit()
		return "", nil
	})
	_, err := f.Wait(t, f.enqueue(t, "x", &tasks.EnqueueOptions{MaxRetry: tasks.NoRetry}))
	if want := "the handler ended its goroutine"; err == nil || !strings.Contains(err.Error(), want) {
		t.Errorf("error %v, want %q", err, want)
	}
	if s := f.db.Stats(); s.CheckedOut != 0 {
		t.Errorf("%d connections are still out", s.CheckedOut)
	}
}

func TestExecutor_JobThatBringsItsConnectionDownEachTimeFails(t *testing.T) {
	t.Parallel()
	var runs atomic.Int32
	f := execute(t, func(ctx context.Context, job *tasks.Job, _ probe) (string, error) {
		runs.Add(1)
		_, err := job.DB.Exec(ctx, "SELECT pg_terminate_backend(pg_backend_pid())")
		return "", err
	})
	_, err := f.Wait(t, f.enqueue(t, "x", &tasks.EnqueueOptions{MaxRetry: tasks.NoRetry}))
	if want := "the database went away 6 times in a row while this job ran"; err == nil || !strings.Contains(err.Error(), want) {
		t.Errorf("error %v, want %q", err, want)
	}
	if n := runs.Load(); n != 6 {
		t.Errorf("it ran %d times", n)
	}
}

func TestExecutor_TransactionThatPostgresSacrificesIsRunAgainAtOnce(t *testing.T) {
	t.Parallel()
	b := setup(t)
	var runs atomic.Int32
	f := b.execute(t, b, func(s *tasks.Set) {
		tasks.RegisterTx(s, func(ctx context.Context, _ *tasks.Job, tx pgx.Tx, p probe) (string, error) {
			if n := runs.Add(1); n <= 3 {
				state := []string{"40001", "40P01"}[n%2]
				_, err := tx.Exec(ctx, fmt.Sprintf(`DO $$ BEGIN RAISE 'sacrificed' USING ERRCODE = '%s'; END $$`, state))
				return "", err
			}
			return p.Word, nil
		})
	})
	result, err := f.Wait(t, f.enqueue(t, "x", &tasks.EnqueueOptions{MaxRetry: tasks.NoRetry}))
	if string(result) != `"x"` || err != nil || runs.Load() != 4 {
		t.Errorf("result %s, error %v after %d runs", result, err, runs.Load())
	}
}

// probeTx is a probe in a transaction.
type probeTx struct{ probe }

func (probeTx) Kind() string { return "probe:tx" }

// A connection keeps the statements that it has prepared. What one of them returns may be
// changed by a migration while the worker runs.
func TestExecutor_MigrationThatChangesWhatAStatementReturnsUsesUpNoTry(t *testing.T) {
	t.Parallel()
	b := setup(t)
	const read = "SELECT * FROM words WHERE word = $1"
	pool := func(c *dbpool.Config) { c.Size, c.MaxOverflow = 1, 0 }
	f := b.executeWith(t, executionConfig{pool: pool}, func(s *tasks.Set) {
		tasks.Register(s, func(ctx context.Context, job *tasks.Job, p probe) (string, error) {
			_, err := job.DB.Exec(ctx, read, p.Word)
			return p.Word, err
		})
		tasks.RegisterTx(s, func(ctx context.Context, _ *tasks.Job, tx pgx.Tx, p probeTx) (string, error) {
			_, err := tx.Exec(ctx, read, p.Word)
			return p.Word, err
		})
	})
	migrate := func(sql string) {
		t.Helper()
		if _, err := f.db.Exec(t.Context(), sql); err != nil {
			t.Fatal(err)
		}
	}
	migrate("CREATE TABLE words (word text)")
	for i, p := range []tasks.Payload{probe{"x"}, probe{"x"}, probeTx{probe{"x"}}, probe{"x"}, probeTx{probe{"x"}}} {
		info, err := f.Client.Enqueue(t.Context(), p, &tasks.EnqueueOptions{MaxRetry: tasks.NoRetry})
		if err != nil {
			t.Fatal(err)
		}
		if result, err := f.Wait(t, info); string(result) != `"x"` || err != nil {
			t.Errorf("job %d: result %s, error %v", i, result, err)
		}
		migrate(fmt.Sprintf("ALTER TABLE words ADD COLUMN another%d int", i))
	}
}

func TestExecutor_SnoozedJobComesBackWithoutUsingUpATry(t *testing.T) {
	t.Parallel()
	var runs atomic.Int32
	f := execute(t, func(context.Context, *tasks.Job, probe) (string, error) {
		if runs.Add(1) < 3 {
			return "", tasks.Snooze(time.Millisecond)
		}
		return "awake", nil
	})
	result, err := f.Wait(t, f.enqueue(t, "x", &tasks.EnqueueOptions{MaxRetry: tasks.NoRetry}))
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

func TestExecutor_HandlerThatIgnoresItsContextIsReportedAndNotRunBesideItself(t *testing.T) {
	t.Parallel()
	var runs, atOnce atomic.Int32
	f := execute(t, func(_ context.Context, _ *tasks.Job, _ probe) (string, error) {
		if atOnce.Add(1) > 1 {
			t.Error("the job runs beside itself")
		}
		defer atOnce.Add(-1)
		if runs.Add(1) == 1 {
			sleepLikeAStone()
			return "", errors.New("too late")
		}
		return "", nil
	})
	info := f.enqueue(t, "x", &tasks.EnqueueOptions{Timeout: time.Second})
	f.log.Wait(t, "the handler goes on although its context has ended")
	if log := f.log.String(); !strings.Contains(log, "delivery.sleepLikeAStone") {
		t.Error("the report does not show where it is")
	}
	f.log.Wait(t, "the handler has ended at last")
	if _, err := f.Wait(t, info); err != nil {
		t.Error(err)
	}
	job := f.records(t, 2)[0]["job"].(map[string]any)
	if job["outcome"] != outcomeRetry || runs.Load() != 2 {
		t.Errorf("first %v, %d runs", job, runs.Load())
	}
}

func sleepLikeAStone() { time.Sleep(6 * time.Second) }

func TestExecutor_KindThatANewerWorkerKnowsIsLeftToIt(t *testing.T) {
	t.Parallel()
	b := setup(t)
	info, err := b.Client.Enqueue(t.Context(), probe{"x"}, nil)
	if err != nil {
		t.Fatal(err)
	}
	foreign := b.enqueueAsOthersDo(t)
	newer := new(tasks.Set)
	tasks.Register(newer, func(_ context.Context, _ *tasks.Job, p probe) (string, error) { return p.Word, nil })
	conn, err := pgx.Connect(t.Context(), b.DatabaseURL)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(context.Background())
	if err := tasks.RecordKinds(t.Context(), conn, newer); err != nil {
		t.Fatal(err)
	}
	older := b.execute(t, b, func(*tasks.Set) {})
	for _, r := range older.records(t, 2) {
		if job := r["job"].(map[string]any); job["outcome"] != outcomePostponed {
			t.Errorf("the older worker's record is %v", job)
		}
	}
	b.execute(t, b, func(s *tasks.Set) {
		tasks.Register(s, func(_ context.Context, _ *tasks.Job, p probe) (string, error) { return p.Word, nil })
	})
	for _, info := range []*tasks.Info{info, foreign} {
		if result, err := b.Wait(t, info); string(result) != `"x"` || err != nil {
			t.Errorf("result %s, error %v", result, err)
		}
	}
}

// enqueueAsOthersDo enqueues a probe in asynq's format, with a single try, which asynq
// alone archives whatever comes of it.
func (b *bundle) enqueueAsOthersDo(t *testing.T) *tasks.Info {
	t.Helper()
	info, err := asynq.NewClientFromRedisClient(b.Redis(t)).EnqueueContext(t.Context(),
		asynq.NewTask("probe", []byte(`{"word": "x"}`)), asynq.MaxRetry(0), asynq.Retention(time.Hour))
	if err != nil {
		t.Fatal(err)
	}
	return &tasks.Info{ID: info.ID, Queue: info.Queue}
}

func TestExecutor_LastTryOfAJobOfOthersMaySnoozeAndThenFail(t *testing.T) {
	t.Parallel()
	b := setup(t)
	var runs atomic.Int32
	var lost atomic.Bool
	f := b.executeWith(t, executionConfig{hook: losing{lost: &lost, is: endTo("retry")}}, func(s *tasks.Set) {
		tasks.Register(s, func(context.Context, *tasks.Job, probe) (string, error) {
			if runs.Add(1) < 3 {
				return "", tasks.Snooze(time.Millisecond)
			}
			return "", errors.New("not today")
		})
	})
	_, err := f.Wait(t, b.enqueueAsOthersDo(t))
	if err == nil || !strings.Contains(err.Error(), "not today") || runs.Load() != 3 {
		t.Errorf("error %v after %d runs; want two snoozes and a failure", err, runs.Load())
	}
	if !lost.Load() {
		t.Error("no answer was lost")
	}
}

// As after a failover.
func TestExecutor_JobsWaitWhileTheDatabaseTakesNoWrites(t *testing.T) {
	t.Parallel()
	b := setup(t)
	u, err := url.Parse(b.DatabaseURL)
	if err != nil {
		t.Fatal(err)
	}
	database := pgx.Identifier{strings.Trim(u.Path, "/")}.Sanitize()
	b.Exec(t, "CREATE TABLE effects (word text)")
	b.Exec(t, "ALTER DATABASE "+database+" SET default_transaction_read_only = on")
	f := b.execute(t, b, func(s *tasks.Set) {
		tasks.Register(s, func(ctx context.Context, job *tasks.Job, p probe) (any, error) {
			_, err := job.DB.Exec(ctx, "INSERT INTO effects VALUES ($1)", p.Word)
			return nil, err
		})
		tasks.RegisterTx(s, func(ctx context.Context, _ *tasks.Job, tx pgx.Tx, p otherProbe) (any, error) {
			_, err := tx.Exec(ctx, "INSERT INTO effects VALUES ($1)", p.Word)
			return nil, err
		})
	})
	var waiting []*tasks.Info
	for range 4 {
		waiting = append(waiting, f.enqueue(t, "x", &tasks.EnqueueOptions{MaxRetry: tasks.NoRetry}))
		info, err := f.Client.Enqueue(t.Context(), otherProbe{probe{"x"}}, &tasks.EnqueueOptions{MaxRetry: tasks.NoRetry})
		if err != nil {
			t.Fatal(err)
		}
		waiting = append(waiting, info)
	}
	f.log.Wait(t, "the database is away")
	conn, err := pgx.Connect(t.Context(), b.DatabaseURL)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(context.Background())
	for _, sql := range []string{
		"SET default_transaction_read_only = off",
		"ALTER DATABASE " + database + " RESET default_transaction_read_only",
		"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()",
	} {
		if _, err := conn.Exec(t.Context(), sql); err != nil {
			t.Fatal(err)
		}
	}
	for _, info := range waiting {
		if _, err := f.Wait(t, info); err != nil {
			t.Error(err)
		}
	}
}

// A worker that slept beyond its lease.
func TestExecutor_RunThatHasLostItsLeaseEndsNothing(t *testing.T) {
	t.Parallel()
	f := &Executor{}
	job := &tasks.Job{Attempt: 4, MaxRetry: 3}
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(errLeaseLost)
	if outcome := f.outcome(ctx, job, ctx.Err()); outcome != outcomeLost {
		t.Errorf("the outcome is %s", outcome)
	}
}
