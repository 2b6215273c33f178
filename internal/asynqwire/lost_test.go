package asynqwire_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/hibiken/asynq"
	"github.com/redis/go-redis/v9"

	"github.com/carpool-go/carpool/internal/asynqwire"
	"github.com/carpool-go/carpool/internal/asynqwire/wiretest"
	"github.com/carpool-go/carpool/internal/testservers"
	"github.com/carpool-go/carpool/tasks"
)

func openRedis(t *testing.T) redis.UniversalClient {
	t.Helper()
	rdb, err := tasks.OpenRedis(testservers.Redis(t))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = rdb.Close() })
	return rdb
}

// lostIn are the ids of a queue's lost jobs by their states.
func lostIn(t *testing.T, rdb redis.UniversalClient, most int, states ...string) map[string][]string {
	t.Helper()
	lost, err := asynqwire.FindLost(t.Context(), rdb, "q", most, states...)
	if err != nil {
		t.Fatal(err)
	}
	byState := make(map[string][]string)
	for _, job := range lost {
		byState[job.State] = append(byState[job.State], job.ID)
	}
	return byState
}

func TestLost_InEachStateAndWayTheyAreFoundAndForgottenAndTheRestStays(t *testing.T) {
	t.Parallel()
	for _, state := range asynqwire.States() {
		for _, how := range wiretest.Losses() {
			t.Run(state+" "+how, func(t *testing.T) {
				t.Parallel()
				rdb := openRedis(t)
				for _, id := range []string{"sound", "lost", "sound2"} {
					wiretest.Put(t, rdb, "q", id, state)
				}
				if lost := lostIn(t, rdb, -1); len(lost) > 0 {
					t.Fatalf("of sound jobs %v are lost", lost)
				}
				wiretest.Lose(t, rdb, "q", "lost", how)
				if diff := cmp.Diff(map[string][]string{state: {"lost"}}, lostIn(t, rdb, 10)); diff != "" {
					t.Errorf("(-want +got):\n%s", diff)
				}
				q, err := asynqwire.ReadQueue(t.Context(), rdb, "q", 10)
				if err != nil || q.Jobs[state] != 3 || len(q.Lost) != 1 || len(q.Unreadable) != 0 {
					t.Errorf("the queue is %+v, %v", q, err)
				}
				for _, id := range []string{"sound", "lost"} {
					removed, err := asynqwire.Forget(t.Context(), rdb, "q", id)
					if err != nil || removed != (id == "lost") {
						t.Errorf("%s: removed %t, %v", id, removed, err)
					}
				}
				if q, err = asynqwire.ReadQueue(t.Context(), rdb, "q", 10); err != nil || q.Jobs[state] != 2 || len(q.Lost) != 0 {
					t.Errorf("then the queue is %+v, %v", q, err)
				}
				mine, err := rdb.Exists(t.Context(), asynqwire.Task("q", "lost")).Result()
				if err != nil || (mine == 1) != (how == "overwritten") {
					t.Errorf("%d keys are left, %v", mine, err)
				}
			})
		}
	}
}

func TestFindLost_LooksAtTheFirstOfEachStateAndAtAllIfItIsTold(t *testing.T) {
	t.Parallel()
	rdb := openRedis(t)
	for _, state := range []string{"pending", "archived"} {
		for _, id := range []string{"1", "2", "3"} {
			wiretest.Put(t, rdb, "q", state+id, state)
			wiretest.Lose(t, rdb, "q", state+id, "deleted")
		}
	}
	if diff := cmp.Diff(map[string][]string{"pending": {"pending1"}, "archived": {"archived1"}}, lostIn(t, rdb, 1)); diff != "" {
		t.Errorf("of one (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff(map[string][]string{"archived": {"archived1", "archived2", "archived3"}}, lostIn(t, rdb, -1, "archived")); diff != "" {
		t.Errorf("of all that are archived (-want +got):\n%s", diff)
	}
}

func TestForget_LeavesAJobThatMayRunToItsWorker(t *testing.T) {
	t.Parallel()
	rdb := openRedis(t)
	wiretest.Put(t, rdb, "q", "runs", "active")
	wiretest.Lose(t, rdb, "q", "runs", "deleted")
	lease := redis.Z{Score: float64(time.Now().Add(20 * time.Second).Unix()), Member: "runs"}
	if err := rdb.ZAdd(t.Context(), asynqwire.Leases("q"), lease).Err(); err != nil {
		t.Fatal(err)
	}
	if removed, err := asynqwire.Forget(t.Context(), rdb, "q", "runs"); removed || err != nil {
		t.Errorf("removed %t, %v", removed, err)
	}
	if err := asynqwire.ForgetActive(t.Context(), rdb, "q", "runs"); err != nil {
		t.Error(err)
	}
	if state, err := asynqwire.Listed(t.Context(), rdb, "q", "runs"); state != "" || err != nil {
		t.Errorf("a worker that knows better leaves it %s, %v", state, err)
	}
}

func TestReadQueue_CountsWhatItCanWhereAListIsSomethingElse(t *testing.T) {
	t.Parallel()
	rdb := openRedis(t)
	wiretest.Put(t, rdb, "q", "a", "scheduled")
	for _, key := range []string{asynqwire.Pending("q"), asynqwire.Archived("q")} {
		if err := rdb.Set(t.Context(), key, "mine", 0).Err(); err != nil {
			t.Fatal(err)
		}
	}
	q, err := asynqwire.ReadQueue(t.Context(), rdb, "q", 10)
	if err != nil {
		t.Fatal(err)
	}
	want := &asynqwire.QueueState{
		Jobs:       map[string]int{"pending": 0, "active": 0, "scheduled": 1, "retry": 0, "archived": 0, "completed": 0, "aggregating": 0},
		Unreadable: []string{asynqwire.Pending("q"), asynqwire.Archived("q")},
	}
	if diff := cmp.Diff(want, q); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

func TestGetTask_SaysOfALostJobThatItIs(t *testing.T) {
	t.Parallel()
	rdb := openRedis(t)
	inspector := asynq.NewInspectorFromRedisClient(rdb)
	for _, how := range append(wiretest.Losses(), "unreadable") {
		id := strings.ReplaceAll(how, " ", "-")
		wiretest.Put(t, rdb, "q", id, "archived")
		wiretest.Lose(t, rdb, "q", id, how)
		want := asynqwire.ErrLost
		if how == "deleted" {
			want = asynq.ErrTaskNotFound
		}
		if _, err := asynqwire.GetTask(t.Context(), rdb, inspector, "q", id); !errors.Is(err, want) {
			t.Errorf("%s: %v", how, err)
		}
		if state, err := asynqwire.Listed(t.Context(), rdb, "q", id); state != "archived" || err != nil {
			t.Errorf("%s: listed as %q, %v", how, state, err)
		}
	}
	wiretest.Put(t, rdb, "q", "without-state", "pending")
	if err := rdb.HDel(t.Context(), asynqwire.Task("q", "without-state"), "state").Err(); err != nil {
		t.Fatal(err)
	}
	if _, err := asynqwire.GetTask(t.Context(), rdb, inspector, "q", "without-state"); !errors.Is(err, asynqwire.ErrLost) {
		t.Errorf("without a state: %v", err)
	}
	wiretest.Put(t, rdb, "q", "sound", "retry")
	info, err := asynqwire.GetTask(t.Context(), rdb, inspector, "q", "sound")
	if err != nil || info.State != asynq.TaskStateRetry {
		t.Errorf("a sound one: %+v, %v", info, err)
	}
}

func TestReadQueue_CountsTheJobsOfGroupsAndOfThoseThatAreMadeOne(t *testing.T) {
	t.Parallel()
	rdb := openRedis(t)
	client := asynq.NewClientFromRedisClient(rdb)
	count := func() int {
		t.Helper()
		q, err := asynqwire.ReadQueue(t.Context(), rdb, "q", 10)
		if err != nil {
			t.Fatal(err)
		}
		return q.Jobs["aggregating"]
	}
	for i := range 5 {
		if _, err := client.EnqueueContext(t.Context(), asynq.NewTask("x", nil), asynq.Queue("q"), asynq.Group(fmt.Sprint("group:", i%2))); err != nil {
			t.Fatal(err)
		}
	}
	if n := count(); n != 5 {
		t.Errorf("of 5 jobs in two groups it counts %d", n)
	}
	counted := make(chan int, 10) // while they are in neither group
	server := asynq.NewServerFromRedisClient(rdb, asynq.Config{
		Queues: map[string]int{"q": 1}, LogLevel: asynq.FatalLevel, GroupGracePeriod: time.Second, GroupMaxSize: 2,
		GroupAggregator: asynq.GroupAggregatorFunc(func(string, []*asynq.Task) *asynq.Task {
			counted <- count()
			return asynq.NewTask("together", nil)
		}),
	})
	if err := server.Start(asynq.HandlerFunc(func(context.Context, *asynq.Task) error { return nil })); err != nil {
		t.Fatal(err)
	}
	defer server.Shutdown()
	select {
	case n := <-counted:
		if n != 5 {
			t.Errorf("while some are made one, it counts %d", n)
		}
	case <-time.After(time.Minute):
		t.Fatal("nothing is aggregated")
	}
	for giveUp := time.Now().Add(time.Minute); count() > 0; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(giveUp) {
			t.Fatalf("it still counts %d", count())
		}
	}
}
