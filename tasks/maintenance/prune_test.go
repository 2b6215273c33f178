package maintenance

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/uuid"
	"github.com/hibiken/asynq"
	"github.com/jackc/pgx/v5"
	"github.com/redis/go-redis/v9"

	"github.com/carpool-go/carpool/tasks"
	"github.com/carpool-go/carpool/tasks/taskstest"
)

// credit is a transactional job that adds to an account.
type credit struct {
	Amount int `json:"amount"`
}

func (credit) Kind() string           { return "account:credit" }
func (credit) Options() tasks.Options { return tasks.Options{} }
func (credit) Validate() error        { return nil }

// prunes is a database with carpool's tables, and the Redis that has its jobs.
type prunes struct {
	*taskstest.Kit
	redis redis.UniversalClient
}

func newPrunes(t testing.TB, sql ...string) *prunes {
	t.Helper()
	kit := taskstest.New(t)
	p := &prunes{kit, openRedis(t, kit.RedisURL)}
	p.exec(t, sql...)
	return p
}

func openRedis(t testing.TB, url string) redis.UniversalClient {
	t.Helper()
	rdb, err := tasks.OpenRedis(url)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = rdb.Close() })
	return rdb
}

func (p *prunes) exec(t testing.TB, sql ...string) {
	t.Helper()
	for _, s := range sql {
		if _, err := p.DB.Exec(t.Context(), s); err != nil {
			t.Fatalf("%s: %v", s, err)
		}
	}
}

// ids are those of the rows that are left.
func (p *prunes) ids(t testing.TB, table string) string {
	t.Helper()
	var ids string
	if err := p.DB.QueryRow(t.Context(), "SELECT coalesce(string_agg(id::text, ' ' ORDER BY id), '') FROM "+table).Scan(&ids); err != nil {
		t.Fatal(err)
	}
	return ids
}

func (p *prunes) count(t testing.TB, table string) (n int) {
	t.Helper()
	if err := p.DB.QueryRow(t.Context(), "SELECT count(*) FROM "+table).Scan(&n); err != nil {
		t.Fatal(err)
	}
	return n
}

// done inserts records of jobs of the queue default that were done a while ago.
func (p *prunes) done(t testing.TB, ago time.Duration, ids ...string) {
	t.Helper()
	_, err := p.DB.Exec(t.Context(), `INSERT INTO carpool.jobs_done (id, kind, queue, done_at)
		SELECT id, 'account:credit', 'default', now() - make_interval(secs => $1) FROM unnest($2::text[]) id`, ago.Seconds(), ids)
	if err != nil {
		t.Fatal(err)
	}
}

func (p *prunes) enqueue(t testing.TB, id string, runAt time.Time, retention time.Duration) {
	t.Helper()
	_, err := p.Client.Enqueue(t.Context(), credit{5}, &tasks.EnqueueOptions{ID: id, RunAt: runAt, Retention: retention})
	if err != nil {
		t.Fatal(err)
	}
}

func (p *prunes) prune(t testing.TB, payload Prune) (PruneResult, error) {
	t.Helper()
	return taskstest.Run(t, p.Kit, (&Tasks{Redis: p.redis}).prune, payload)
}

func want[T any](t testing.TB, what string, got, want T) {
	t.Helper()
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("%s (-want +got):\n%s", what, diff)
	}
}

const twoDays = 48 * time.Hour

func TestPrune_KeepsTheRecordOfEachJobThatMayBeDeliveredAgain(t *testing.T) {
	t.Parallel()
	p := newPrunes(t)
	inspector := asynq.NewInspectorFromRedisClient(p.redis)

	// Jobs that an asynq server leaves in these states, and whose records are
	// there all the same: the worker died between the commit and its answer.
	p.enqueue(t, "active", time.Time{}, 0)
	p.enqueue(t, "retry", time.Time{}, 0)
	p.enqueue(t, "completed", time.Time{}, time.Hour)
	p.enqueue(t, "archived", time.Time{}, 0)
	active, release := make(chan struct{}), make(chan struct{})
	server := asynq.NewServerFromRedisClient(p.redis, asynq.Config{
		Concurrency: 4, LogLevel: asynq.FatalLevel,
		RetryDelayFunc: func(int, error, *asynq.Task) time.Duration { return time.Hour },
	})
	err := server.Start(asynq.HandlerFunc(func(ctx context.Context, _ *asynq.Task) error {
		switch id, _ := asynq.GetTaskID(ctx); id {
		case "active":
			close(active)
			<-release
		case "retry":
			return errors.New("again")
		case "archived":
			return asynq.SkipRetry
		}
		return nil
	}))
	if err != nil {
		t.Fatal(err)
	}
	defer server.Shutdown()
	defer close(release)
	<-active
	for id, state := range map[string]asynq.TaskState{
		"active": asynq.TaskStateActive, "retry": asynq.TaskStateRetry,
		"completed": asynq.TaskStateCompleted, "archived": asynq.TaskStateArchived,
	} {
		for giveUp := time.Now().Add(time.Minute); ; time.Sleep(10 * time.Millisecond) {
			info, err := inspector.GetTaskInfo("default", id)
			if err == nil && info.State == state {
				break
			}
			if time.Now().After(giveUp) {
				t.Fatalf("%s: %+v, error %v", id, info, err)
			}
		}
	}
	server.Stop()
	p.enqueue(t, "pending", time.Time{}, 0)
	p.enqueue(t, "scheduled", time.Now().Add(time.Hour), 0)
	outbox := uuid.NewString()
	p.exec(t, `INSERT INTO carpool.outbox (id, kind, payload) VALUES ('`+outbox+`', 'account:credit', '{}')`)

	p.done(t, twoDays, "active", "retry", "archived", "pending", "scheduled", outbox, "completed", "gone", uuid.NewString())
	p.done(t, 23*time.Hour, "young")
	result, err := p.prune(t, Prune{})
	if err != nil {
		t.Fatal(err)
	}
	want(t, "result", result, PruneResult{Jobs: 2, Needed: 7})
	kept := strings.Fields(p.ids(t, "carpool.jobs_done"))
	left := map[string]bool{}
	for _, id := range kept {
		left[id] = true
	}
	want(t, "records left", left, map[string]bool{
		"active": true, "retry": true, "archived": true, "pending": true, "scheduled": true, outbox: true, "young": true,
		"completed": true,
	})

	// Once nobody has the job any more, its record goes.
	if err := inspector.DeleteTask("default", "pending"); err != nil {
		t.Fatal(err)
	}
	p.exec(t, "DELETE FROM carpool.outbox")
	result, err = p.prune(t, Prune{})
	if err != nil {
		t.Fatal(err)
	}
	want(t, "the next run's result", result, PruneResult{Jobs: 2, Needed: 5})
	result, err = p.prune(t, Prune{Keep: "22h"})
	if err != nil {
		t.Fatal(err)
	}
	want(t, "the result when 22h are kept", result, PruneResult{Jobs: 1, Needed: 5})
}

func TestPrune_EndsHoweverManyRecordsMustStay(t *testing.T) {
	t.Parallel()
	p := newPrunes(t)
	var ids []string
	for i := range 2500 {
		ids = append(ids, fmt.Sprintf("needed-%d", i))
		p.enqueue(t, ids[i], time.Time{}, 0)
	}
	p.done(t, twoDays, ids...)
	p.done(t, twoDays, "gone")
	result, err := p.prune(t, Prune{})
	if err != nil {
		t.Fatal(err)
	}
	want(t, "result", result, PruneResult{Jobs: 1, Needed: 2500})
}

func TestPrune_GoesThroughTheWholeTable(t *testing.T) {
	t.Parallel()
	p := newPrunes(t,
		// Some 800 pages, with a page's worth of old and of young ones in turn.
		`INSERT INTO carpool.jobs_done (id, kind, queue, result, done_at)
			SELECT gen_random_uuid()::text, 'account:credit', 'default', '{"balance":17}', now() - (i / 50 % 2) * interval '2 days'
			FROM generate_series(0, 49999) i`)
	result, err := p.prune(t, Prune{})
	if err != nil {
		t.Fatal(err)
	}
	want(t, "result", result, PruneResult{Jobs: 25_000})
	want(t, "records left", p.count(t, "carpool.jobs_done"), 25_000)
	want(t, "old ones left", p.count(t, "carpool.jobs_done WHERE done_at < now() - interval '1 day'"), 0)
}

func TestPrune_WithoutRedisNothingIsDeleted(t *testing.T) {
	t.Parallel()
	p := newPrunes(t)
	p.done(t, twoDays, "gone")
	p.redis = openRedis(t, "redis://127.0.0.1:1")
	_, err := p.prune(t, Prune{})
	if err == nil || tasks.IsPermanent(err) || !strings.Contains(err.Error(), "prune carpool.jobs_done: ask Redis for the jobs: ") {
		t.Errorf("error %v", err)
	}
	want(t, "records left", p.ids(t, "carpool.jobs_done"), "gone")

	p.redis = nil
	_, err = p.prune(t, Prune{})
	if !tasks.IsPermanent(err) || !strings.Contains(err.Error(), "no Redis to ask for the jobs") {
		t.Errorf("a program that gave no Redis: error %v; want a permanent one that says so", err)
	}
	want(t, "records left", p.ids(t, "carpool.jobs_done"), "gone")
}

func TestPrune_TheWebhooksAttemptsGoAfterAMonth(t *testing.T) {
	t.Parallel()
	p := newPrunes(t, `INSERT INTO carpool.webhook_deliveries (job_id, attempt, url, event, took_ms, delivered_at)
		SELECT 'x', 1, 'https://shop.example', 'order.paid', 1, now() - i * interval '1 day' - interval '1 hour' FROM generate_series(0, 39) i`)
	result, err := p.prune(t, Prune{})
	if err != nil {
		t.Fatal(err)
	}
	want(t, "result", result, PruneResult{Webhooks: 10})
	want(t, "rows left", p.count(t, "carpool.webhook_deliveries"), 30)
}

func TestPrune_AJobThatRedisStillHasIsNotRunTwiceHoweverOldItsRecordIs(t *testing.T) {
	t.Parallel()
	p := newPrunes(t, "CREATE TABLE account AS SELECT 0 AS balance")
	set := new(tasks.Set)
	tasks.RegisterTx(set, func(ctx context.Context, _ *tasks.Job, tx pgx.Tx, c credit) (any, error) {
		_, err := tx.Exec(ctx, "UPDATE account SET balance = balance + $1", c.Amount)
		return nil, err
	})
	task, err := set.Lookup("account:credit")
	if err != nil {
		t.Fatal(err)
	}
	p.enqueue(t, "redelivered", time.Time{}, 0)
	for range 2 {
		job := &tasks.Job{ID: "redelivered", Kind: task.Kind, Queue: "default", DB: p.DB, Log: slog.New(slog.DiscardHandler)}
		if _, err := task.Run(t.Context(), job, credit{5}); err != nil {
			t.Fatal(err)
		}
		p.exec(t, "UPDATE carpool.jobs_done SET done_at = now() - interval '2 days'")
		if _, err := p.prune(t, Prune{}); err != nil {
			t.Fatal(err)
		}
	}
	want(t, "balance", p.count(t, "account WHERE balance = 5"), 1)
}

func TestPrune_PayloadIsValidated(t *testing.T) {
	t.Parallel()
	for keep, valid := range map[string]bool{"": true, "24h": true, "7d": true, "24": false, "-1h": false, "0s": false} {
		if err := (Prune{Keep: keep}).Validate(); (err == nil) != valid || err != nil && !strings.HasPrefix(err.Error(), "keep: ") {
			t.Errorf("%q: %v", keep, err)
		}
	}
}
