package cli

import (
	"context"
	"fmt"
	"io"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/carpool-go/carpool/internal/testservers"
	"github.com/carpool-go/carpool/tasks"
	"github.com/carpool-go/carpool/worker/internal/workertest"
)

// endless is an input that has no end, and counts what was read of it.
type endless struct{ read int }

func (e *endless) Read(p []byte) (int, error) {
	for i := range p {
		p[i] = ' '
	}
	e.read += len(p)
	return len(p), nil
}

// webhookOf is the payload of a webhook:deliver with so many bytes.
func webhookOf(size int) string {
	const around = `{"url":"https://example.com/","event":"a","body":""}`
	return strings.Replace(around, `""`, `"`+strings.Repeat("x", size-len(around))+`"`, 1)
}

// maxPayload is the limit that the database has, in bytes.
func (b *bundle) maxPayload(t *testing.T) (most int) {
	t.Helper()
	conn, err := pgx.Connect(t.Context(), b.DatabaseURL)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(t.Context())
	if err := conn.QueryRow(t.Context(), "SELECT value FROM carpool.settings WHERE name = 'max_payload'").Scan(&most); err != nil {
		t.Fatal(err)
	}
	return most
}

func TestMaxPayload_BoundsWhatTheShellEnqueues(t *testing.T) {
	t.Parallel()
	b := setup(t)
	for _, command := range [][]string{{"enqueue", "webhook:deliver"}, {"schedule", "add", "a", "@daily", "webhook:deliver"}} {
		endless := new(endless)
		for _, c := range []struct {
			name  string
			stdin io.Reader
			args  []string
			want  string // "" if it is taken
		}{
			{"an input without end", endless, []string{"-"}, "more bytes than the limit of 1048576, which MAX_PAYLOAD sets"},
			{"an input above the limit", strings.NewReader(webhookOf(1<<20 + 1)), []string{"-"}, "more bytes than the limit of 1048576, which MAX_PAYLOAD sets"},
			{"an argument", nil, []string{webhookOf(2049), "--max-payload", "2KiB"}, "webhook:deliver payload: 2049 bytes are more than the limit of 2048, which MAX_PAYLOAD sets"},
			{"a limit without a unit", nil, []string{"{}", "--max-payload", "4096"}, `MAX_PAYLOAD is "4096", which is not a size from 1KiB to 16MiB with its unit; for example MAX_PAYLOAD=1MiB`},
			{"a limit that is too low", nil, []string{"{}", "--max-payload", "0KiB"}, "MAX_PAYLOAD is "},
			{"a limit that is too high", nil, []string{"{}", "--max-payload", "17MiB"}, "MAX_PAYLOAD is "},
			{"an input below the limit", strings.NewReader(webhookOf(1<<20 - 100)), []string{"-"}, ""},
		} {
			stdout, stderr, code := b.runReading(t, c.stdin, nil, append(command, c.args...)...)
			switch {
			case c.want == "" && code != 0:
				t.Errorf("%s, %s: exit code %d\n%.300s", command[0], c.name, code, stderr)
			case c.want != "" && (code != exitUsage || stdout != "" || !strings.Contains(stderr, c.want) || strings.Contains(stderr, "xxx")):
				t.Errorf("%s, %s: exit code %d, want %q in\n%.300s", command[0], c.name, code, c.want, stderr)
			}
		}
		if endless.read > 4<<20 {
			t.Errorf("%s: %d bytes were read of an input without end", command[0], endless.read)
		}
	}
	// The database has the limit of the workers.
	_, stderr, code := b.runReading(t, strings.NewReader(webhookOf(1<<20+1)), nil, "schedule", "add", "b", "@daily", "webhook:deliver", "-", "--max-payload", "2MiB")
	if code != exitFailed || !strings.Contains(stderr, "more than the limit of 1048576, which MAX_PAYLOAD sets") {
		t.Errorf("above the database's limit: exit code %d\n%.300s", code, stderr)
	}
	if _, stderr, code := b.runReading(t, strings.NewReader(webhookOf(1<<20+1)), []string{"MAX_PAYLOAD=2MiB"}, "enqueue", "webhook:deliver", "-"); code != 0 {
		t.Errorf("by a larger limit: exit code %d\n%.300s", code, stderr)
	}
}

func TestMaxPayload_IsWrittenByTheLastStartAndByAMigrationThatIsToldOne(t *testing.T) {
	t.Parallel()
	b := &bundle{&workertest.Bundle{DatabaseURL: testservers.Postgres(t), RedisURL: testservers.Redis(t)}}
	b.Env = []string{"DATABASE_URL=" + b.DatabaseURL, "REDIS_URL=" + b.RedisURL, "LOG_FORMAT=text"}
	for i, c := range []struct {
		args []string
		env  string
		want int
	}{
		{[]string{"migrate"}, "", 1 << 20},
		{[]string{"migrate"}, "MAX_PAYLOAD=3MiB", 3 << 20},
		{[]string{"migrate"}, "", 3 << 20},
		{[]string{"migrate", "--max-payload", "100KiB"}, "MAX_PAYLOAD=3MiB", 100 << 10},
		{[]string{"run", "--burst"}, "MAX_PAYLOAD=2MiB", 2 << 20},
		{[]string{"run", "--burst"}, "", 1 << 20},
	} {
		if _, stderr, code := b.run(t, []string{c.env}, c.args...); code != 0 {
			t.Fatalf("%v: exit code %d\n%s", c.args, code, stderr)
		}
		if got := b.maxPayload(t); got != c.want {
			t.Errorf("%d: %s %v: the database has %d, want %d", i, c.env, c.args, got, c.want)
		}
	}
	stdout, _, _ := b.run(t, []string{"MAX_PAYLOAD=2MiB"}, "config", "--json")
	if want := fmt.Sprintf(`{"name":"MAX_PAYLOAD","value":"2MiB","default":"1MiB","source":%q}`, fromVariable); !strings.Contains(stdout, want) {
		t.Errorf("config doesn't show %s:\n%s", want, stdout)
	}
}

// A job's result goes by the limit of its worker.
func TestMaxPayload_OfAWorkerBoundsTheResultsOfItsJobs(t *testing.T) {
	t.Parallel()
	b := setup(t)
	for _, c := range []struct {
		env  string
		want string
	}{{"", "bytes are more than the limit of 1048576, which MAX_PAYLOAD sets"}, {"MAX_PAYLOAD=2MiB", ""}} {
		program := Program{Name: "shop", Groups: []tasks.Group{plain(registerEcho)}, Env: environment(append(append([]string{}, b.Env...), c.env))}
		info, err := b.Client.Enqueue(t.Context(), echo{Size: 1<<20 + 1}, nil)
		if err != nil {
			t.Fatal(err)
		}
		if _, stderr, code := program.runTo(t, strings.NewReader(""), "run", "--burst"); code != 0 {
			t.Fatalf("exit code %d\n%s", code, stderr)
		}
		result, err := b.Wait(t, info)
		if c.want == "" && (err != nil || len(result) != 1<<20+3) || c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)) {
			t.Errorf("%s: a result of %d bytes, %.300v", c.env, len(result), err)
		}
	}
}

// echo has a result of so many bytes, and two quotes.
type echo struct {
	Size int `json:"size"`
}

func (echo) Kind() string           { return "echo" }
func (echo) Options() tasks.Options { return tasks.Options{Retention: time.Hour} }
func (echo) Validate() error        { return nil }

func registerEcho(s *tasks.Set) {
	tasks.Register(s, func(_ context.Context, _ *tasks.Job, e echo) (string, error) { return strings.Repeat("x", e.Size), nil })
}
