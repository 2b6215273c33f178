// Package taskstest tests handlers the way they run: with a real pool on a real
// Postgres, and a real Redis to enqueue to.
//
// A package that uses it has a TestMain that calls [Main], which stops the
// servers when the tests are over.
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

// Main runs a package's tests and stops the servers they used. It is to be
// called from TestMain and doesn't return.
func Main(m *testing.M) { testservers.Main(m) }

// Kit is what one test works with, and shares with no other.
type Kit struct {
	// DB is a pool on an empty database that has carpool's tables.
	DB *dbpool.Pool
	// DatabaseURL is the same database.
	DatabaseURL string
	// Client enqueues to queues that no worker pulls from.
	Client *tasks.Client
	// RedisURL is where they are.
	RedisURL string
	// OutboundAllow is what handlers may call beside public addresses, as the
	// worker's setting OUTBOUND_ALLOW: "127.0.0.1" for the test's own server.
	// "" allows public addresses only.
	OutboundAllow string

	inspector *asynq.Inspector
}

// New returns a kit whose database and queues are gone when the test ends.
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
// its validation, and ctx ends at the kind's timeout. A connection that the
// handler did not give back fails the test.
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

// RunTx is [Run] for a transactional handler: its transaction is committed if it
// returns no error.
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

// RequireEnqueued fails the test unless exactly one job that has not run yet
// carries this payload, and returns that job.
func (k *Kit) RequireEnqueued(t testing.TB, want tasks.Payload) *asynq.TaskInfo {
	t.Helper()
	var found, others []*asynq.TaskInfo
	for _, job := range k.Enqueued(t) {
		if job.Type == want.Kind() && carries(job.Payload, want) {
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

// RequireNothingEnqueued fails the test if a job waits on any queue.
func (k *Kit) RequireNothingEnqueued(t testing.TB) {
	t.Helper()
	if jobs := k.Enqueued(t); len(jobs) > 0 {
		t.Fatalf("there are jobs on the queues:%s", list(jobs))
	}
}

// Enqueued returns all jobs that have not run yet, those to be run later among
// them.
func (k *Kit) Enqueued(t testing.TB) []*asynq.TaskInfo {
	t.Helper()
	queues, err := k.inspector.Queues()
	if err != nil {
		t.Fatal(err)
	}
	var jobs []*asynq.TaskInfo
	for _, queue := range queues {
		for _, list := range []func(string, ...asynq.ListOption) ([]*asynq.TaskInfo, error){
			k.inspector.ListPendingTasks, k.inspector.ListScheduledTasks,
		} {
			for page := 1; ; page++ {
				some, err := list(queue, asynq.Page(page), asynq.PageSize(1000))
				if err != nil {
					t.Fatal(err)
				}
				jobs = append(jobs, some...)
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

func list(jobs []*asynq.TaskInfo) string {
	if len(jobs) == 0 {
		return " none"
	}
	var b strings.Builder
	for _, job := range jobs {
		fmt.Fprintf(&b, "\n  %s on %s: %s", job.Type, job.Queue, job.Payload)
	}
	return b.String()
}
