//go:build unix

package fleet

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/hibiken/asynq"
	"github.com/redis/go-redis/v9"

	"github.com/carpool-go/carpool/internal/instance"
	"github.com/carpool-go/carpool/internal/testservers"
	"github.com/carpool-go/carpool/tasks"
	"github.com/carpool-go/carpool/tasks/maintenance"
	"github.com/carpool-go/carpool/worker/internal/workertest"
)

// The variables with which this test program is a member of a fleet instead, in a
// process that can be killed and paused.
const (
	memberOf   = "CARPOOL_FLEET_MEMBER_OF" // the URL of Redis
	memberName = "CARPOOL_FLEET_MEMBER_NAME"
)

func init() {
	if url := os.Getenv(memberOf); url != "" {
		os.Exit(beMember(url, os.Getenv(memberName)))
	}
}

// beMember is an instance that enqueues to its own queue, and runs what is there:
// job 0 never ends, and each of the others counts.
func beMember(url, name string) int {
	rdb, err := tasks.OpenRedis(url)
	if err != nil {
		panic(err)
	}
	f := newFleet(rdb, name, slog.DiscardHandler)
	if err := f.Start(); err != nil {
		panic(err)
	}
	server := asynq.NewServerFromRedisClient(rdb, asynq.Config{
		Queues: map[string]int{f.cfg.Self.OwnQueue: 1}, Concurrency: 2, LogLevel: asynq.FatalLevel,
		TaskCheckInterval: 10 * time.Millisecond,
	})
	err = server.Start(asynq.HandlerFunc(func(ctx context.Context, _ *asynq.Task) error {
		if id, _ := asynq.GetTaskID(ctx); strings.HasSuffix(id, "-0") {
			select {}
		}
		return rdb.Incr(ctx, memberRan(name)).Err()
	}))
	if err != nil {
		panic(err)
	}
	client := tasks.NewClient(rdb)
	for i := 0; ; i++ {
		opts := tasks.EnqueueOptions{Queue: f.cfg.Self.OwnQueue, ID: fmt.Sprintf("%s-%d", name, i)}
		_, _ = client.Enqueue(context.Background(), maintenance.PoolValidate{}, &opts)
		time.Sleep(20 * time.Millisecond)
	}
}

func memberRan(name string) string { return "ran:" + name }

// member is such a process.
type member struct {
	name string
	cmd  *exec.Cmd
}

// startMember returns when the member runs jobs.
func startMember(t *testing.T, rdb redis.UniversalClient, url, name string) *member {
	t.Helper()
	m := &member{name, exec.Command(os.Args[0])}
	m.cmd.Env = append(os.Environ(), memberOf+"="+url, memberName+"="+name)
	m.cmd.Stderr = os.Stderr
	if err := m.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = m.cmd.Process.Kill()
		_ = m.cmd.Wait()
	})
	m.runsMore(t, rdb)
	return m
}

func (m *member) signal(t *testing.T, sig syscall.Signal) {
	t.Helper()
	if err := m.cmd.Process.Signal(sig); err != nil {
		t.Fatal(err)
	}
}

// runsMore waits until the member has run a job after this call.
func (m *member) runsMore(t *testing.T, rdb redis.UniversalClient) {
	t.Helper()
	ran := func() int {
		n, _ := rdb.Get(t.Context(), memberRan(m.name)).Int()
		return n
	}
	before := ran()
	workertest.Eventually(t, m.name+" runs a job", func() bool { return ran() > before })
}

func TestFleet_TheQueueOfAKilledInstanceIsRemovedWithItsActiveJob(t *testing.T) {
	t.Parallel()
	url := testservers.Redis(t)
	rdb := workertest.OpenRedis(t, url)
	dead := startMember(t, rdb, url, "dead-00000001")
	queue := instance.Queue(dead.name)
	inspector := asynq.NewInspectorFromRedisClient(rdb)
	workertest.Eventually(t, "its first job is active", func() bool {
		info, err := inspector.GetTaskInfo(queue, dead.name+"-0")
		return err == nil && info.State == asynq.TaskStateActive
	})
	others := []*Fleet{newFleet(rdb, "b-00000002", slog.DiscardHandler), newFleet(rdb, "c-00000003", slog.DiscardHandler)}
	for _, f := range others {
		startFleet(t, f)
	}
	now := time.Now()
	sweep := func() {
		t.Helper()
		now = now.Add(missingFor)
		errs := make([]error, len(others))
		var wg sync.WaitGroup
		for i, f := range others {
			wg.Go(func() { errs[i] = f.sweepDead(t.Context(), now) })
		}
		wg.Wait()
		if err := errors.Join(errs...); err != nil {
			t.Fatal(err)
		}
	}
	sweep()
	sweep()
	sweep()
	if !isListed(t, rdb, queue) {
		t.Fatal("the queue of a live instance was removed")
	}

	dead.signal(t, syscall.SIGKILL)
	workertest.Eventually(t, "nothing is seen of it any more", func() bool {
		absent, err := absentInstances(t.Context(), rdb)
		return err == nil && len(absent) == 1
	})
	if err := inspector.DeleteQueue(queue, true); err == nil {
		t.Fatal("asynq removes the queue itself: the job is not active")
	}
	if alive, missing := fleetShown(t, rdb); !slices.Equal(missing, []string{dead.name}) || len(alive) != 2 {
		t.Errorf("alive are %q, missing %q", alive, missing)
	}
	sweep()
	if !isListed(t, rdb, queue) {
		t.Fatal("one sweep was enough")
	}
	sweep()
	if left := redisKeys(t, rdb, "asynq:{"+queue); len(left) > 0 || isListed(t, rdb, queue) {
		t.Errorf("there are still %q; the queue is listed: %t", left, isListed(t, rdb, queue))
	}
	if alive, missing := fleetShown(t, rdb); len(missing) > 0 || len(alive) != 2 {
		t.Errorf("then alive are %q, missing %q", alive, missing)
	}
	for _, f := range others {
		if !isListed(t, rdb, f.cfg.Self.OwnQueue) {
			t.Errorf("the queue of %s is gone", f.cfg.Self.Name)
		}
	}
}

func TestFleet_APausedInstanceFindsItselfAgain(t *testing.T) {
	t.Parallel()
	url := testservers.Redis(t)
	rdb := workertest.OpenRedis(t, url)
	paused := startMember(t, rdb, url, "paused-00000001")
	queue := instance.Queue(paused.name)
	other := startFleet(t, newFleet(rdb, "b-00000002", slog.DiscardHandler))
	now := time.Now()
	sweep := func() {
		t.Helper()
		now = now.Add(missingFor)
		if err := other.sweepDead(t.Context(), now); err != nil {
			t.Fatal(err)
		}
	}
	pause := func() {
		t.Helper()
		paused.signal(t, syscall.SIGSTOP)
		workertest.Eventually(t, "nothing is seen of it any more", func() bool {
			absent, err := absentInstances(t.Context(), rdb)
			return err == nil && len(absent) == 1
		})
	}
	isBack := func() {
		t.Helper()
		paused.signal(t, syscall.SIGCONT)
		workertest.Eventually(t, "it is in the fleet again", func() bool {
			alive, missing := fleetShown(t, rdb)
			return len(alive) == 2 && len(missing) == 0
		})
		paused.runsMore(t, rdb)
		if !isListed(t, rdb, queue) {
			t.Error("its queue is not listed")
		}
	}

	// For so long that one sweep finds it missing: its queue stays as it is.
	pause()
	before := redisKeys(t, rdb, "asynq:{"+queue)
	sweep()
	if diff := cmp.Diff(before, redisKeys(t, rdb, "asynq:{"+queue)); diff != "" {
		t.Errorf("its keys (-before +after):\n%s", diff)
	}
	isBack()
	sweep()
	if !isListed(t, rdb, queue) {
		t.Error("a sweep after it had come back counted with the one before")
	}

	// For so long that it counts as dead: it makes itself a new queue.
	pause()
	sweep()
	if !isListed(t, rdb, queue) {
		t.Error("a sweep before it had come back counted with the one after")
	}
	sweep()
	if left := redisKeys(t, rdb, "asynq:{"+queue); len(left) > 0 || isListed(t, rdb, queue) {
		t.Errorf("there are still %q; the queue is listed: %t", left, isListed(t, rdb, queue))
	}
	isBack()
}
