package cli

import (
	"context"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/hibiken/asynq"

	"github.com/carpool-go/carpool/admin"
	"github.com/carpool-go/carpool/internal/testservers"
	"github.com/carpool-go/carpool/tasks"
	"github.com/carpool-go/carpool/tasks/maintenance"
	"github.com/carpool-go/carpool/worker/internal/workertest"
)

func TestPauseAndResume_SayHowTheQueueStands(t *testing.T) {
	t.Parallel()
	b := setup(t)
	for _, queue := range []string{"default", "low", "instance-a-00000001"} {
		if _, err := b.Client.Enqueue(t.Context(), maintenance.PoolValidate{}, &tasks.EnqueueOptions{Queue: queue}); err != nil {
			t.Fatal(err)
		}
	}
	for _, c := range []struct {
		command, says string
		paused        bool
	}{
		{"pause", "low is paused: its jobs wait until: worker resume low\n", true},
		{"pause", "low is paused: its jobs wait until: worker resume low\n", true},
		{"resume", "low is resumed: its jobs are run\n", false},
		{"resume", "low is resumed: its jobs are run\n", false},
	} {
		stdout, stderr, code := b.run(t, nil, c.command, "low")
		if code != 0 || stdout != c.says || stderr != "" {
			t.Errorf("%s: exit code %d\n%s%s", c.command, code, stdout, stderr)
		}
		if info, err := b.Inspector.GetQueueInfo("low"); err != nil || info.Paused != c.paused {
			t.Errorf("after %s: %+v, %v", c.command, info, err)
		}
	}
	for _, command := range []string{"pause", "resume"} {
		stdout, stderr, code := b.run(t, nil, command, "lwo")
		if code != exitFailed || stdout != "" || stderr != "worker: queue \"lwo\": no queue of this name has had a job yet; there are: default, low\n" {
			t.Errorf("%s: exit code %d\n%s%s", command, code, stdout, stderr)
		}
	}
}

func TestPause_WhereThereIsNoQueueYet(t *testing.T) {
	t.Parallel()
	p := Program{Name: "worker", Env: environment([]string{"REDIS_URL=" + testservers.Redis(t)})}
	if _, stderr, code := p.run(t, "pause", "low"); code != exitFailed || !strings.HasSuffix(stderr, "; there is none yet\n") {
		t.Errorf("exit code %d\n%s", code, stderr)
	}
}

func TestEnqueue_WarnsOfAQueueThatNobodyPullsFrom(t *testing.T) {
	t.Parallel()
	b := setup(t)
	rdb := b.Redis(t)
	warning := func(args ...string) string {
		t.Helper()
		stdout, stderr, code := b.run(t, nil, append([]string{"enqueue", "pool:validate", "{}"}, args...)...)
		if code != 0 || len(stdout) != 37 {
			t.Errorf("%v: exit code %d\n%s%s", args, code, stdout, stderr)
		}
		return stderr
	}
	if got, want := warning(), "no worker is up: the job waits on the queue default for one\n"; got != want {
		t.Errorf("with no worker it says %q, want %q", got, want)
	}
	startInstance(t, rdb, "a-00000001", time.Now(), false)
	for _, args := range [][]string{{}, {"--queue=critical"}, {"--queue=instance-a-00000001"}} {
		if got := warning(args...); got != "" {
			t.Errorf("%v: the queue has a worker, and it says %q", args, got)
		}
	}
	want := "no worker that is up pulls from the queue deafult: the job waits there for one; those that are up pull from critical, default\n"
	for _, args := range [][]string{{"--queue=deafult"}, {"--queue=deafult", "--in=1h"}} {
		if got := warning(args...); got != want {
			t.Errorf("%v: it says %q, want %q", args, got, want)
		}
	}
	// A server that isn't a worker of carpool's.
	server := asynq.NewServerFromRedisClient(rdb, asynq.Config{Queues: map[string]int{"mail": 1}, LogLevel: asynq.FatalLevel})
	if err := server.Start(asynq.HandlerFunc(func(context.Context, *asynq.Task) error { return nil })); err != nil {
		t.Fatal(err)
	}
	defer server.Shutdown()
	a := admin.New(rdb, nil)
	workertest.Eventually(t, "asynq shows the server", func() bool {
		queues, err := a.ServedQueues(t.Context())
		return err == nil && len(queues) == 4
	})
	if got := warning("--queue=mail"); got != "" {
		t.Errorf("asynq's server pulls from it, and it says %q", got)
	}
}

func TestEnqueue_WarnsOfTheQueueBeforeItWaits(t *testing.T) {
	t.Parallel()
	b := setup(t)
	startInstance(t, b.Redis(t), "a-00000001", time.Now(), false)
	ctx, interrupt := context.WithCancel(t.Context())
	defer interrupt()
	out, errs := workertest.NewLog(), workertest.NewLog()
	var ended sync.WaitGroup
	ended.Go(func() {
		p := Program{Name: "worker", Env: environment(b.Env)}
		p.Run(ctx, []string{"enqueue", "pool:validate", "{}", "--queue=deafult", "--wait"}, strings.NewReader(""), out, errs)
	})
	errs.Wait(t, "no worker that is up pulls from the queue deafult: ")
	interrupt()
	ended.Wait()
}

// Before the first job, and not after the first wave.
func TestPause_TakesAQueueThatAWorkerPullsFromAndThatHasHadNoJob(t *testing.T) {
	t.Parallel()
	b := setup(t)
	startInstance(t, b.Redis(t), "a-00000001", time.Now(), false)
	if stdout, stderr, code := b.run(t, nil, "pause", "critical"); code != 0 || !strings.Contains(stdout, "critical is paused") {
		t.Errorf("exit code %d\n%s%s", code, stdout, stderr)
	}
	if paused := b.Redis(t).Exists(t.Context(), "asynq:{critical}:paused").Val(); paused != 1 {
		t.Error("it is not")
	}
}
