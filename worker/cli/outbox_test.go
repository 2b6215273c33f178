package cli

import (
	"context"
	"encoding/json"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/jackc/pgx/v5"

	"github.com/carpool-go/carpool/internal/testservers"
)

// The outbox of these tests: two jobs wait, two were set aside.
const (
	waitingNote   = "018f0000-0000-7000-8000-00000000000a"
	waitingLetter = "018f0000-0000-7000-8000-00000000000b"
	badNote       = "018f0000-0000-7000-8000-00000000000c"
	badLetter     = "018f0000-0000-7000-8000-00000000000d"
)

// newOutbox makes a bundle whose environment has no Redis, because nothing needs it.
func newOutbox(t *testing.T) *bundle {
	t.Helper()
	b := setup(t)
	b.Env = append(b.Env, "REDIS_URL=")
	b.Exec(t, `INSERT INTO carpool.outbox (id, kind, payload, queue, problem, created_at) VALUES
		('`+waitingNote+`', 'note', '{"x": "`+secret+`"}', NULL, NULL, now() - interval '90 seconds'),
		('`+waitingLetter+`', 'letter', '{"x": "`+secret+`"}', 'post', NULL, now()),
		('`+badNote+`', 'note', '{"x": "`+secret+`"}', NULL, E'text: must not be\nbad', now()),
		('`+badLetter+`', 'letter', '{"x": "`+secret+`"}', NULL, 'no worker knows the kind letter', now())`)
	return b
}

// outboxRows are the ids in the outbox, each with "!" behind it if it was set aside.
func (b *bundle) outboxRows(t *testing.T) []string {
	t.Helper()
	conn, err := pgx.Connect(t.Context(), b.DatabaseURL)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(context.Background())
	rows, err := conn.Query(t.Context(), "SELECT id::text || CASE WHEN problem IS NULL THEN '' ELSE '!' END FROM carpool.outbox ORDER BY id")
	if err != nil {
		t.Fatal(err)
	}
	ids, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		t.Fatal(err)
	}
	return ids
}

func TestOutboxLs_ShowsWhatWaitsAndWhatWasSetAside(t *testing.T) {
	t.Parallel()
	b := newOutbox(t)
	stdout, stderr, code := b.run(t, nil, "outbox", "ls", "--limit=3")
	got := lines(stdout)
	if code != 0 || stderr != "and more, which came later\n" || len(got) != 4 {
		t.Fatalf("exit code %d\n%s%s", code, stdout, stderr)
	}
	if got[0] != "ID KIND QUEUE AGE PROBLEM" || !strings.HasPrefix(got[1], waitingNote+" note (the kind's own) 1m") || !strings.HasSuffix(got[1], " (waiting)") ||
		!strings.HasPrefix(got[2], waitingLetter+" letter post ") || !strings.HasSuffix(got[3], " text: must not be bad") {
		t.Errorf("it shows\n%s", stdout)
	}
	if strings.Contains(stdout, secret) {
		t.Error("it shows a payload")
	}
	for _, c := range []struct {
		args string
		want []string
	}{
		{"", []string{waitingNote, waitingLetter, badNote, badLetter}},
		{"--kind note", []string{waitingNote, badNote}},
		{"--problem knows", []string{badLetter}},
		{"--waiting", []string{waitingNote, waitingLetter}},
		{"--rejected --limit 1", []string{badNote}},
		{"--rejected --limit 2", []string{badNote, badLetter}},
		{"--set-aside --kind letter", []string{badLetter}},
		{"--kind nobody", nil},
	} {
		stdout, stderr, code := b.run(t, nil, append([]string{"outbox", "ls", "--json"}, strings.Fields(c.args)...)...)
		if code != 0 || strings.Contains(stdout, secret) {
			t.Fatalf("%s: exit code %d\n%s%s", c.args, code, stdout, stderr)
		}
		var ids []string
		for line := range strings.Lines(stdout) {
			var job struct {
				ID, Kind   string
				Queue      string
				EnqueuedAt string `json:"enqueued_at"`
				AgeMS      *int   `json:"age_ms"`
			}
			if err := json.Unmarshal([]byte(line), &job); err != nil || job.Kind == "" || job.EnqueuedAt == "" || job.AgeMS == nil {
				t.Errorf("%s: %v in %s", c.args, err, line)
			}
			ids = append(ids, job.ID)
		}
		if diff := cmp.Diff(c.want, ids); diff != "" {
			t.Errorf("%s (-want +got):\n%s", c.args, diff)
		}
	}
}

func TestOutboxRetry_LetsJobsWaitAgainAndDeleteDeletesThem(t *testing.T) {
	t.Parallel()
	all := []string{waitingNote, waitingLetter, badNote + "!", badLetter + "!"}
	for _, c := range []struct {
		args string
		says string
		left []string
	}{
		{"retry " + badNote, badNote + " note waits again\n", []string{waitingNote, waitingLetter, badNote, badLetter + "!"}},
		{"retry --kind letter", badLetter + " letter waits again\n", []string{waitingNote, waitingLetter, badNote + "!", badLetter}},
		{"retry --all", badNote + " note waits again\n" + badLetter + " letter waits again\n", []string{waitingNote, waitingLetter, badNote, badLetter}},
		{"delete --waiting --kind letter", waitingLetter + " letter deleted\n", []string{waitingNote, badNote + "!", badLetter + "!"}},
		{"delete --problem bad", badNote + " note deleted\n", []string{waitingNote, waitingLetter, badLetter + "!"}},
		{"delete " + badLetter + " " + waitingNote, waitingNote + " note deleted\n" + badLetter + " letter deleted\n", []string{waitingLetter, badNote + "!"}},
		{"delete --all", "", []string{}},
		{"delete --kind nobody", "", all},
	} {
		t.Run(c.args, func(t *testing.T) {
			t.Parallel()
			b := newOutbox(t)
			stdout, stderr, code := b.run(t, nil, append([]string{"outbox"}, strings.Fields(c.args)...)...)
			if code != 0 || c.says != "" && stdout != c.says {
				t.Errorf("exit code %d, want %q in\n%s%s", code, c.says, stdout, stderr)
			}
			if none := stdout == ""; none != (stderr == "no job of the outbox fits; nothing was changed\n") {
				t.Errorf("it says\n%s%s", stdout, stderr)
			}
			if diff := cmp.Diff(c.left, b.outboxRows(t)); diff != "" {
				t.Errorf("what is left (-want +got):\n%s", diff)
			}
		})
	}
}

func TestOutbox_AWrongSelectionIsOneErrorAndChangesNothing(t *testing.T) {
	t.Parallel()
	b := newOutbox(t)
	before := b.outboxRows(t)
	for _, c := range []struct {
		args string
		code int
		want string
	}{
		{"retry", exitUsage, "which jobs? Give their ids, or one of --kind, --problem, or --all"},
		{"delete", exitUsage, "which jobs? Give their ids, or one of --kind, --problem, --waiting, --rejected, or --all"},
		{"delete " + badNote + " --all", exitUsage, "ids and --all don't go together"},
		{"delete --waiting --rejected", exitUsage, "--waiting and --rejected can't be used together"},
		{"ls --limit=0", exitUsage, "--limit: 0 is less than 1"},
		{"delete " + badNote + " nobody", exitFailed, "job nobody is not in the outbox; nothing was changed; see: worker outbox ls"},
		{"delete " + badNote + " " + badLetter + " --kind note", exitFailed, "job " + badLetter + " is not in the outbox; nothing was changed; see: worker outbox ls"},
		{"retry " + badNote + " " + waitingNote, exitFailed, "job " + waitingNote + " was not set aside in the outbox; nothing was changed; see: worker outbox ls"},
	} {
		stdout, stderr, code := b.run(t, nil, append([]string{"outbox"}, strings.Fields(c.args)...)...)
		if code != c.code || stdout != "" || !strings.Contains(stderr, c.want) {
			t.Errorf("%s: exit code %d, want %d and %q in\n%s%s", c.args, code, c.code, c.want, stdout, stderr)
		}
	}
	if diff := cmp.Diff(before, b.outboxRows(t)); diff != "" {
		t.Errorf("it has changed the outbox (-want +got):\n%s", diff)
	}
}

func TestOutboxDelete_DoesNotWaitForARelay(t *testing.T) {
	t.Parallel()
	b := newOutbox(t)
	relay, err := pgx.Connect(t.Context(), b.DatabaseURL)
	if err != nil {
		t.Fatal(err)
	}
	defer relay.Close(context.Background())
	tx, err := relay.Begin(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := tx.Exec(t.Context(), "SELECT FROM carpool.outbox WHERE id = $1 FOR UPDATE", waitingNote); err != nil {
		t.Fatal(err)
	}
	stdout, stderr, code := b.run(t, nil, "outbox", "delete", "--waiting")
	if code != 0 || stdout != waitingLetter+" letter deleted\n" || !strings.HasPrefix(stderr, waitingNote+" note stays: a worker takes it at this moment, or has taken it") {
		t.Errorf("exit code %d\n%s%s", code, stdout, stderr)
	}
	if err := tx.Rollback(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got := b.outboxRows(t); !slices.Contains(got, waitingNote) {
		t.Errorf("the outbox has %v", got)
	}
}

func TestOutbox_WithoutItSaysSo(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		url  string
		code int
		want string
	}{
		{"", exitUsage, "DATABASE_URL is not set"},
		{testservers.Postgres(t), exitFailed, "this database has no table carpool.outbox; run the command migrate"},
		{"postgres://user:" + secret + "@127.0.0.1:1/app", exitFailed, "DATABASE_URL"},
	} {
		p := Program{Name: "worker", Env: environment([]string{"DATABASE_URL=" + c.url})}
		_, stderr, code := p.run(t, "outbox", "ls")
		if code != c.code || !strings.Contains(stderr, c.want) || strings.Contains(stderr, secret) {
			t.Errorf("exit code %d, want %q in\n%s", code, c.want, stderr)
		}
	}
}

func TestOutboxRetry_AWorkerTakesTheJobThen(t *testing.T) {
	t.Parallel()
	b := setup(t)
	p := b.Start(t)
	const id = waitingNote
	b.Exec(t, `INSERT INTO carpool.outbox (id, kind, payload, problem) VALUES ('`+id+`', 'pool:validate', '{}', 'it was a bad day')`)
	if stdout, stderr, code := b.run(t, nil, "outbox", "retry", id); code != 0 {
		t.Fatalf("exit code %d\n%s%s", code, stdout, stderr)
	}
	p.Log.Wait(t, `"id":"`+id+`","kind":"pool:validate"`)
}
