//go:build long && unix

package worker_test

import (
	"context"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/hibiken/asynq"

	"github.com/carpool-go/carpool/internal/testservers"
	"github.com/carpool-go/carpool/tasks"
	"github.com/carpool-go/carpool/worker/internal/workertest"
)

// lastVersion is the commit of the version before, whose workers are beside this one's during
// a deploy, and after it if that is rolled back.
const lastVersion = "63d3fa2"

// buildLastVersion builds this test's program as it was in the version before.
func buildLastVersion(t *testing.T) (program string) {
	t.Helper()
	dir := t.TempDir()
	program = filepath.Join(dir, "worker.test")
	for _, command := range []string{
		"git -C $(git rev-parse --show-toplevel) archive " + lastVersion + " | tar -x -C " + dir,
		"cd " + dir + " && go test -c -o " + program + " ./worker",
	} {
		if out, err := exec.CommandContext(t.Context(), "sh", "-c", command).CombinedOutput(); err != nil {
			t.Fatalf("%s: %v\n%s(the whole history of the repository is needed)", command, err, out)
		}
	}
	return program
}

// What the version before has enqueued, scheduled and archived runs with this one, and both
// work side by side on one database and one Redis, under load, as in a deploy and when it is
// rolled back.
func TestLong_TheLastVersionIsBesideThisOne(t *testing.T) {
	redisURL := testservers.Redis(t)
	now := openUnmigrated(t, redisURL)
	before := *now
	before.program = buildLastVersion(t)
	before.runs(t, "", "migrate")
	now.exec(t, "CREATE TABLE effects (job_id text, n int, at timestamptz DEFAULT clock_timestamp())")
	started := `"msg":"worker started"`
	old := before.start(t, started, "run")
	rdb := workertest.OpenRedis(t, redisURL)

	// Left by the version before.
	var ofBefore []string
	for range 5 {
		ofBefore = append(ofBefore, before.runs(t, "-", "enqueue", "chaos:effect", `{"n": 1}`, "--in=20s"))
	}
	before.runs(t, "", "schedule", "add", "often", "@every 3s", "chaos:effect", `{"n": 2}`)
	if _, err := asynq.NewClientFromRedisClient(rdb).EnqueueContext(t.Context(), asynq.NewTask("chaos:effect", []byte(`{"what": 1}`)), asynq.TaskID("spoilt")); err != nil {
		t.Fatal(err)
	}
	longest(t, time.Minute, "the spoilt job is archived", func(context.Context) bool {
		return strings.Contains(before.runs(t, "", "archive", "ls"), "spoilt")
	})

	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	enqueued := new(jobs)
	var producers sync.WaitGroup
	client := tasks.NewClient(rdb)
	for range 2 {
		producers.Go(func() {
			for n := 0; ctx.Err() == nil; n++ {
				var id string
				if err := now.db.QueryRow(t.Context(), "SELECT carpool.enqueue('chaos:effect', jsonb_build_object('n', $1::int))", n).Scan(&id); err != nil {
					t.Error(err)
					return
				}
				enqueued.add(id)
				info, err := client.Enqueue(t.Context(), chaosEffect{n}, nil)
				if err != nil {
					t.Error(err)
					return
				}
				enqueued.add(info.ID)
				time.Sleep(5 * time.Millisecond)
			}
		})
	}
	goOn := func() { time.Sleep(4 * time.Second) }
	goOn()
	now.runs(t, "", "migrate")
	goOn()
	fresh := now.start(t, started, "run")
	goOn()
	old.terminate(t)
	goOn()
	old = before.start(t, started, "run") // rolled back
	goOn()
	fresh.terminate(t)
	goOn()
	fresh = now.start(t, started, "run")
	goOn()
	old.kill() // and its jobs are given back
	goOn()
	stop()
	producers.Wait()

	inspect := asynq.NewInspectorFromRedisClient(rdb)
	now.runs(t, "", "schedule", "rm", "often")
	longest(t, 2*time.Minute, "nothing is on its way any more", func(ctx context.Context) bool {
		q, err := inspect.GetQueueInfo("default")
		return err == nil && now.count(t, "SELECT count(*) FROM carpool.outbox") == 0 && q.Pending+q.Active+q.Scheduled+q.Retry == 0
	})
	effects := now.effects(t)
	for _, id := range append(enqueued.ids, ofBefore...) {
		if effects[id] == 0 {
			t.Errorf("job %s is lost", id)
		}
	}
	if out := now.runs(t, "spoilt", "archive", "ls"); strings.Count(out, "\n") != 1 { // behind the line of headings
		t.Errorf("the archive has more than the spoilt job:\n%s", out)
	}
	now.runs(t, "", "archive", "delete", "spoilt")
	if n := now.count(t, "SELECT count(*) FROM effects WHERE n = 2"); n < 8 {
		t.Errorf("%d ticks of the schedule had their effect", n)
	}
	t.Logf("%d jobs were enqueued meanwhile", len(enqueued.ids))
	fresh.terminate(t)
}

// terminate ends it with SIGTERM, as a deploy does, and waits for that.
func (p *longProcess) terminate(t *testing.T) {
	t.Helper()
	if err := p.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if err := p.cmd.Wait(); err != nil {
		t.Errorf("it ended with %v", err)
	}
}
