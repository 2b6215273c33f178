package scheduler_test

import (
	"log/slog"
	"testing"
	"time"

	"github.com/hibiken/asynq"

	"github.com/carpool-go/carpool/internal/testservers"
	"github.com/carpool-go/carpool/scheduler"
	"github.com/carpool-go/carpool/tasks"
	"github.com/carpool-go/carpool/tasks/taskstest"
)

func TestMain(m *testing.M) { taskstest.Main(m) }

func TestScheduler_ValidationsDoNotPileUpOnAQueueThatNobodyServes(t *testing.T) {
	t.Parallel()
	rdb, err := tasks.OpenRedis(testservers.Redis(t))
	if err != nil {
		t.Fatal(err)
	}
	defer rdb.Close()
	s, err := scheduler.Start(scheduler.Config{
		Client: tasks.NewClient(rdb), Queue: "instance-a", ValidateEvery: time.Millisecond, Log: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Stop()
	inspector := asynq.NewInspectorFromRedisClient(rdb)
	// Commands show that ticks go on; the queue shows that only the first was
	// enqueued.
	var seen int64
	for giveUp := time.Now().Add(time.Minute); seen < 50; time.Sleep(time.Millisecond) {
		if time.Now().After(giveUp) {
			t.Fatal("the scheduler does not tick")
		}
		if err := rdb.Get(t.Context(), "carpool:unique:pool:validate:instance-a").Err(); err == nil {
			seen++
		}
	}
	pending, err := inspector.ListPendingTasks("instance-a")
	if err != nil {
		t.Fatal(err)
	}
	if len(pending) != 1 || pending[0].Type != "pool:validate" {
		t.Errorf("%d jobs wait on the instance's queue, want one", len(pending))
	}
	s.Stop() // twice is safe
}

func TestStart_SaysWhatIsMissing(t *testing.T) {
	t.Parallel()
	if _, err := scheduler.Start(scheduler.Config{}); err == nil {
		t.Error("an empty Config starts a scheduler")
	}
}
