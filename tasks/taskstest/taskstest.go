// Package taskstest tests handlers the way they run: with a real pool on a real
// Postgres, and a real Redis to enqueue to. It is for the tests of packages with tasks of
// their own.
//
// Such a package has a TestMain, because the servers are started once for all its tests:
//
//	func TestMain(m *testing.M) { taskstest.Main(m) }
//
// A test makes a [Kit] with [New], runs a handler with [Run] or [RunTx], and looks at what
// it returned, wrote to [Kit.DB] and enqueued. Tests may be parallel. The servers are
// programs of the machine: redis-server and Postgres.
package taskstest

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"reflect"
	"strings"
	"testing"

	"github.com/google/uuid"
	"github.com/hibiken/asynq"
	"github.com/jackc/pgx/v5"

	"github.com/carpool-go/carpool/dbpool"
	"github.com/carpool-go/carpool/internal/schema"
	"github.com/carpool-go/carpool/internal/testservers"
	"github.com/carpool-go/carpool/outbound"
	"github.com/carpool-go/carpool/tasks"
)

// Main runs a package's tests, stops the servers they used, and exits with the tests' exit
// code; with 1 if the tests left goroutines behind. It is for TestMain.
func Main(m *testing.M) { testservers.Main(m) }

// Kit is what one test works with, and shares with no other. [New] makes it.
type Kit struct {
	// DB is a pool on a database that has carpool's tables, and nothing else.
	DB *dbpool.Pool
	// DatabaseURL is the URL of that database.
	DatabaseURL string
	// Client enqueues to queues that no worker pulls from.
	Client *tasks.Client
	// RedisURL is the URL of those queues.
	RedisURL string
	// OutboundAllow is what handlers may call beside public addresses, as the
	// worker's setting OUTBOUND_ALLOW: "127.0.0.1" for the test's own server.
	// "" allows public addresses only. It may be set until [Run].
	OutboundAllow string

	inspector *asynq.Inspector
}

// New returns a kit whose database and queues are gone when the test ends. The servers are
// started when a test of the package first asks. What fails, fails the test.
func New(t testing.TB) *Kit {
	t.Helper()
	k := &Kit{DatabaseURL: testservers.Postgres(t), RedisURL: testservers.Redis(t)}
	if err := schema.Migrate(t.Context(), k.DatabaseURL, slog.New(slog.DiscardHandler)); err != nil {
		t.Fatal(err)
	}
	cfg := dbpool.DefaultConfig(k.DatabaseURL)
	cfg.Logger = slog.New(slog.DiscardHandler)
	db, err := dbpool.Open(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(db.Close)
	k.DB = db
	rdb, err := tasks.OpenRedis(k.RedisURL)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = rdb.Close() })
	k.Client = tasks.NewClient(rdb)
	k.inspector = asynq.NewInspectorFromRedisClient(rdb)
	return k
}

// Run runs a handler once, as a worker would: the payload goes through JSON and
// its validation, and the handler's context ends at the kind's timeout. It returns what
// the handler does, or the [tasks.PayloadError] of a payload that is not valid. A
// connection that the handler did not give back fails the test. A handler of
// [tasks.RegisterOnce] may be run like any other.
func Run[P tasks.Payload, R any](t testing.TB, k *Kit, handler tasks.Handler[P, R], payload P) (R, error) {
	t.Helper()
	var result R
	set := new(tasks.Set)
	tasks.Register(set, func(ctx context.Context, job *tasks.Job, p P) (R, error) {
		r, err := handler(ctx, job, p)
		result = r
		return r, err
	})
	err := k.run(t, set, payload)
	return result, err
}

// RunTx is [Run] for a handler of [tasks.RegisterTx]: its transaction is committed if it
// returns no error, and else rolled back.
func RunTx[P tasks.Payload, R any](t testing.TB, k *Kit, handler tasks.TxHandler[P, R], payload P) (R, error) {
	t.Helper()
	var result R
	set := new(tasks.Set)
	tasks.RegisterTx(set, func(ctx context.Context, job *tasks.Job, tx pgx.Tx, p P) (R, error) {
		r, err := handler(ctx, job, tx, p)
		result = r
		return r, err
	})
	err := k.run(t, set, payload)
	return result, err
}

func (k *Kit) run(t testing.TB, set *tasks.Set, payload tasks.Payload) error {
	t.Helper()
	task, err := set.Lookup(payload.Kind())
	if err != nil {
		t.Fatal(err)
	}
	data, err := json.Marshal(payload)
	if err != nil {
		t.Fatal(err)
	}
	decoded, err := task.Decode(data)
	if err != nil {
		return err
	}
	job := &tasks.Job{
		ID: uuid.NewString(), Kind: task.Kind, Queue: task.Options.Queue,
		Attempt: 1, MaxRetry: task.Options.MaxRetry,
		DB: k.DB, Client: k.Client, Log: slog.New(slog.DiscardHandler),
	}
	guard, err := outbound.New(k.OutboundAllow)
	if err != nil {
		t.Fatalf("OutboundAllow: %v", err)
	}
	ctx, cancel := context.WithTimeout(outbound.NewContext(t.Context(), guard), task.Options.Timeout)
	defer cancel()
	ctx, borrower := k.DB.Track(ctx, job.Kind+" "+job.ID)
	_, err = task.Run(ctx, job, decoded)
	if usage := borrower.End(); usage.Leaked > 0 {
		t.Errorf("the handler of %s did not give back %d connections", task.Kind, usage.Leaked)
	}
	return err
}

// RequireEnqueued returns the one job that has not run yet and carries this payload. It
// fails the test if there are more or fewer of it than one. What [tasks.Client.EnqueueTx]
// has enqueued is in carpool.outbox, where it doesn't look.
func (k *Kit) RequireEnqueued(t testing.TB, want tasks.Payload) *tasks.Info {
	t.Helper()
	var found, others []*tasks.Info
	for _, job := range k.Enqueued(t) {
		if job.Kind == want.Kind() && carries(job.Payload, want) {
			found = append(found, job)
		} else {
			others = append(others, job)
		}
	}
	if len(found) != 1 {
		t.Fatalf("%d jobs carry %s %+v, want 1; the others are:%s", len(found), want.Kind(), want, list(others))
	}
	return found[0]
}

// RequireNothingEnqueued fails the test if a job waits on any queue of the kit's Redis.
func (k *Kit) RequireNothingEnqueued(t testing.TB) {
	t.Helper()
	if jobs := k.Enqueued(t); len(jobs) > 0 {
		t.Fatalf("there are jobs on the queues:%s", list(jobs))
	}
}

// Enqueued returns all jobs in the kit's Redis that have not run yet, those to be run later
// among them.
func (k *Kit) Enqueued(t testing.TB) []*tasks.Info {
	t.Helper()
	queues, err := k.inspector.Queues()
	if err != nil {
		t.Fatal(err)
	}
	var jobs []*tasks.Info
	for _, queue := range queues {
		for _, list := range []func(string, ...asynq.ListOption) ([]*asynq.TaskInfo, error){
			k.inspector.ListPendingTasks, k.inspector.ListScheduledTasks,
		} {
			for page := 1; ; page++ {
				some, err := list(queue, asynq.Page(page), asynq.PageSize(1000))
				if err != nil {
					t.Fatal(err)
				}
				for _, job := range some {
					info, err := k.Client.Get(t.Context(), queue, job.ID)
					if err != nil {
						t.Fatal(err)
					}
					jobs = append(jobs, info)
				}
				if len(some) < 1000 {
					break
				}
			}
		}
	}
	return jobs
}

// carries reports whether data is want as JSON, whatever the order of fields.
func carries(data []byte, want tasks.Payload) bool {
	wantData, err := json.Marshal(want)
	if err != nil {
		return false
	}
	var a, b any
	return json.Unmarshal(data, &a) == nil && json.Unmarshal(wantData, &b) == nil && reflect.DeepEqual(a, b)
}

func list(jobs []*tasks.Info) string {
	if len(jobs) == 0 {
		return " none"
	}
	var b strings.Builder
	for _, job := range jobs {
		fmt.Fprintf(&b, "\n  %s on %s: %s", job.Kind, job.Queue, job.Payload)
	}
	return b.String()
}
