package tasks_test

import (
	"context"
	"errors"
	"math"
	"net/url"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/hibiken/asynq"
	"github.com/redis/go-redis/v9"

	"github.com/carpool-go/carpool/internal/asynqwire"
	"github.com/carpool-go/carpool/internal/instance"
	"github.com/carpool-go/carpool/internal/testservers"
	"github.com/carpool-go/carpool/internal/unique"
	"github.com/carpool-go/carpool/tasks"
	"github.com/carpool-go/carpool/tasks/maintenance"
	"github.com/carpool-go/carpool/tasks/taskstest"
)

func TestClient_EnqueueTakesTheKindsOptionsUnlessOverridden(t *testing.T) {
	t.Parallel()
	kit := taskstest.New(t)
	type summary struct {
		Queue              string
		MaxRetry           int
		Timeout, Retention time.Duration
		State              string
	}
	runAt := time.Now().Add(time.Hour)
	for _, c := range []struct {
		name string
		opts *tasks.EnqueueOptions
		want summary
	}{
		{"defaults", nil, summary{"default", 10, 10 * time.Minute, 0, "pending"}},
		{
			"all overridden",
			&tasks.EnqueueOptions{Queue: "low", MaxRetry: 2, Timeout: time.Second, Retention: time.Hour, RunAt: runAt},
			summary{"low", 2, time.Second, time.Hour, "scheduled"},
		},
		{"no retry", &tasks.EnqueueOptions{MaxRetry: tasks.NoRetry}, summary{"default", 0, 10 * time.Minute, 0, "pending"}},
		{"a time that has passed", &tasks.EnqueueOptions{RunAt: time.Now().Add(-time.Hour)}, summary{"default", 10, 10 * time.Minute, 0, "pending"}},
	} {
		info, err := kit.Client.Enqueue(t.Context(), parcel{To: c.name}, c.opts)
		if err != nil {
			t.Fatal(err)
		}
		got := summary{info.Queue, info.MaxRetry, info.Timeout, info.Retention, string(info.State)}
		if diff := cmp.Diff(c.want, got); diff != "" {
			t.Errorf("%s: (-want +got)\n%s", c.name, diff)
		}
		kit.RequireEnqueued(t, parcel{To: c.name})
	}
}

func TestClient_EnqueueRefusesAPayloadThatIsNotValid(t *testing.T) {
	t.Parallel()
	kit := taskstest.New(t)
	_, err := kit.Client.Enqueue(t.Context(), parcel{}, nil)
	if _, ok := errors.AsType[*tasks.PayloadError](err); !ok || !strings.Contains(err.Error(), "parcel:send payload: to: must not be empty") {
		t.Errorf("error %v", err)
	}
	kit.RequireNothingEnqueued(t)
}

// A worker validates its pool by jobs on a queue of its own, which any other job would hold up.
func TestClient_EnqueueLeavesTheQueuesOfInstancesToTheirValidations(t *testing.T) {
	t.Parallel()
	kit := taskstest.New(t)
	own := &tasks.EnqueueOptions{Queue: instance.Queue(instance.NewName("host"))}
	if _, err := kit.Client.Enqueue(t.Context(), parcel{To: "Ada"}, own); !tasks.IsPermanent(err) || !strings.Contains(err.Error(), "queue: is a worker's own") {
		t.Errorf("error %v", err)
	}
	kit.RequireNothingEnqueued(t)
	// One that only begins like it is a user's.
	if _, err := kit.Client.Enqueue(t.Context(), parcel{To: "Ada"}, &tasks.EnqueueOptions{Queue: "instance-billing"}); err != nil {
		t.Error(err)
	}
	if _, err := kit.Client.Enqueue(t.Context(), maintenance.PoolValidate{}, own); err != nil {
		t.Errorf("a validation: %v", err)
	}
	_, err := tasks.NewSet(groupFunc(func(s *tasks.Set) {
		tasks.Register(s, func(context.Context, *tasks.Job, onInstance) (any, error) { return nil, nil })
	}))
	if err == nil || !strings.Contains(err.Error(), `kind "on:instance": queue: is a worker's own`) {
		t.Errorf("a kind that has such a queue: error %v", err)
	}
}

// onInstance is a kind whose queue is not for users.
type onInstance struct{}

func (onInstance) Kind() string           { return "on:instance" }
func (onInstance) Options() tasks.Options { return tasks.Options{Queue: "instance-mine-01234567"} }
func (onInstance) Validate() error        { return nil }

type groupFunc func(*tasks.Set)

func (f groupFunc) Register(s *tasks.Set) { f(s) }

func TestClient_UniqueKeyLetsOneOfManyThrough(t *testing.T) {
	t.Parallel()
	kit := taskstest.New(t)
	var enqueued atomic.Int64
	var wg sync.WaitGroup
	for range 20 {
		wg.Go(func() {
			_, err := kit.Client.Enqueue(t.Context(), parcel{To: "Ada"}, &tasks.EnqueueOptions{UniqueKey: "k"})
			if _, duplicate := errors.AsType[*tasks.DuplicateError](err); err == nil {
				enqueued.Add(1)
			} else if !duplicate {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if n := enqueued.Load(); n != 1 {
		t.Errorf("%d jobs were enqueued with one unique key", n)
	}
	kit.RequireEnqueued(t, parcel{To: "Ada"})
}

// parcelExtra is a kind whose name goes on where parcel's ends.
type parcelExtra struct{ parcel }

func (parcelExtra) Kind() string { return "parcel:send:extra" }

func TestClient_UniqueKeysAreEachKindsOwn(t *testing.T) {
	t.Parallel()
	kit := taskstest.New(t)
	if _, err := kit.Client.Enqueue(t.Context(), parcel{To: "Ada"}, &tasks.EnqueueOptions{UniqueKey: "extra:k"}); err != nil {
		t.Fatal(err)
	}
	if _, err := kit.Client.Enqueue(t.Context(), parcelExtra{parcel{To: "Ada"}}, &tasks.EnqueueOptions{UniqueKey: "k"}); err != nil {
		t.Error(err)
	}
}

func TestClient_UniqueKeyOfAJobThatWasDeletedByHandIsTakenOver(t *testing.T) {
	t.Parallel()
	kit := taskstest.New(t)
	rdb, err := tasks.OpenRedis(kit.RedisURL)
	if err != nil {
		t.Fatal(err)
	}
	defer rdb.Close()
	// A holder that is not on its queue, and has had time enough to get there.
	const key = "carpool:unique:11:parcel:send:k"
	if err := rdb.Set(t.Context(), key, "gone 1000 default", 0).Err(); err != nil {
		t.Fatal(err)
	}
	opts := &tasks.EnqueueOptions{UniqueKey: "k"}
	info, err := kit.Client.Enqueue(t.Context(), parcel{To: "Ada"}, opts)
	if err != nil {
		t.Fatal(err)
	}
	_, err = kit.Client.Enqueue(t.Context(), parcel{To: "Ada"}, opts)
	if dup, ok := errors.AsType[*tasks.DuplicateError](err); !ok || dup.ID != info.ID {
		t.Errorf("error %v, want a DuplicateError that names %s", err, info.ID)
	}
	if err := unique.NewLocks(rdb).Release(t.Context(), "another job", map[string]string{"carpool-unique": key}); err != nil {
		t.Fatal(err)
	}
	if n := rdb.Exists(t.Context(), key).Val(); n != 1 {
		t.Error("a job gave up a key that another one holds")
	}
}

func TestClient_WaitShowsProgressAndEndsWithItsContext(t *testing.T) {
	t.Parallel()
	kit := taskstest.New(t)
	info, err := kit.Client.Enqueue(t.Context(), parcel{To: "Ada"}, nil)
	if err != nil {
		t.Fatal(err)
	}
	stop := errors.New("enough")
	ctx, cancel := context.WithCancelCause(t.Context())
	_, err = kit.Client.Wait(ctx, info.Queue, info.ID, func(job *tasks.Info) {
		if job.State == tasks.StatePending {
			cancel(stop)
		}
	})
	if !errors.Is(err, stop) {
		t.Errorf("error %v, want the cause of the context's end", err)
	}
}

func TestClient_WhatCannotBeANameInRedisIsRefused(t *testing.T) {
	t.Parallel()
	kit := taskstest.New(t)
	for want, opts := range map[string]tasks.EnqueueOptions{
		`"a b" is no queue's name`:            {Queue: "a b"},
		`"a}{b" is no queue's name`:           {Queue: "a}{b"},
		`is no queue's name`:                  {Queue: strings.Repeat("q", 101)},
		"the unique key has 1001 bytes":       {UniqueKey: strings.Repeat("k", 1001)},
		"the id must be 1 to 200 letters":     {ID: "a\nb"},
		"the id must be 1 to 200 letters, di": {ID: strings.Repeat("i", 201)},
	} {
		info, err := kit.Client.Enqueue(t.Context(), parcel{To: "Ada"}, &opts)
		if err == nil || !strings.HasPrefix(err.Error(), "tasks: enqueue parcel:send: ") || !strings.Contains(err.Error(), want) || len(err.Error()) > 300 {
			t.Errorf("%s: %+v, %v", want, info, err)
		}
	}
	if _, err := kit.Client.Enqueue(t.Context(), parcel{To: "Ada"}, &tasks.EnqueueOptions{
		Queue: strings.Repeat("q", 100), UniqueKey: strings.Repeat("\n", 1000), ID: strings.Repeat("i", 200),
	}); err != nil {
		t.Errorf("at the bounds: %v", err)
	}
}

func TestClient_WaitGoesOnWhileRedisIsAway(t *testing.T) {
	t.Parallel()
	kit := taskstest.New(t)
	proxied, proxy := testservers.ThroughProxy(t, kit.RedisURL)
	rdb, err := tasks.OpenRedis(proxied)
	if err != nil {
		t.Fatal(err)
	}
	defer rdb.Close()
	info, err := kit.Client.Enqueue(t.Context(), parcel{To: "Ada"}, nil)
	if err != nil {
		t.Fatal(err)
	}
	_, err = tasks.NewClient(rdb).Wait(t.Context(), info.Queue, info.ID, func(*tasks.Info) {
		proxy.Refuse()
		proxy.Reset()
		if err := kit.Client.Cancel(t.Context(), info.ID); err != nil {
			t.Error(err)
		}
		time.AfterFunc(3*time.Second, proxy.Heal) // longer than go-redis alone goes on trying
	})
	if err != nil {
		t.Errorf("error %v, want none: the job was removed", err)
	}
}

func TestClient_WaitSaysThatAJobWasCancelled(t *testing.T) {
	t.Parallel()
	kit := taskstest.New(t)
	cancelled := func(retention time.Duration) error {
		t.Helper()
		info, err := kit.Client.Enqueue(t.Context(), parcel{To: "Ada"}, &tasks.EnqueueOptions{Retention: retention})
		if err != nil {
			t.Fatal(err)
		}
		_, err = kit.Client.Wait(t.Context(), info.Queue, info.ID, func(*tasks.Info) {
			if err := kit.Client.Cancel(t.Context(), info.ID); err != nil {
				t.Error(err)
			}
		})
		return err
	}
	if err := cancelled(time.Hour); !errors.Is(err, tasks.ErrJobCancelled) || !errors.Is(err, tasks.ErrJobFailed) {
		t.Errorf("error %v, want that it was cancelled", err)
	}
	if err := cancelled(0); err != nil {
		t.Errorf("error %v, want none: it may be done, as it was not to be retained", err)
	}
}

// openRedis opens the kit's Redis, by its URL as it is changed.
func openRedis(t *testing.T, kit *taskstest.Kit, change func(*url.URL)) redis.UniversalClient {
	t.Helper()
	at := testservers.ParseURL(t, kit.RedisURL)
	change(at)
	rdb, err := tasks.OpenRedis(at.String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = rdb.Close() })
	return rdb
}

func TestClient_AJobThatWasCancelledWhileItRanIsCancelled(t *testing.T) {
	t.Parallel()
	kit := taskstest.New(t)
	rdb, running := openRedis(t, kit, func(*url.URL) {}), make(chan struct{})
	server := asynq.NewServerFromRedisClient(rdb, asynq.Config{LogLevel: asynq.FatalLevel})
	err := server.Start(asynq.HandlerFunc(func(ctx context.Context, _ *asynq.Task) error {
		close(running)
		<-ctx.Done()
		return ctx.Err()
	}))
	if err != nil {
		t.Fatal(err)
	}
	defer server.Shutdown()
	job, err := asynq.NewClientFromRedisClient(rdb).EnqueueContext(t.Context(), asynq.NewTask("parcel:send", []byte(`{"to":"Ada"}`)), asynq.MaxRetry(0))
	if err != nil {
		t.Fatal(err)
	}
	<-running
	if err := kit.Client.Cancel(t.Context(), job.ID); err != nil {
		t.Fatal(err)
	}
	info, err := kit.Client.Get(t.Context(), job.Queue, job.ID)
	if err != nil || info.State != tasks.StateArchived || info.LastError != "cancelled" {
		t.Errorf("it is %+v, error %v", info, err)
	}
	err = kit.Client.Cancel(t.Context(), job.ID)
	if !errors.Is(err, tasks.ErrJobEnded) || !strings.HasSuffix(err.Error(), ": it is cancelled") {
		t.Errorf("cancelled again: %v", err)
	}
}

func TestClient_CancelReturnsWhatRedisRefuses(t *testing.T) {
	t.Parallel()
	kit := taskstest.New(t)
	info, err := kit.Client.Enqueue(t.Context(), parcel{To: "Ada"}, nil)
	if err != nil {
		t.Fatal(err)
	}
	user, owner := "cannot-delete-"+info.ID, openRedis(t, kit, func(*url.URL) {})
	if err := owner.Do(t.Context(), "ACL", "SETUSER", user, "on", ">hush", "~*", "&*", "+@all", "-lrem").Err(); err != nil {
		t.Fatal(err)
	}
	defer owner.Do(context.Background(), "ACL", "DELUSER", user)
	rdb := openRedis(t, kit, func(at *url.URL) { at.User = url.UserPassword(user, "hush") })
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	err = tasks.NewClient(rdb).Cancel(ctx, info.ID)
	if err == nil || ctx.Err() != nil || errors.Is(err, tasks.ErrNoSuchJob) || errors.Is(err, tasks.ErrJobEnded) {
		t.Errorf("error %v, want that this user can't run the command", err)
	}
	kit.RequireEnqueued(t, parcel{To: "Ada"})
}

func TestJob_ProgressIsWrittenAtMostOnceASecond(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var written []string
		job := &tasks.Job{WriteResult: func(b []byte) error { written = append(written, string(b)); return nil }}
		for i := range 25 {
			if err := job.Progress(t.Context(), map[string]int{"rows": i}); err != nil {
				t.Fatal(err)
			}
			time.Sleep(100 * time.Millisecond)
		}
		want := []string{`{"progress":{"rows":0}}`, `{"progress":{"rows":10}}`, `{"progress":{"rows":20}}`}
		if diff := cmp.Diff(want, written); diff != "" {
			t.Errorf("(-want +got)\n%s", diff)
		}
	})
}

func TestClient_EnqueueingTheSameIDAgainDoesNothing(t *testing.T) {
	t.Parallel()
	kit := taskstest.New(t)
	opts := &tasks.EnqueueOptions{ID: "order-17"}
	first, err := kit.Client.Enqueue(t.Context(), maintenance.PoolValidate{}, opts)
	if err != nil || first.ID != "order-17" {
		t.Fatalf("%+v, error %v", first, err)
	}
	again, err := kit.Client.Enqueue(t.Context(), maintenance.PoolValidate{}, opts)
	if err != nil || again.ID != first.ID {
		t.Errorf("again: %+v, error %v", again, err)
	}
	if n := len(kit.Enqueued(t)); n != 1 {
		t.Errorf("%d jobs are enqueued", n)
	}
	_, err = kit.Client.Enqueue(t.Context(), maintenance.Prune{}, opts)
	if err == nil || !strings.Contains(err.Error(), "has a job of the kind pool:validate with this id") {
		t.Errorf("another kind: error %v", err)
	}
	for _, id := range []string{"a b", "{a}", "a\n", strings.Repeat("a", 201), "ä"} {
		// One that only begins like it is a user's.
		if _, err := kit.Client.Enqueue(t.Context(), parcel{To: "Ada"}, &tasks.EnqueueOptions{Queue: "instance-billing"}); err != nil {
			t.Error(err)
		}
		if _, err := kit.Client.Enqueue(t.Context(), maintenance.PoolValidate{}, &tasks.EnqueueOptions{ID: id}); err == nil {
			t.Errorf("the id %q is taken", id)
		}
	}
}

func TestClient_JobIsDueToTheMicrosecondAndNeverBefore(t *testing.T) {
	t.Parallel()
	kit := taskstest.New(t)
	rdb := openRedis(t, kit, func(*url.URL) {})
	runAt := time.Now().Add(time.Hour).Truncate(time.Second).Add(900 * time.Millisecond)
	info, err := tasks.NewClient(rdb).Enqueue(t.Context(), parcel{To: "Ada"}, &tasks.EnqueueOptions{RunAt: runAt})
	if err != nil {
		t.Fatal(err)
	}
	score := rdb.ZScore(t.Context(), asynqwire.Scheduled(info.Queue), info.ID).Val()
	if due := time.UnixMicro(int64(math.Round(score * 1e6))); !due.Equal(runAt.Truncate(time.Microsecond)) {
		t.Errorf("it is due at %s, want %s", due, runAt)
	}
}
