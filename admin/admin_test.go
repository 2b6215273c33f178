package admin_test

import (
	"context"
	"errors"
	"log/slog"
	"strings"
	"testing"
	"time"

	"github.com/hibiken/asynq"
	"github.com/redis/go-redis/v9"

	"github.com/carpool-go/carpool/admin"
	"github.com/carpool-go/carpool/dbpool"
	"github.com/carpool-go/carpool/internal/schema"
	"github.com/carpool-go/carpool/internal/testservers"
	"github.com/carpool-go/carpool/tasks"
)

func TestMain(m *testing.M) {
	redis.SetLogger(quiet{})
	testservers.Main(m)
}

// quiet drops what go-redis says of connections that it replaces.
type quiet struct{}

func (quiet) Printf(context.Context, string, ...any) {}

// note is a job that nobody runs.
type note struct {
	Text string `json:"text,omitempty"`
}

func (note) Kind() string           { return "note" }
func (note) Options() tasks.Options { return tasks.Options{} }
func (note) Validate() error        { return nil }

// office is what a test works with: a Redis of its own, and clients of it.
type office struct {
	*admin.Admin
	rdb       redis.UniversalClient
	client    *tasks.Client
	inspector *asynq.Inspector
}

// newOffice makes an office with a database, or with none if db is nil.
func newOffice(t *testing.T, db *dbpool.Pool) *office {
	t.Helper()
	rdb := openRedis(t, testservers.Redis(t))
	return &office{admin.New(rdb, db), rdb, tasks.NewClient(rdb), asynq.NewInspectorFromRedisClient(rdb)}
}

func openRedis(t *testing.T, url string) redis.UniversalClient {
	t.Helper()
	rdb, err := tasks.OpenRedis(url)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = rdb.Close() })
	return rdb
}

// migrated opens a database with carpool's tables.
func migrated(t *testing.T) *dbpool.Pool {
	t.Helper()
	url := testservers.Postgres(t)
	if err := schema.Migrate(t.Context(), url, slog.New(slog.DiscardHandler)); err != nil {
		t.Fatal(err)
	}
	return openDatabase(t, url)
}

func openDatabase(t *testing.T, url string) *dbpool.Pool {
	t.Helper()
	cfg := dbpool.DefaultConfig(url)
	cfg.Size, cfg.MaxOverflow, cfg.Logger = 1, 0, slog.New(slog.DiscardHandler)
	db, err := dbpool.Open(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(db.Close)
	return db
}

func (o *office) enqueue(t *testing.T, opts *tasks.EnqueueOptions) *tasks.Info {
	t.Helper()
	info, err := o.client.Enqueue(t.Context(), note{}, opts)
	if err != nil {
		t.Fatal(err)
	}
	return info
}

func (o *office) stateOf(t *testing.T, info *tasks.Info) tasks.State {
	t.Helper()
	now, err := o.client.Get(t.Context(), info.Queue, info.ID)
	if err != nil {
		t.Fatal(err)
	}
	return now.State
}

func TestPause_KeepsWorkersFromFetchingUntilResume(t *testing.T) {
	t.Parallel()
	o := newOffice(t, nil)
	urgent := o.enqueue(t, &tasks.EnqueueOptions{Queue: "critical"})
	for range 2 { // twice is fine
		if err := o.Pause(t.Context(), "critical"); err != nil {
			t.Fatal(err)
		}
	}
	if info, err := o.inspector.GetQueueInfo("critical"); err != nil || !info.Paused {
		t.Errorf("asynq shows %+v, %v", info, err)
	}
	// A server that takes the jobs of critical first, whenever it may.
	ran := make(chan string)
	server := asynq.NewServerFromRedisClient(o.rdb, asynq.Config{
		Queues: map[string]int{"critical": 2, "default": 1}, StrictPriority: true, Concurrency: 1, LogLevel: asynq.FatalLevel,
		TaskCheckInterval: 50 * time.Millisecond,
	})
	defer server.Shutdown()
	err := server.Start(asynq.HandlerFunc(func(ctx context.Context, _ *asynq.Task) error {
		id, _ := asynq.GetTaskID(ctx)
		ran <- id
		return nil
	}))
	if err != nil {
		t.Fatal(err)
	}
	for range 3 {
		if other := o.enqueue(t, nil); <-ran != other.ID {
			t.Error("a job of the paused queue is run")
		}
	}
	late := o.enqueue(t, &tasks.EnqueueOptions{Queue: "critical"}) // can be enqueued
	if a, b := o.stateOf(t, urgent), o.stateOf(t, late); a != tasks.StatePending || b != tasks.StatePending {
		t.Errorf("the jobs of the paused queue are %s and %s", a, b)
	}
	for range 2 {
		if err := o.Resume(t.Context(), "critical"); err != nil {
			t.Fatal(err)
		}
	}
	if first, second := <-ran, <-ran; first != urgent.ID || second != late.ID {
		t.Error("after Resume, other jobs are run than those of the queue")
	}
}

func TestPause_IsWhatAsynqsOwnPauseIs(t *testing.T) {
	t.Parallel()
	o := newOffice(t, nil)
	o.enqueue(t, nil)
	if err := o.Pause(t.Context(), "default"); err != nil {
		t.Fatal(err)
	}
	if err := o.inspector.UnpauseQueue("default"); err != nil {
		t.Errorf("asynq does not end it: %v", err)
	}
	if err := o.inspector.PauseQueue("default"); err != nil {
		t.Fatal(err)
	}
	if err := o.Resume(t.Context(), "default"); err != nil {
		t.Fatal(err)
	}
	if info, err := o.inspector.GetQueueInfo("default"); err != nil || info.Paused {
		t.Errorf("asynq's pause is not ended: %+v, %v", info, err)
	}
}

func TestPause_KnowsNoQueueThatHasNeverHadAJob(t *testing.T) {
	t.Parallel()
	o := newOffice(t, nil)
	o.enqueue(t, nil)
	for name, do := range map[string]func(context.Context, string) error{"pause": o.Pause, "resume": o.Resume} {
		err := do(t.Context(), "defualt")
		if !errors.Is(err, admin.ErrNoSuchQueue) || !strings.HasPrefix(err.Error(), "admin: "+name+` queue "defualt": `) {
			t.Errorf("%s: error %v", name, err)
		}
		ended, end := context.WithCancel(t.Context())
		end()
		if err := do(ended, "default"); !errors.Is(err, context.Canceled) {
			t.Errorf("%s with a context that has ended: %v", name, err)
		}
	}
	if info, err := o.inspector.GetQueueInfo("default"); err != nil || info.Paused {
		t.Errorf("%+v, %v", info, err)
	}
}

func TestCancel_JobsInRedisAndInTheOutbox(t *testing.T) {
	t.Parallel()
	db := migrated(t)
	o := newOffice(t, db)
	pending := o.enqueue(t, nil)
	if err := o.Cancel(t.Context(), pending.ID); err != nil {
		t.Error(err)
	}
	if _, err := o.client.Get(t.Context(), pending.Queue, pending.ID); !errors.Is(err, tasks.ErrNoSuchJob) {
		t.Errorf("the job that waited in Redis is still there: %v", err)
	}

	rows := func() (n int) {
		t.Helper()
		if err := db.QueryRow(t.Context(), "SELECT count(*) FROM carpool.outbox").Scan(&n); err != nil {
			t.Fatal(err)
		}
		return n
	}
	const id = "0b5e3c57-3f0f-4cfa-9f3a-6f4f5c3d2a10"
	if _, err := db.Exec(t.Context(), "INSERT INTO carpool.outbox (id, kind, payload) VALUES ($1, 'note', '{}'), (gen_random_uuid(), 'note', '{}')", id); err != nil {
		t.Fatal(err)
	}
	without := admin.New(o.rdb, nil)
	if err := without.Cancel(t.Context(), id); !errors.Is(err, tasks.ErrNoSuchJob) || !errors.Is(err, admin.ErrNoDatabase) || strings.Contains(err.Error(), "DATABASE_URL") {
		t.Errorf("without the database: error %v", err)
	}
	if err := o.Cancel(t.Context(), id); err != nil {
		t.Error(err)
	}
	if n := rows(); n != 1 {
		t.Errorf("the outbox has %d rows, want the other one", n)
	}
	for _, unknown := range []string{id, "nobody"} {
		if err := o.Cancel(t.Context(), unknown); !errors.Is(err, tasks.ErrNoSuchJob) {
			t.Errorf("a job that is nowhere: error %v", err)
		}
	}
}

func TestCancel_ADatabaseThatIsAwayIsAnErrorBesideRedis(t *testing.T) {
	t.Parallel()
	o := newOffice(t, openDatabase(t, "postgres://user:s3cr3t@127.0.0.1:1/app"))
	err := o.Cancel(t.Context(), "0b5e3c57-3f0f-4cfa-9f3a-6f4f5c3d2a10")
	if !errors.Is(err, tasks.ErrNoSuchJob) || !strings.Contains(err.Error(), "look for it in the outbox: ") || strings.Contains(err.Error(), "s3cr3t") {
		t.Errorf("error %v", err)
	}
	if err := o.Cancel(t.Context(), "nobody"); !errors.Is(err, tasks.ErrNoSuchJob) || strings.Contains(err.Error(), "outbox") {
		t.Errorf("an id that the outbox can't have: error %v", err)
	}
}
