//go:build unix

package worker_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/hibiken/asynq"

	"github.com/carpool-go/carpool/internal/testservers"
	"github.com/carpool-go/carpool/tasks"
	"github.com/carpool-go/carpool/worker/internal/workertest"
)

// lastVersion is the commit of the version before, whose workers are beside this one's during
// a deploy, and after it if that is rolled back.
const lastVersion = "63d3fa22dfd10ceefae760febf8c6a164f8d439b"

// noLastVersion says that a folder has no history that could have the version before.
type noLastVersion string

func (e noLastVersion) Error() string { return string(e) }

// rootOfHistory returns the root of the checkout that the folder of this package is in. The
// error is a noLastVersion where that is no fault of the checkout's.
func rootOfHistory(ctx context.Context, folder string) (root string, err error) {
	git := func(args ...string) (string, error) {
		cmd := exec.CommandContext(ctx, "git", args...)
		cmd.Dir = folder
		cmd.Env = append(os.Environ(), "LC_ALL=C")
		out, err := cmd.CombinedOutput()
		if err != nil {
			err = fmt.Errorf("git %s: %w\n%s", strings.Join(args, " "), err, out)
		}
		return strings.TrimSpace(string(out)), err
	}
	const clone = "; it takes a clone with the whole history"
	prefix, err := git("rev-parse", "--show-prefix")
	switch {
	case err != nil && strings.Contains(prefix, "not a git repository"):
		return "", noLastVersion("the version before is in the history, and this is no git repository" + clone)
	case err == nil && prefix != "worker/":
		return "", noLastVersion("the version before is in the history, and this is within another git repository" + clone)
	case err != nil:
		return "", err
	}
	if root, err = git("rev-parse", "--show-toplevel"); err != nil {
		return "", err
	}
	if _, missing := git("cat-file", "-e", lastVersion+"^{commit}"); missing != nil {
		shallow, err := git("rev-parse", "--is-shallow-repository")
		if err == nil && shallow == "true" {
			return "", noLastVersion("the version before, " + lastVersion + ", is not in this shallow clone; git fetch --unshallow gets it")
		}
		return "", errors.Join(missing, err)
	}
	return root, nil
}

// buildLastVersion builds this test's program as it was in the version before. Without a
// history the test is skipped. -trimpath keeps the temporary folder's name out of what is
// compiled, because go's cache serves the next run then.
func buildLastVersion(t *testing.T) (program string) {
	t.Helper()
	root, err := rootOfHistory(t.Context(), ".")
	if none, ok := errors.AsType[noLastVersion](err); ok {
		t.Skip(none)
	}
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	program = filepath.Join(dir, "worker.test")
	archive := filepath.Join(dir, "source.tar")
	for _, c := range []struct {
		in   string
		args []string
	}{
		{root, []string{"git", "archive", "--format=tar", "--output=" + archive, lastVersion}},
		{dir, []string{"tar", "-xf", archive}},
		{dir, []string{"go", "test", "-c", "-trimpath", "-ldflags=-s -w", "-o", program, "./worker"}},
	} {
		cmd := exec.CommandContext(t.Context(), c.args[0], c.args[1:]...)
		cmd.Dir = c.in
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%q: %v\n%s", c.args, err, out)
		}
	}
	return program
}

func TestRootOfHistory_OnlyWhereThereIsNoneNothingIsWrong(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	git := func(args ...string) {
		t.Helper()
		cmd := exec.CommandContext(t.Context(), "git", append([]string{"-c", "user.name=a", "-c", "user.email=a@example.com"}, args...)...)
		cmd.Dir = dir
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("git %q: %v\n%s", args, err, out)
		}
	}
	for _, folder := range []string{"none/worker", "whole/worker", "whole/other"} {
		if err := os.MkdirAll(filepath.Join(dir, folder), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(dir, "whole/worker/file"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	git("init", "--quiet", "whole")
	git("-C", "whole", "add", ".")
	for range 2 {
		git("-C", "whole", "commit", "--quiet", "--allow-empty", "--message=x")
	}
	git("clone", "--quiet", "--depth=1", "file://"+filepath.Join(dir, "whole"), "shallow")
	for folder, c := range map[string]struct {
		says  string
		skips bool
	}{
		"none/worker":    {"this is no git repository", true},
		"whole/other":    {"this is within another git repository", true},
		"shallow/worker": {"git fetch --unshallow", true},
		"whole/worker":   {"Not a valid object name " + lastVersion, false},
	} {
		_, err := rootOfHistory(t.Context(), filepath.Join(dir, folder))
		_, skips := errors.AsType[noLastVersion](err)
		if err == nil || skips != c.skips || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s: %v, skipped: %t", folder, err, skips)
		}
	}
}

// What the version before has enqueued, scheduled and archived runs with this one, and both
// work side by side on one database and one Redis, under load, as in a deploy and when it is
// rolled back. Neither logs anything that would have somebody look, but for what a slow
// machine makes them say.
func TestTheLastVersionIsBesideThisOne(t *testing.T) {
	t.Parallel()
	u := upgrade{pause: 20 * time.Millisecond, step: 700 * time.Millisecond}
	for _, log := range u.run(t) {
		for line := range strings.Lines(log.String()) {
			if !strings.Contains(line, `"level":"INFO"`) && !strings.Contains(line, givenUp) && !ofSlowness.MatchString(line) {
				t.Errorf("it logs %s", line)
			}
		}
	}
}

// ofSlowness matches warnings of a machine that has too much to do.
var ofSlowness = regexp.MustCompile(`waiting for the server|could not be written|did not end in time`)

// givenUp is the id of the one job that the version before archives.
const givenUp = "given-up"

// upgrade says how the version before is replaced by this one, it by the version before, and
// that by this one again.
type upgrade struct {
	// pause is what each of two producers leaves between two jobs, step what is left
	// between one thing and the next.
	pause, step time.Duration
	// crash has the version before end with SIGKILL the second time.
	crash bool
}

// run replaces the versions in that order, and returns what the four workers have logged.
func (u upgrade) run(t *testing.T) (logs []*workertest.Log) {
	redisURL := testservers.Redis(t)
	now := install(t, redisURL)
	before := *now
	before.program = buildLastVersion(t)
	before.runs(t, "", "migrate")
	start := func(l *installation) *process {
		p := l.start(t, `"msg":"worker started"`, "run")
		logs = append(logs, p.log)
		return p
	}
	goOn := func() { time.Sleep(u.step) }
	inspect := asynq.NewInspectorFromRedisClient(workertest.OpenRedis(t, redisURL))
	effectsOf := func(where string) int { return now.count(t, "SELECT count(*) FROM effects WHERE "+where) }

	old := start(&before)
	now.archiveOne(t, redisURL, inspect)
	now.exec(t, "CREATE TABLE effects (job_id text, n int, at timestamptz DEFAULT clock_timestamp())")
	enqueued := new(jobs)
	enqueued.add(givenUp)
	for range 3 {
		enqueued.add(before.runs(t, "-", "enqueue", "chaos:effect", `{"n": -1}`, "--in="+(5*u.step).String()))
	}
	scheduled := time.Now()
	before.runs(t, "", "schedule", "add", "often", "@every 1s", "chaos:effect", `{"n": -2}`)

	// what one version leaves to the other, when that is alone
	takesOver := func(l, from *installation) {
		t.Helper()
		ticks := effectsOf("n = -2")
		id := from.runs(t, "-", "enqueue", "chaos:effect", `{"n": -3}`, "--in=1s")
		enqueued.add(id)
		workertest.Eventually(t, "a job that the other version has put off, and one that it has scheduled, are run", func() bool {
			return effectsOf("job_id = '"+id+"'") > 0 && effectsOf("n = -2") > ticks
		})
		if out := l.runs(t, "often", "schedule", "ls"); strings.Count(out, "\noften ") != 1 {
			t.Errorf("the schedules are\n%s", out)
		}
	}

	stop := now.produce(t, redisURL, u.pause, enqueued)
	goOn()
	now.runs(t, "", "migrate")
	goOn()
	fresh := start(now)
	goOn()
	old.terminate(t)
	takesOver(now, &before)
	now.runs(t, givenUp, "archive", "ls")
	now.runs(t, "", "archive", "retry", givenUp)
	workertest.Eventually(t, "what the version before had archived is run", func() bool { return effectsOf("job_id = '"+givenUp+"'") > 0 })
	old = start(&before) // rolled back
	goOn()
	fresh.terminate(t)
	takesOver(&before, now)
	fresh = start(now)
	goOn()
	if u.crash {
		old.kill() // and its jobs are given back
	} else {
		old.terminate(t)
	}
	goOn()
	stop()
	now.runs(t, "", "schedule", "rm", "often")
	most := int(time.Since(scheduled)/time.Second) + 1

	longest(t, 2*time.Minute, "nothing is on its way any more", func(context.Context) bool {
		q, err := inspect.GetQueueInfo("default")
		return err == nil && now.count(t, "SELECT count(*) FROM carpool.outbox") == 0 && q.Pending+q.Active+q.Scheduled+q.Retry == 0
	})
	effects := now.effects(t)
	for _, id := range enqueued.ids {
		if effects[id] == 0 {
			t.Errorf("job %s is lost", id)
		}
	}
	if q, err := inspect.GetQueueInfo("default"); err != nil || q.Archived != 0 {
		t.Errorf("%d jobs are archived, error %v", q.Archived, err)
	}
	if ticks := effectsOf("n = -2"); ticks < 4 || ticks > most {
		t.Errorf("%d ticks of the schedule had their effect, of %d at most", ticks, most)
	}
	t.Logf("%d jobs were enqueued meanwhile", len(enqueued.ids))
	fresh.terminate(t)
	return logs
}

// archiveOne has the job givenUp archived: it has one try, and its table isn't there yet.
func (l *installation) archiveOne(t *testing.T, redisURL string, inspect *asynq.Inspector) {
	t.Helper()
	client := asynq.NewClientFromRedisClient(workertest.OpenRedis(t, redisURL))
	task := asynq.NewTask("chaos:effect", []byte(`{"n": -4}`))
	if _, err := client.EnqueueContext(t.Context(), task, asynq.TaskID(givenUp), asynq.MaxRetry(0)); err != nil {
		t.Fatal(err)
	}
	workertest.Eventually(t, "the job without a table is archived", func() bool {
		q, err := inspect.GetQueueInfo("default")
		return err == nil && q.Archived == 1
	})
}

// produce enqueues jobs by SQL and by a client until stop, which returns when it has ended.
func (l *installation) produce(t *testing.T, redisURL string, pause time.Duration, enqueued *jobs) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	client := tasks.NewClient(workertest.OpenRedis(t, redisURL))
	var producers sync.WaitGroup
	for range 2 {
		producers.Go(func() {
			for n := 0; ctx.Err() == nil; n++ {
				var id string
				if err := l.db.QueryRow(t.Context(), "SELECT carpool.enqueue('chaos:effect', jsonb_build_object('n', $1::int))", n).Scan(&id); err != nil {
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
				time.Sleep(pause)
			}
		})
	}
	stop = func() { cancel(); producers.Wait() }
	t.Cleanup(stop)
	return stop
}
