package delivery

import (
	"context"
	"errors"
	"net/url"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hibiken/asynq"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/carpool-go/carpool/dbpool"
	"github.com/carpool-go/carpool/tasks"
	"github.com/carpool-go/carpool/worker/internal/workertest"
)

func TestExecutor_AServerThatHasRunOutOfSomethingUsesUpNoTry(t *testing.T) {
	t.Parallel()
	for code, outcomes := range map[string][]string{
		"53100": {outcomePostponed, outcomePostponed, outcomeDone}, // disk_full
		"53200": {outcomePostponed, outcomePostponed, outcomeDone}, // out_of_memory
		"53400": {outcomeRetry, outcomeRetry, outcomeDone},         // the session's temporary files are too large
	} {
		t.Run(code, func(t *testing.T) {
			t.Parallel()
			b := setup(t)
			var runs atomic.Int32
			f := b.execute(t, b, func(s *tasks.Set) {
				tasks.RegisterTx(s, func(ctx context.Context, _ *tasks.Job, tx pgx.Tx, _ probe) (string, error) {
					if runs.Add(1) > 2 {
						return "done", nil
					}
					_, err := tx.Exec(ctx, "DO $$ BEGIN RAISE EXCEPTION USING ERRCODE = '"+code+"'; END $$")
					return "", err
				})
			})
			if _, err := f.Wait(t, f.enqueue(t, "x", nil)); err != nil {
				t.Fatal(err)
			}
			attempt := 1.0
			for i, record := range f.records(t, len(outcomes)) {
				job := record["job"].(map[string]any)
				if job["outcome"] != outcomes[i] || job["attempt"] != attempt {
					t.Errorf("record %d is %v; want %s in attempt %v", i, job, outcomes[i], attempt)
				}
				if outcomes[i] == outcomeRetry {
					attempt++
				}
			}
		})
	}
}

func TestExecutor_AServerThatRunsOutOfSomethingTooOftenInARowIsTheJobsDoing(t *testing.T) {
	t.Parallel()
	x := &Executor{breaker: newBreaker(nil, 1, workertest.Discard())}
	full := &pgconn.PgError{Code: "53100"}
	for n := 1; n <= maxOutages; n++ {
		err := x.exhausted(&tasks.Job{ID: "a"}, full)
		delay := time.Second << n
		if e, ok := errors.AsType[*postponedError](err); !ok || e.delay < delay/2 || e.delay > delay*3/2 {
			t.Errorf("time %d: %v; want it postponed by about %s", n, err, delay)
		}
	}
	if err := x.exhausted(&tasks.Job{ID: "a"}, full); !isFailure(err) || !errors.Is(err, full) {
		t.Errorf("after that: %v; want a failure", err)
	}
	if err := x.exhausted(&tasks.Job{ID: "a"}, full); isFailure(err) {
		t.Errorf("they are not counted anew: %v", err)
	}
}

// As a migration does, or a role whose statements end soon.
func TestExecutor_AJobThatCannotBeginUsesUpNoTry(t *testing.T) {
	t.Parallel()
	b := setup(t)
	migration, err := pgx.Connect(t.Context(), b.DatabaseURL)
	if err != nil {
		t.Fatal(err)
	}
	defer migration.Close(context.Background())
	if _, err := migration.Exec(t.Context(), "BEGIN; LOCK carpool.jobs_done IN ACCESS EXCLUSIVE MODE"); err != nil {
		t.Fatal(err)
	}
	for name, register := range map[string]func(*tasks.Set){
		"RegisterTx": func(s *tasks.Set) {
			tasks.RegisterTx(s, func(context.Context, *tasks.Job, pgx.Tx, probe) (string, error) { return "done", nil })
		},
		"RegisterOnce": func(s *tasks.Set) {
			tasks.RegisterOnce(s, func(ctx context.Context, job *tasks.Job, _ probe) (string, error) {
				return tasks.Once(ctx, job, func(pgx.Tx) (string, error) { return "done", nil })
			})
		},
	} {
		f := b.executeWith(t, executionConfig{queues: map[string]int{name: 1}, pool: func(c *dbpool.Config) {
			u, err := url.Parse(c.URL)
			if err != nil {
				t.Fatal(err)
			}
			query := u.Query()
			query.Set("statement_timeout", "100ms")
			u.RawQuery = query.Encode()
			c.URL = u.String()
		}}, register)
		info := f.enqueue(t, "x", &tasks.EnqueueOptions{Queue: name})
		for _, record := range f.records(t, 2) {
			if job := record["job"].(map[string]any); job["outcome"] != outcomePostponed || job["attempt"] != 1.0 {
				t.Errorf("%s: the record is %v; want it postponed in its first attempt", name, job)
			}
		}
		got, err := f.Inspector.GetTaskInfo(name, info.ID)
		if err != nil || got.Retried != 0 {
			t.Errorf("%s: %d tries are used up, error %v", name, got.Retried, err)
		}
		f.stop()
	}
}

func TestExecutor_WhatOnlyAGrantCanMendWaitsForMinutesAndIsNamed(t *testing.T) {
	t.Parallel()
	b := setup(t)
	role := "worker_" + strings.TrimPrefix(mustParse(t, b.DatabaseURL).Path, "/")
	b.Exec(t, "CREATE ROLE "+role+" LOGIN PASSWORD 'x'")
	t.Cleanup(func() {
		conn, err := pgx.Connect(context.Background(), b.DatabaseURL)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close(context.Background())
		if _, err := conn.Exec(context.Background(), "DROP ROLE "+role); err != nil {
			t.Error(err)
		}
	})
	f := b.executeWith(t, executionConfig{pool: func(c *dbpool.Config) {
		u := mustParse(t, c.URL)
		u.User = url.UserPassword(role, "x")
		c.URL = u.String()
	}}, func(s *tasks.Set) {
		tasks.RegisterTx(s, func(context.Context, *tasks.Job, pgx.Tx, probe) (string, error) { return "done", nil })
	})
	info := f.enqueue(t, "x", nil)
	f.log.Wait(t, "transactional jobs can't begin")
	if job := f.records(t, 1)[0]["job"].(map[string]any); job["outcome"] != outcomePostponed {
		t.Errorf("the record is %v", job)
	}
	workertest.Eventually(t, "it is to be tried again", func() bool {
		got, err := f.Inspector.GetTaskInfo("default", info.ID)
		return err == nil && got.State == asynq.TaskStateRetry && got.Retried == 0 && time.Until(got.NextProcessAt) > 30*time.Second
	})
	if why := f.breaker.Blocked(); !strings.Contains(why, "42501") {
		t.Errorf("why jobs can't begin is %q", why)
	}
	if fault, err := f.breaker.Check(t.Context()); fault != "it answers, but transactional jobs can't begin; the log says why" || err == nil {
		t.Errorf("a check says %q, error %v", fault, err)
	}
	f.breaker.unblock()
	if why := f.breaker.Blocked(); why != "" {
		t.Errorf("after a job has ended well it is %q", why)
	}
}

func mustParse(t *testing.T, raw string) *url.URL {
	t.Helper()
	u, err := url.Parse(raw)
	if err != nil {
		t.Fatal(err)
	}
	return u
}
