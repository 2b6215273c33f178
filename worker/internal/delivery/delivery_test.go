package delivery

import (
	"context"
	"errors"
	"fmt"
	"math"
	"net/url"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hibiken/asynq"
	"github.com/jackc/pgx/v5"
	"github.com/redis/go-redis/v9"

	"github.com/carpool-go/carpool/dbpool"
	"github.com/carpool-go/carpool/internal/asynqwire"
	"github.com/carpool-go/carpool/tasks"
	"github.com/carpool-go/carpool/worker/internal/workertest"
)

// txProbe registers a transactional probe that counts its runs.
func txProbe(runs *atomic.Int32) func(*tasks.Set) {
	return func(s *tasks.Set) {
		tasks.RegisterTx(s, func(ctx context.Context, _ *tasks.Job, tx pgx.Tx, p probe) (string, error) {
			runs.Add(1)
			return p.Word, nil
		})
	}
}

// The machine is gone, and its session stays until the server notices.
func TestExecutor_SessionOfAVanishedRunIsEndedWithinAShortTimeoutToo(t *testing.T) {
	t.Parallel()
	b := setup(t)
	conn, err := pgx.Connect(t.Context(), b.DatabaseURL)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(context.Background())
	info, err := b.Client.Enqueue(t.Context(), probe{"x"}, &tasks.EnqueueOptions{MaxRetry: 1, Timeout: 5 * time.Second})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := conn.Exec(t.Context(), "BEGIN; SELECT pg_advisory_xact_lock(hashtextextended('carpool job "+info.ID+" probe', 0))"); err != nil {
		t.Fatal(err)
	}
	var runs atomic.Int32
	f := b.execute(t, b, txProbe(&runs))
	result, err := f.Wait(t, info)
	if err != nil || string(result) != `"x"` {
		t.Errorf("result %s, error %v after %d runs", result, err, runs.Load())
	}
}

func TestExecutor_AnyNumberOfRetriesIsTaken(t *testing.T) {
	t.Parallel()
	for name, n := range map[string]int{"MaxInt32": math.MaxInt32, "MaxInt": math.MaxInt} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var runs atomic.Int32
			f := execute(t, func(context.Context, *tasks.Job, probe) (string, error) {
				if runs.Add(1) == 1 {
					return "", tasks.RetryAfter(time.Millisecond, errors.New("not yet"))
				}
				return "ok", nil
			})
			if result, err := f.Wait(t, f.enqueue(t, "x", &tasks.EnqueueOptions{MaxRetry: n})); err != nil {
				t.Errorf("result %s, error %v after %d runs", result, err, runs.Load())
			}
		})
	}
}

func TestExecutor_RowsLeftOpenAreTheHandlersFailureAndNoOutage(t *testing.T) {
	t.Parallel()
	b := setup(t)
	var runs atomic.Int32
	f := b.execute(t, b, func(s *tasks.Set) {
		tasks.RegisterTx(s, func(ctx context.Context, _ *tasks.Job, tx pgx.Tx, p probe) (string, error) {
			runs.Add(1)
			rows, err := tx.Query(ctx, "SELECT generate_series(1, 100000)")
			if err != nil {
				return "", err
			}
			rows.Next() // the first is all it wants, and forgets Close
			return "", nil
		})
	})
	_, err := f.Wait(t, f.enqueue(t, "x", &tasks.EnqueueOptions{MaxRetry: tasks.NoRetry}))
	if runs.Load() != 1 || strings.Contains(f.log.String(), "the database is away") {
		t.Errorf("%d runs for one try; error %v; the breaker was open: %v", runs.Load(), err, strings.Contains(f.log.String(), "the database is away"))
	}
}

// As when a machine dies in an outage that took the others as well, and lasts longer
// than the job's timeout.
func TestExecutor_JobThatIsRecordedIsDoneAlsoIfPostgresIsAwayWhenThatIsLookedUp(t *testing.T) {
	t.Parallel()
	b := setup(t)
	at, postgres, _ := b.behindProxies(t)
	rdb := b.Redis(t)
	r := startRescue(t, rdb, []string{"default"}, 2*time.Second, workertest.Discard())
	defer r.Stop()
	recorded, lost := b.unacknowledged(t)
	var runs atomic.Int32
	f := b.execute(t, at, txProbe(&runs))
	postgres.Refuse()
	postgres.Reset()
	time.AfterFunc(6*time.Second, postgres.Heal)
	if result, err := f.Wait(t, recorded); err != nil || string(result) != `"first"` {
		t.Errorf("result %s, error %v; want the first run's result", result, err)
	}
	if _, err := f.Wait(t, lost); err == nil || !strings.Contains(err.Error(), "given up: its worker died, or lost its lease, while it ran (try 1)") {
		t.Errorf("the one without a record: error %v; want it given up", err)
	}
	if runs.Load() != 0 {
		t.Errorf("they were run %d times", runs.Load())
	}
}

// unacknowledged returns two jobs whose workers have died on their last try: after
// the commit, and before.
func (b *bundle) unacknowledged(t *testing.T) (recorded, lost *tasks.Info) {
	t.Helper()
	for _, info := range []**tasks.Info{&recorded, &lost} {
		var err error
		if *info, err = b.Client.Enqueue(t.Context(), probe{"x"}, &tasks.EnqueueOptions{MaxRetry: tasks.NoRetry, Timeout: 2 * time.Second}); err != nil {
			t.Fatal(err)
		}
		dies(t, b.Redis(t), *info)
	}
	conn, err := pgx.Connect(t.Context(), b.DatabaseURL)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(context.Background())
	if _, err := conn.Exec(t.Context(), `INSERT INTO carpool.jobs_done (id, kind, queue, result) VALUES ($1, 'probe', 'default', '"first"')`, recorded.ID); err != nil {
		t.Fatal(err)
	}
	return recorded, lost
}

func TestExecutor_JobThatWasGivenUpAndPutBackMaySnoozeAndFail(t *testing.T) {
	t.Parallel()
	b := setup(t)
	r := startRescue(t, b.Redis(t), []string{"default"}, time.Second, workertest.Discard())
	defer r.Stop()
	_, info := b.unacknowledged(t)
	var runs atomic.Int32
	f := b.execute(t, b, func(s *tasks.Set) {
		tasks.Register(s, func(context.Context, *tasks.Job, probe) (string, error) {
			switch runs.Add(1) {
			case 1:
				return "", tasks.Snooze(time.Millisecond)
			case 2:
				return "", errors.New("not today")
			}
			return "awake", nil
		})
	})
	if _, err := f.Wait(t, info); err == nil {
		t.Fatal("want it given up first")
	}
	if err := b.Inspector.RunTask("default", info.ID); err != nil {
		t.Fatal(err)
	}
	if _, err := f.Wait(t, info); err == nil || !strings.Contains(err.Error(), "not today") || runs.Load() != 2 {
		t.Errorf("put back: error %v after %d runs; want a snooze and a failure", err, runs.Load())
	}
	if err := b.Inspector.RunTask("default", info.ID); err != nil {
		t.Fatal(err)
	}
	if result, err := f.Wait(t, info); err != nil || runs.Load() != 3 {
		t.Errorf("put back again: result %s, error %v after %d runs", result, err, runs.Load())
	}
}

// otherProbe is a probe of another kind.
type otherProbe struct{ probe }

func (otherProbe) Kind() string { return "other" }

func TestExecutor_JobsOfOneIDOnTwoQueuesAreTwo(t *testing.T) {
	t.Parallel()
	b := setup(t)
	started, end := make(chan struct{}), make(chan struct{})
	f := b.executeWith(t, executionConfig{queues: map[string]int{"default": 1, "bulk": 1}}, func(s *tasks.Set) {
		tasks.Register(s, func(context.Context, *tasks.Job, probe) (string, error) {
			close(started)
			<-end
			return "", nil
		})
		tasks.Register(s, func(context.Context, *tasks.Job, otherProbe) (string, error) { return "ok", nil })
	})
	defer close(end)
	f.enqueue(t, "long", &tasks.EnqueueOptions{ID: "order-17", Queue: "bulk"})
	<-started
	info, err := f.Client.Enqueue(t.Context(), otherProbe{probe{"x"}}, &tasks.EnqueueOptions{ID: "order-17"})
	if err != nil {
		t.Fatal(err)
	}
	if result, err := f.Wait(t, info); err != nil || string(result) != `"ok"` {
		t.Errorf("result %s, error %v", result, err)
	}
}

func TestExecutor_PoolThatOthersHoldUsesUpNoTry(t *testing.T) {
	t.Parallel()
	b := setup(t)
	f := b.executeWith(t, executionConfig{pool: func(c *dbpool.Config) {
		c.Size, c.MaxOverflow, c.Timeout = 1, 0, 500*time.Millisecond
	}}, func(s *tasks.Set) {
		tasks.RegisterTx(s, func(ctx context.Context, _ *tasks.Job, tx pgx.Tx, p probe) (string, error) {
			if p.Word == "long" {
				_, err := tx.Exec(ctx, "SELECT pg_sleep(5)")
				return "", err
			}
			return p.Word, nil
		})
	})
	f.enqueue(t, "long", nil)
	workertest.Eventually(t, "it has the connection", func() bool { return f.db.Stats().CheckedOut == 1 })
	if result, err := f.Wait(t, f.enqueue(t, "short", &tasks.EnqueueOptions{MaxRetry: tasks.NoRetry})); err != nil {
		t.Errorf("result %s, error %v", result, err)
	}
	if strings.Contains(f.log.String(), "the database is away") {
		t.Error("a busy pool is taken for an outage")
	}
}

// Redis has forgotten the fetch, and neither worker knows that it has lost the job.
func TestExecutor_TwoLivingRunsDoNotEndEachOtherForEver(t *testing.T) {
	t.Parallel()
	for name, delay := range map[string]time.Duration{
		"the first one waits for the database":                 0,
		"the first one is postponed, and was the other's then": lastSlotWait / 2,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := setup(t)
			rdb := b.Redis(t)
			var runs atomic.Int32
			register := func(s *tasks.Set) {
				tasks.RegisterTx(s, func(ctx context.Context, _ *tasks.Job, tx pgx.Tx, _ probe) (string, error) {
					runs.Add(1)
					_, err := tx.Exec(ctx, "SELECT pg_sleep(16)")
					return "ok", err
				})
			}
			at, postgres, _ := b.behindProxies(t)
			b.executeWith(t, executionConfig{at: at, slots: 1}, register)
			info, err := b.Client.Enqueue(t.Context(), probe{"x"}, &tasks.EnqueueOptions{MaxRetry: tasks.NoRetry})
			if err != nil {
				t.Fatal(err)
			}
			workertest.Eventually(t, "it runs", func() bool { return runs.Load() == 1 })
			postgres.Delay(delay)
			pipe := rdb.TxPipeline()
			pipe.LRem(t.Context(), asynqwire.Active("default"), 1, info.ID)
			pipe.ZRem(t.Context(), asynqwire.Leases("default"), info.ID)
			pipe.LPush(t.Context(), asynqwire.Pending("default"), info.ID)
			pipe.HSet(t.Context(), asynqwire.Task("default", info.ID), "state", "pending")
			if _, err := pipe.Exec(t.Context()); err != nil {
				t.Fatal(err)
			}
			b.executeWith(t, executionConfig{slots: 1}, register)
			if result, err := b.Wait(t, info); err != nil || runs.Load() != 2 {
				t.Errorf("result %s, error %v after %d runs; want that the second ends the first, and no more", result, err, runs.Load())
			}
		})
	}
}

// A reset may come between a fetch and its answer.
func TestExecutor_ResetsOfRedisCostNoTry(t *testing.T) {
	t.Parallel()
	b := setup(t)
	at, _, proxy := b.behindProxies(t)
	r := startRescue(t, b.Redis(t), []string{"default"}, 4*time.Second, workertest.Discard())
	defer r.Stop()
	var lost atomic.Bool
	fetch := func(cmd redis.Cmder) bool {
		return strings.Contains(fmt.Sprint(cmd.Args()...), "}:paused") && strings.Contains(cmd.String(), "probe")
	}
	f := b.executeWith(t, executionConfig{at: at, hook: losing{lost: &lost, is: fetch}}, func(s *tasks.Set) {
		tasks.Register(s, func(context.Context, *tasks.Job, probe) (any, error) { return nil, nil })
	})
	var jobs []*tasks.Info
	for i := range 300 {
		jobs = append(jobs, f.enqueue(t, "x", &tasks.EnqueueOptions{MaxRetry: tasks.NoRetry}))
		if i%30 == 0 {
			proxy.Reset()
		}
	}
	for _, info := range jobs {
		if _, err := f.Wait(t, info); err != nil {
			t.Error(err)
		}
	}
	if !lost.Load() {
		t.Error("no fetch was lost")
	}
}

// As when credentials are rotated, or each deploy has a role of its own.
func TestExecutor_RunOfAnotherRoleIsWaitedForAndUsesUpNoTry(t *testing.T) {
	t.Parallel()
	b := setup(t)
	at, proxy, _ := b.behindProxies(t)
	admin, err := pgx.Connect(t.Context(), b.DatabaseURL)
	if err != nil {
		t.Fatal(err)
	}
	defer admin.Close(context.Background())
	role := fmt.Sprintf("rotated_%d", time.Now().UnixNano())
	if _, err := admin.Exec(t.Context(), "CREATE ROLE "+role+" LOGIN PASSWORD 'x'; GRANT USAGE ON SCHEMA carpool TO "+role+
		"; GRANT ALL ON ALL TABLES IN SCHEMA carpool TO "+role); err != nil {
		t.Fatal(err)
	}
	defer func() { _, _ = admin.Exec(context.Background(), "DROP OWNED BY "+role+"; DROP ROLE "+role) }()
	holder, err := admin.Begin(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	var jobs []*tasks.Info
	for range 8 {
		info, err := b.Client.Enqueue(t.Context(), probe{"x"}, &tasks.EnqueueOptions{MaxRetry: tasks.NoRetry, Timeout: 3 * time.Second})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := holder.Exec(t.Context(), "SELECT pg_advisory_xact_lock(hashtextextended('carpool job "+info.ID+" probe', 0))"); err != nil {
			t.Fatal(err)
		}
		jobs = append(jobs, info)
	}
	proxy.Delay(40 * time.Millisecond) // so that some are amid a round trip when their time is up
	var runs atomic.Int32
	f := b.executeWith(t, executionConfig{slots: 8, pool: func(c *dbpool.Config) {
		u, err := url.Parse(at.DatabaseURL)
		if err != nil {
			t.Fatal(err)
		}
		u.User = url.UserPassword(role, "x")
		c.URL = u.String()
	}}, txProbe(&runs))
	for _, r := range f.records(t, 8) {
		if job := r["job"].(map[string]any); job["outcome"] != outcomePostponed {
			t.Errorf("the record is %v, %v; want it postponed", job, r["error"])
		}
	}
	if err := holder.Rollback(t.Context()); err != nil {
		t.Fatal(err)
	}
	for _, info := range jobs {
		if result, err := f.Wait(t, info); err != nil {
			t.Errorf("result %s, error %v", result, err)
		}
	}
	// A first delivery finds the other run with its first statement, a second one before the handler.
	var recorded int
	if err := admin.QueryRow(t.Context(), "SELECT count(*) FROM carpool.jobs_done").Scan(&recorded); err != nil || runs.Load() != 16 || recorded != 8 {
		t.Errorf("%d runs, %d jobs are recorded, error %v; want 16 and 8", runs.Load(), recorded, err)
	}
	f.log.Wait(t, "GRANT pg_signal_backend")
	f.stop()
	f.db.Close() // before the role goes
}

// It has lost its lease, and doesn't know yet.
func TestExecutor_SpentJobIsNotGivenUpWhileAnEarlierRunMayCommit(t *testing.T) {
	t.Parallel()
	b := setup(t)
	rdb := b.Redis(t)
	r := startRescue(t, rdb, []string{"default"}, 8*time.Second, workertest.Discard())
	defer r.Stop()
	info, err := b.Client.Enqueue(t.Context(), probe{"x"}, &tasks.EnqueueOptions{MaxRetry: tasks.NoRetry})
	if err != nil {
		t.Fatal(err)
	}
	sleeper, err := pgx.Connect(t.Context(), b.DatabaseURL)
	if err != nil {
		t.Fatal(err)
	}
	defer sleeper.Close(context.Background())
	if _, err := sleeper.Exec(t.Context(), "BEGIN; SELECT pg_advisory_xact_lock(hashtextextended('carpool job "+info.ID+" probe', 0))"); err != nil {
		t.Fatal(err)
	}
	dies(t, rdb, info)
	var runs atomic.Int32
	f := b.execute(t, b, txProbe(&runs))
	if _, err := f.Wait(t, info); err == nil {
		t.Error("want it given up")
	}
	if _, err := sleeper.Exec(t.Context(), "COMMIT"); err == nil {
		t.Error("the earlier run has committed after that")
	}
}

// A migration has the table locked.
func TestExecutor_SpentJobWhoseRecordCannotBeReadJustNowIsPostponed(t *testing.T) {
	t.Parallel()
	b := setup(t)
	r := startRescue(t, b.Redis(t), []string{"default"}, 2*time.Second, workertest.Discard())
	defer r.Stop()
	recorded, _ := b.unacknowledged(t)
	admin, err := pgx.Connect(t.Context(), b.DatabaseURL)
	if err != nil {
		t.Fatal(err)
	}
	defer admin.Close(context.Background())
	if _, err := admin.Exec(t.Context(), "BEGIN; LOCK TABLE carpool.jobs_done IN ACCESS EXCLUSIVE MODE"); err != nil {
		t.Fatal(err)
	}
	var runs atomic.Int32
	f := b.executeWith(t, executionConfig{pool: func(c *dbpool.Config) {
		u, err := url.Parse(b.DatabaseURL)
		if err != nil {
			t.Fatal(err)
		}
		q := u.Query()
		q.Set("lock_timeout", "500")
		u.RawQuery = q.Encode()
		c.URL = u.String()
	}}, txProbe(&runs))
	f.records(t, 1)
	if _, err := admin.Exec(t.Context(), "ROLLBACK"); err != nil {
		t.Fatal(err)
	}
	if result, err := f.Wait(t, recorded); err != nil || string(result) != `"first"` {
		t.Errorf("result %s, error %v; want the first run's result", result, err)
	}
}

// By a worker of the last deploy, whose payload had one field more.
func TestExecutor_JobThatIsRecordedIsDoneAlsoIfItsPayloadIsNotTakenAnyMore(t *testing.T) {
	t.Parallel()
	b := setup(t)
	b.Exec(t, `INSERT INTO carpool.jobs_done (id, kind, queue, result) VALUES ('done-17', 'probe', 'default', '"first"')`)
	info, err := asynq.NewClientFromRedisClient(b.Redis(t)).EnqueueContext(t.Context(),
		asynq.NewTask("probe", []byte(`{"word": "x", "an_old_field": 1}`)), asynq.TaskID("done-17"), asynq.Retention(time.Hour))
	if err != nil {
		t.Fatal(err)
	}
	var runs atomic.Int32
	f := b.execute(t, b, txProbe(&runs))
	if result, err := f.WaitFor(t, info.Queue, info.ID); err != nil || string(result) != `"first"` {
		t.Errorf("result %s, error %v; want the first run's result", result, err)
	}
}

// pgx closes the connection of a statement that is broken off.
func TestExecutor_StatementThatTheHandlerBrokeOffIsNoOutage(t *testing.T) {
	t.Parallel()
	b := setup(t)
	var runs atomic.Int32
	f := b.execute(t, b, func(s *tasks.Set) {
		tasks.RegisterTx(s, func(ctx context.Context, _ *tasks.Job, tx pgx.Tx, p probe) (string, error) {
			runs.Add(1)
			short, cancel := context.WithTimeout(ctx, time.Second) // long enough for it to be sent
			defer cancel()
			_, _ = tx.Exec(short, "SELECT pg_sleep(5)") // it can do without
			return "", nil
		})
	})
	_, err := f.Wait(t, f.enqueue(t, "x", &tasks.EnqueueOptions{MaxRetry: tasks.NoRetry}))
	if err == nil || runs.Load() != 1 || strings.Contains(f.log.String(), "the database is away") {
		t.Errorf("%d runs for one try; error %v; the breaker was open: %v", runs.Load(), err, strings.Contains(f.log.String(), "the database is away"))
	}
}

// Its own, of a request that it broke off for example: nobody has cancelled the job.
func TestExecutor_HandlersOwnContextErrorIsAFailureLikeOthers(t *testing.T) {
	t.Parallel()
	for name, own := range map[string]error{"canceled": context.Canceled, "deadline exceeded": context.DeadlineExceeded} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var runs atomic.Int32
			f := execute(t, func(context.Context, *tasks.Job, probe) (string, error) {
				if runs.Add(1) == 1 {
					return "", own
				}
				return "ok", nil
			})
			if result, err := f.Wait(t, f.enqueue(t, "x", nil)); err != nil {
				t.Errorf("result %s, error %v", result, err)
			}
			if job := f.records(t, 1)[0]["job"].(map[string]any); job["outcome"] != outcomeRetry {
				t.Errorf("the record is %v", job)
			}
		})
	}
}

// brokenError is an error of a handler that is a nil pointer.
type brokenError struct{ text string }

func (e *brokenError) Error() string { return e.text }

func TestExecutor_ErrorThatPanicsIsTheHandlersFailure(t *testing.T) {
	t.Parallel()
	var runs atomic.Int32
	f := execute(t, func(context.Context, *tasks.Job, probe) (string, error) {
		runs.Add(1)
		var e *brokenError
		return "", e
	})
	_, err := f.Wait(t, f.enqueue(t, "x", &tasks.EnqueueOptions{MaxRetry: tasks.NoRetry}))
	if err == nil || !strings.Contains(err.Error(), "panic: ") || runs.Load() != 1 {
		t.Errorf("error %v after %d runs", err, runs.Load())
	}
}
