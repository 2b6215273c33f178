package asynqwire_test

import (
	"fmt"
	"testing"
	"time"

	"github.com/alicebob/miniredis/v2"
	"github.com/hibiken/asynq"
	"github.com/redis/go-redis/v9"

	"github.com/carpool-go/carpool/internal/asynqwire"
)

// inspected returns a Redis, and asynq's own Inspector of it, as asynqmon reads it.
func inspected(t *testing.T) (redis.UniversalClient, *asynq.Inspector) {
	t.Helper()
	rdb := redis.NewClient(&redis.Options{Addr: miniredis.RunT(t).Addr()})
	t.Cleanup(func() { _ = rdb.Close() })
	return rdb, asynq.NewInspectorFromRedisClient(rdb)
}

func TestShowSchedulerEntries_AsynqReadsThemBack(t *testing.T) {
	t.Parallel()
	rdb, inspector := inspected(t)
	next := time.Date(2026, 5, 5, 12, 0, 0, 500, time.UTC)
	never := asynqwire.SchedulerEntry{ID: "a", Spec: "@every 1s", Kind: "test:ping", Payload: []byte(`{"to": "a"}`), Next: next}
	once := never
	once.ID, once.Prev = "b", next.Add(-time.Second)
	once.Options = []asynq.Option{asynq.Queue("pings"), asynq.MaxRetry(3)}
	for _, entries := range [][]asynqwire.SchedulerEntry{{never, never, never}, {never, once}} {
		if err := asynqwire.ShowSchedulerEntries(t.Context(), rdb, "carpool", entries, time.Minute); err != nil {
			t.Fatal(err)
		}
	}
	shown, err := inspector.SchedulerEntries()
	if err != nil {
		t.Fatal(err)
	}
	if len(shown) != 2 {
		t.Fatalf("%d entries, want the last two", len(shown))
	}
	a, b := shown[0], shown[1]
	if a.ID != "a" || a.Spec != "@every 1s" || a.Task.Type() != "test:ping" || string(a.Task.Payload()) != `{"to": "a"}` ||
		!a.Next.Equal(next) || !a.Prev.IsZero() {
		t.Errorf("a: %+v", a)
	}
	if options := fmt.Sprint(b.Opts); b.ID != "b" || !b.Prev.Equal(once.Prev) || options != `[Queue("pings") MaxRetry(3)]` {
		t.Errorf("b: %+v, options %s", b, options)
	}
}

func TestAddSchedulerEvents_AsynqReadsTheNewestThousand(t *testing.T) {
	t.Parallel()
	rdb, inspector := inspected(t)
	at := time.Date(2026, 5, 5, 12, 0, 0, 0, time.UTC)
	for i := range 1002 {
		if err := asynqwire.AddSchedulerEvents(t.Context(), rdb, "a", []string{fmt.Sprint(i)}, at.Add(time.Duration(i)*time.Second)); err != nil {
			t.Fatal(err)
		}
	}
	events, err := inspector.ListSchedulerEnqueueEvents("a", asynq.PageSize(2000))
	if err != nil {
		t.Fatal(err)
	}
	if len(events) != 1000 {
		t.Fatalf("%d events", len(events))
	}
	if e := events[0]; e.TaskID != "1001" || !e.EnqueuedAt.Equal(at.Add(1001*time.Second)) {
		t.Errorf("the newest: %+v", e)
	}
}
