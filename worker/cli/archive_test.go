package cli

import (
	"errors"
	"strings"
	"testing"

	"github.com/hibiken/asynq"

	"github.com/carpool-go/carpool/tasks"
	"github.com/carpool-go/carpool/tasks/rowsprune"
	"github.com/carpool-go/carpool/tasks/webhook"
	"github.com/carpool-go/carpool/worker/internal/workertest"
)

// deadLetters runs a worker until n webhooks without a secret, which can't be
// delivered, and a prune of a table that is not there are in the archive.
func deadLetters(t *testing.T, b *bundle, n int) (webhooks []string, prune string) {
	t.Helper()
	p := b.Start(t)
	for range n {
		info, err := b.Client.Enqueue(t.Context(), webhook.Deliver{URL: "https://example.com", Event: "x", Body: []byte(`"s3cret"`)}, nil)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := b.Wait(t, info); !errors.Is(err, tasks.ErrJobFailed) {
			t.Fatal(err)
		}
		webhooks = append(webhooks, info.ID)
	}
	info, err := b.Client.Enqueue(t.Context(), rowsprune.Prune{Table: "nowhere", Column: "at", OlderThan: "1d"}, nil)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := b.Wait(t, info); !errors.Is(err, tasks.ErrJobFailed) {
		t.Fatal(err)
	}
	_ = p.Cmd.Process.Kill()
	p.Exit(t)
	return webhooks, info.ID
}

func TestArchive_ShowsWhatIsThereAndWhyAndPutsItBackOrDeletesIt(t *testing.T) {
	t.Parallel()
	b := setup(t)
	webhooks, prune := deadLetters(t, b, 3)
	archive := func(want int, args ...string) (stdout, stderr string) {
		t.Helper()
		stdout, stderr, code := b.run(t, nil, append([]string{"archive"}, args...)...)
		if code != want {
			t.Fatalf("worker archive %s exits with %d, want %d:\n%s%s", args, code, want, stdout, stderr)
		}
		if strings.Contains(stdout+stderr, "s3cret") && !strings.Contains(strings.Join(args, " "), "--payload") {
			t.Errorf("worker archive %s shows a payload", args)
		}
		return stdout, stderr
	}
	if out, _ := archive(0, "ls"); strings.Count(out, "\n") != 5 || !strings.Contains(out, "WEBHOOK_SECRET") || !strings.Contains(out, "nowhere") {
		t.Errorf("ls:\n%s", out)
	}
	if out, _ := archive(0, "ls", "--kind", "rows:prune"); strings.Count(out, "\n") != 2 || !strings.Contains(out, prune) {
		t.Errorf("ls --kind:\n%s", out)
	}
	if out, _ := archive(0, "ls", "--reason", "WEBHOOK_SECRET", "--json"); strings.Count(out, "\n") != 3 || !strings.Contains(out, `"id":"`+webhooks[0]) {
		t.Errorf("ls --reason --json:\n%s", out)
	}
	if out, errs := archive(0, "ls", "--limit", "1"); strings.Count(out, "\n") != 2 || errs != "and 3 more, which are older\n" {
		t.Errorf("ls --limit:\n%s%s", out, errs)
	}
	if out, errs := archive(0, "ls", "--limit", "9", "--json"); strings.Count(out, "\n") != 4 || errs != "" {
		t.Errorf("ls --limit --json:\n%s%s", out, errs)
	}
	archive(2, "ls", "--limit", "0")
	if out, _ := archive(0, "show", prune); !strings.Contains(out, "nowhere") || !strings.Contains(out, "bytes") {
		t.Errorf("show:\n%s", out)
	}
	if out, _ := archive(0, "show", webhooks[0], "--payload"); !strings.Contains(out, "s3cret") {
		t.Errorf("show --payload:\n%s", out)
	}

	if _, errs := archive(2, "retry"); !strings.Contains(errs, "--all") {
		t.Errorf("retry without a choice: %s", errs)
	}
	if _, errs := archive(1, "retry", webhooks[0], "nobody"); !strings.Contains(errs, "job nobody is not in the archive; nothing was changed") {
		t.Errorf("retry of an unknown id: %s", errs)
	}
	archive(0, "retry", webhooks[0])
	archive(0, "retry", "--kind", "webhook:deliver")
	for _, id := range webhooks {
		info, err := b.Inspector.GetTaskInfo("default", id)
		if err != nil || info.State != asynq.TaskStatePending || info.Retried != 0 {
			t.Errorf("put back, it is %+v, error %v", info, err)
		}
	}
	archive(0, "delete", "--all")
	if _, err := b.Inspector.GetTaskInfo("default", prune); !errors.Is(err, asynq.ErrTaskNotFound) {
		t.Errorf("deleted, it is still there: %v", err)
	}
	if _, errs := archive(0, "delete", "--all"); !strings.Contains(errs, "nothing was changed") {
		t.Errorf("delete of nothing: %s", errs)
	}

	// They run again, with a secret.
	b.Start(t, "WEBHOOK_SECRET=whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw", "OUTBOUND_ALLOW=")
	workertest.Eventually(t, "they are tried", func() bool {
		info, err := b.Inspector.GetTaskInfo("default", webhooks[0])
		return err != nil || info.State != asynq.TaskStatePending
	})
}

func TestArchive_NamesCanNotMoveTheCursor(t *testing.T) {
	t.Parallel()
	b := setup(t)
	const evil = "\x1b[2J\r\n"
	info, err := asynq.NewClientFromRedisClient(b.Redis(t)).EnqueueContext(t.Context(),
		asynq.NewTask("kind"+evil, nil), asynq.TaskID("id"+evil), asynq.Queue("queue"+evil))
	if err != nil {
		t.Fatal(err)
	}
	id := info.ID
	if err := b.Inspector.ArchiveTask(info.Queue, id); err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{{"ls"}, {"show", id}, {"retry", id}, {"delete", id}} {
		if args[0] == "delete" {
			if err := b.Inspector.ArchiveTask("queue"+evil, id); err != nil {
				t.Fatal(err)
			}
		}
		stdout, stderr, code := b.run(t, nil, append([]string{"archive"}, args...)...)
		if code != 0 || strings.ContainsAny(stdout+stderr, "\x1b\r") || !strings.Contains(stdout, "id [2J") || !strings.Contains(stdout, "kind [2J") {
			t.Errorf("%q: exit code %d\n%q", args, code, stdout+stderr)
		}
	}
}
