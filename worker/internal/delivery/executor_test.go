package delivery

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/hibiken/asynq"
	"github.com/redis/go-redis/v9"

	"github.com/carpool-go/carpool/dbpool"
	"github.com/carpool-go/carpool/internal/unique"
	"github.com/carpool-go/carpool/tasks"
	"github.com/carpool-go/carpool/worker/internal/workertest"
)

// probe is a job whose handler each test brings along.
type probe struct {
	Word string `json:"word"`
}

func (probe) Kind() string { return "probe" }
func (probe) Options() tasks.Options {
	return tasks.Options{MaxRetry: 3, Timeout: time.Minute, Retention: time.Hour}
}

func (p probe) Validate() error {
	if p.Word == "" {
		return errors.New("word: must not be empty")
	}
	return nil
}

// execution runs an executor with one handler in this process.
type execution struct {
	*bundle
	log     *workertest.Log
	db      *dbpool.Pool
	breaker *Breaker
	servers *Servers
	locks   *unique.Locks
	stop    func() // stops it before the test's end
}

func execute(t *testing.T, handler tasks.Handler[probe, string]) *execution {
	t.Helper()
	b := setup(t)
	return b.execute(t, b, func(s *tasks.Set) { tasks.Register(s, handler) })
}

// execute runs an executor with 4 slots on the servers of the bundle that are at the
// addresses in at.
func (b *bundle) execute(t *testing.T, at *bundle, register func(*tasks.Set)) *execution {
	t.Helper()
	return b.executeWith(t, executionConfig{at: at}, register)
}

// executionConfig is what a test may want otherwise.
type executionConfig struct {
	at     *bundle        // the addresses of the servers; nil: the bundle's own
	queues map[string]int // nil: default
	slots  int            // 0: 4
	pool   func(*dbpool.Config)
	hook   redis.Hook // on the Redis client of the servers
	// retryDelay is in place of the one with chance; nil: that one.
	retryDelay func(retried int, err error) time.Duration
}

func (b *bundle) executeWith(t *testing.T, c executionConfig, register func(*tasks.Set)) *execution {
	t.Helper()
	if c.at == nil {
		c.at = b
	}
	if c.slots == 0 {
		c.slots = 4
	}
	if c.queues == nil {
		c.queues = map[string]int{"default": 1}
	}
	x := &execution{bundle: b, log: workertest.NewLog()}
	log := slog.New(slog.NewJSONHandler(x.log, &slog.HandlerOptions{Level: slog.LevelDebug}))
	cfg := dbpool.DefaultConfig(c.at.DatabaseURL)
	cfg.Logger = workertest.Discard()
	if c.pool != nil {
		c.pool(&cfg)
	}
	var err error
	if x.db, err = dbpool.Open(t.Context(), cfg); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(x.db.Close)
	set := new(tasks.Set)
	register(set)
	servers := c.at.Redis(t)
	if c.hook != nil {
		servers.AddHook(c.hook)
	}
	d := New(Config{
		Tasks: set, Redis: c.at.Redis(t), ServersRedis: servers, LooksRedis: c.at.Redis(t), DB: x.db,
		Queues: c.queues, OwnQueue: "instance-of-" + t.Name(), Concurrency: c.slots,
		ShutdownTimeout: time.Second, BaseContext: context.Background(), Fail: func(err error) { t.Error(err) }, Log: log,
	})
	x.breaker, x.servers, x.locks = d.Breaker, d.Servers, d.Executor.locks
	// A client that enqueues where the test does, also while the executor can't.
	d.Executor.client = b.Client
	if c.retryDelay != nil {
		d.Executor.retryDelay = c.retryDelay
	}
	t.Cleanup(d.Breaker.Stop)
	if err := d.Servers.Start(); err != nil {
		t.Fatal(err)
	}
	if err := d.Executor.Start(); err != nil {
		t.Fatal(err)
	}
	x.stop = sync.OnceFunc(func() { d.Servers.Stop(); d.Executor.Stop() })
	t.Cleanup(x.stop)
	return x
}

func (f *execution) enqueue(t *testing.T, word string, opts *tasks.EnqueueOptions) *tasks.Info {
	t.Helper()
	info, err := f.Client.Enqueue(t.Context(), probe{word}, opts)
	if err != nil {
		t.Fatal(err)
	}
	return info
}

// records waits for n records of jobs and returns them.
func (f *execution) records(t *testing.T, n int) []map[string]any {
	t.Helper()
	var found []map[string]any
	workertest.Eventually(t, fmt.Sprintf("there are %d records", n), func() bool {
		found = nil
		for line := range strings.Lines(f.log.String()) {
			var r map[string]any
			if json.Unmarshal([]byte(line), &r) == nil && r["msg"] == "job" {
				found = append(found, r)
			}
		}
		return len(found) >= n
	})
	return found
}

func TestExecutor_RecordHasExactlyTheKeysThatLogSearchesRelyOn(t *testing.T) {
	t.Parallel()
	f := execute(t, func(ctx context.Context, job *tasks.Job, p probe) (string, error) {
		if p.Word == "bad" {
			return "", tasks.Permanent(errors.New("no"))
		}
		_, err := job.DB.Exec(ctx, "SELECT 1")
		return "", err
	})
	good := f.enqueue(t, "good", nil)
	if _, err := f.Wait(t, good); err != nil {
		t.Fatal(err)
	}
	f.enqueue(t, "bad", nil)

	keys := func(m any) []string {
		var ks []string
		for k := range m.(map[string]any) {
			ks = append(ks, k)
		}
		slices.Sort(ks)
		return ks
	}
	for i, r := range f.records(t, 2) {
		top := []string{"db", "job", "level", "msg", "pool", "time"}
		if i == 1 {
			top = append(top[:1:1], append([]string{"error"}, top[1:]...)...)
		}
		for group, want := range map[string][]string{
			"":     top,
			"job":  {"attempt", "id", "kind", "outcome", "queue", "took_ms"},
			"db":   {"acquires", "held_ms", "queries", "wait_ms"},
			"pool": {"checked_in", "checked_out", "invalid", "overflow", "pool_size", "waiting"},
		} {
			got := keys(r)
			if group != "" {
				got = keys(r[group])
			}
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("record %d, group %q: (-want +got)\n%s", i, group, diff)
			}
		}
	}
	r := f.records(t, 2)[0]
	job, db := r["job"].(map[string]any), r["db"].(map[string]any)
	if r["level"] != "DEBUG" || job["id"] != good.ID || job["kind"] != "probe" || job["queue"] != "default" ||
		job["attempt"] != 1.0 || job["outcome"] != "done" || db["acquires"] != 1.0 || db["queries"] != 1.0 {
		t.Errorf("the record of a job that ran one query: %v", r)
	}
	if r := f.records(t, 2)[1]; r["level"] != "ERROR" || r["error"] != "no" {
		t.Errorf("the record of a job that was given up: %v", r)
	}
}

func TestExecutor_ResultIsKeptWithTheJob(t *testing.T) {
	t.Parallel()
	f := execute(t, func(ctx context.Context, job *tasks.Job, p probe) (string, error) {
		var word string
		err := job.DB.QueryRow(ctx, "SELECT upper($1)", p.Word).Scan(&word)
		return word, err
	})
	result, err := f.Wait(t, f.enqueue(t, "hello", nil))
	if err != nil || string(result) != `"HELLO"` {
		t.Errorf("result %s, error %v", result, err)
	}
}

func TestExecutor_WhatCannotRunIsArchivedWithItsReasonAtOnce(t *testing.T) {
	t.Parallel()
	f := execute(t, func(_ context.Context, _ *tasks.Job, p probe) (string, error) {
		if p.Word == "forbidden" {
			return "", tasks.Permanent(errors.New("this word is not allowed"))
		}
		return "", nil
	})
	client := asynq.NewClientFromRedisClient(f.Redis(t))
	for name, c := range map[string]struct{ kind, payload, reason string }{
		"unknown kind":    {"prob", `{}`, `unknown kind "prob": this worker knows probe`},
		"empty payload":   {"probe", ``, "probe payload: it is empty; a JSON object is expected, {} at least"},
		"half a payload":  {"probe", `{"word":"secret-`, "probe payload: it is cut off: the JSON object has no end"},
		"no JSON":         {"probe", `{word:"secret"}`, "probe payload: it is not valid JSON, at byte 2"},
		"no object":       {"probe", `["secret"]`, "probe payload: it is not a JSON object"},
		"unknown field":   {"probe", `{"wrod":"secret"}`, `probe payload: unknown field "wrod": the fields are word`},
		"trailing bytes":  {"probe", `{"word":"a"} {}`, "probe payload: there is something after the JSON object"},
		"wrong type":      {"probe", `{"word":12345}`, "probe payload: word: want string, got number"},
		"not valid":       {"probe", `{"word":""}`, "probe payload: word: must not be empty"},
		"permanent error": {"probe", `{"word":"forbidden"}`, "this word is not allowed"},
	} {
		t.Run(name, func(t *testing.T) {
			info, err := client.EnqueueContext(t.Context(), asynq.NewTask(c.kind, []byte(c.payload)))
			if err != nil {
				t.Fatal(err)
			}
			_, err = f.WaitFor(t, info.Queue, info.ID)
			if !errors.Is(err, tasks.ErrJobFailed) {
				t.Fatalf("error %v, want one that says the job failed", err)
			}
			got, err := f.Inspector.GetTaskInfo(info.Queue, info.ID)
			if err != nil {
				t.Fatal(err)
			}
			if got.LastErr != c.reason || got.Retried != 0 || string(got.Payload) != c.payload {
				t.Errorf("archived with reason %q after %d retries and payload %q; want reason %q, none, and the payload as it was",
					got.LastErr, got.Retried, got.Payload, c.reason)
			}
		})
	}
	if log := f.log.String(); strings.Contains(log, "secret") || strings.Contains(log, "12345") || strings.Contains(log, "forbidden") {
		t.Errorf("the log shows a payload:\n%s", log)
	}
}

func TestExecutor_FailureIsTriedAgainUntilTheRetriesAreUsedUp(t *testing.T) {
	t.Parallel()
	f := execute(t, func(context.Context, *tasks.Job, probe) (string, error) {
		return "", tasks.RetryAfter(time.Millisecond, errors.New("not today"))
	})
	info := f.enqueue(t, "x", &tasks.EnqueueOptions{MaxRetry: 2})
	if _, err := f.Wait(t, info); !errors.Is(err, tasks.ErrJobFailed) || !strings.Contains(err.Error(), "not today") {
		t.Errorf("error %v", err)
	}
	var got []string
	for _, r := range f.records(t, 3) {
		job := r["job"].(map[string]any)
		got = append(got, fmt.Sprint(r["level"], " ", job["attempt"], " ", job["outcome"]))
	}
	if diff := cmp.Diff([]string{"WARN 1 retry", "WARN 2 retry", "ERROR 3 archived"}, got); diff != "" {
		t.Errorf("(-want +got)\n%s", diff)
	}
}

func TestExecutor_PanicIsTheJobsOwnFailureAndLoggedWithItsStack(t *testing.T) {
	t.Parallel()
	f := execute(t, func(_ context.Context, _ *tasks.Job, p probe) (string, error) {
		if p.Word == "panic" {
			explode()
		}
		return p.Word, nil
	})
	bad := f.enqueue(t, "panic", nil)
	if _, err := f.Wait(t, f.enqueue(t, "fine", nil)); err != nil {
		t.Errorf("another job noticed: %v", err)
	}
	r := f.records(t, 2)
	i := slices.IndexFunc(r, func(r map[string]any) bool { return r["error"] != nil })
	if i < 0 || r[i]["error"] != "panic: boom" || r[i]["job"].(map[string]any)["id"] != bad.ID {
		t.Errorf("records %v", r)
	}
	f.log.Wait(t, "delivery.explode(") // in the stack
}

func explode() { panic("boom") }

func TestExecutor_HandlerPastItsTimeoutFailsWithThatReason(t *testing.T) {
	t.Parallel()
	f := execute(t, func(ctx context.Context, _ *tasks.Job, _ probe) (string, error) {
		<-ctx.Done()
		return "", ctx.Err()
	})
	info := f.enqueue(t, "x", &tasks.EnqueueOptions{Timeout: time.Second, MaxRetry: tasks.NoRetry})
	_, err := f.Wait(t, info)
	if want := "it ran into its timeout of 1s: context deadline exceeded"; err == nil || !strings.HasSuffix(err.Error(), want) {
		t.Errorf("error %v, want one that ends with %q", err, want)
	}
}

func TestExecutor_ForgottenConnectionGoesBackWhenTheJobEnds(t *testing.T) {
	t.Parallel()
	f := execute(t, func(ctx context.Context, job *tasks.Job, _ probe) (string, error) {
		_, err := job.DB.Acquire(ctx)
		return "", err
	})
	for range 12 { // more than the pool has
		if _, err := f.Wait(t, f.enqueue(t, "x", nil)); err != nil {
			t.Fatal(err)
		}
	}
	if s := f.db.Stats(); s.CheckedOut != 0 {
		t.Errorf("%d connections are still out", s.CheckedOut)
	}
	if r := f.records(t, 1)[0]; r["db"].(map[string]any)["leaked"] != 1.0 {
		t.Errorf("the record does not say so: %v", r)
	}
}

func TestExecutor_UniqueKeyIsFreeAgainWhenTheJobHasEnded(t *testing.T) {
	t.Parallel()
	gate := make(chan struct{})
	f := execute(t, func(ctx context.Context, _ *tasks.Job, p probe) (string, error) {
		if p.Word == "wait" {
			<-gate
		}
		if p.Word == "fail" {
			return "", tasks.Permanent(errors.New("no"))
		}
		return "", nil
	})
	opts := &tasks.EnqueueOptions{UniqueKey: "k"}
	first := f.enqueue(t, "wait", opts)
	_, err := f.Client.Enqueue(t.Context(), probe{"other"}, opts)
	if dup, ok := errors.AsType[*tasks.DuplicateError](err); !ok || dup.ID != first.ID || dup.Queue != first.Queue {
		t.Fatalf("error %v, want a DuplicateError that names %s", err, first.ID)
	}
	close(gate)
	if _, err := f.Wait(t, first); err != nil {
		t.Fatal(err)
	}
	if _, err := f.Wait(t, f.enqueue(t, "fail", opts)); !errors.Is(err, tasks.ErrJobFailed) {
		t.Fatal(err)
	}
	f.enqueue(t, "again", opts)
}

func TestRetryDelay_IsExponentialWithFullJitterAndBounded(t *testing.T) {
	t.Parallel()
	for _, retried := range []int{0, 1, 5, 11, 20, 1000} {
		bound := min(retryCap, retryBase<<min(retried, 20))
		var least, most time.Duration = time.Hour * 24, 0
		for range 1000 {
			d := retryDelay(retried, errors.New("x"))
			least, most = min(least, d), max(most, d)
		}
		// The chance that 1000 draws leave out a tenth at either end is 10^-46.
		if least <= 0 || least > bound/10 || most > bound || most < bound-bound/10 {
			t.Errorf("after %d retries the delay is between %s and %s; want it spread from 0 to %s", retried, least, most, bound)
		}
	}
	asked := tasks.RetryAfter(5*time.Hour, errors.New("x"))
	if d := retryDelay(3, fmt.Errorf("wrapped: %w", asked)); d != 5*time.Hour {
		t.Errorf("delay %s, want the 5h the handler asked for", d)
	}
}

// fetchesNoMore has an execution run no further jobs.
func (f *execution) fetchesNoMore() {
	for _, c := range f.servers.clients {
		c.fetcher.end()
	}
}
