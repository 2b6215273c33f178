package worker

import (
	"testing"
	"time"

	"github.com/hibiken/asynq"

	"github.com/carpool-go/carpool/internal/testservers"
	"github.com/carpool-go/carpool/tasks"
	"github.com/carpool-go/carpool/worker/internal/workertest"
)

func TestValidationClock_ValidationsDoNotPileUpOnAQueueThatNobodyServes(t *testing.T) {
	t.Parallel()
	rdb := workertest.OpenRedis(t, testservers.Redis(t))
	c := &validationClock{client: tasks.NewClient(rdb), queue: "instance-a", every: time.Millisecond, log: workertest.Discard()}
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	defer c.Stop()
	// Many ticks go by; the queue shows that only the first was enqueued.
	seen := 0
	workertest.Eventually(t, "the clock ticks", func() bool {
		if rdb.Get(t.Context(), "carpool:unique:13:pool:validate:instance-a").Err() == nil {
			seen++
		}
		return seen >= 50
	})
	pending, err := asynq.NewInspectorFromRedisClient(rdb).ListPendingTasks("instance-a")
	if err != nil {
		t.Fatal(err)
	}
	if len(pending) != 1 || pending[0].Type != "pool:validate" {
		t.Errorf("%d jobs wait on the instance's queue, want one", len(pending))
	}
	c.Stop() // twice is safe
}

func TestValidationClock_MayBeStoppedWithoutStart(t *testing.T) {
	t.Parallel()
	new(validationClock).Stop()
}
