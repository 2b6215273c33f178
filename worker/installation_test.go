//go:build unix

package worker_test

import (
	"context"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/carpool-go/carpool/internal/testservers"
	"github.com/carpool-go/carpool/worker/internal/workertest"
)

// installation is a program, as a worker and as its commands, with a database and a Redis. The
// program has the kinds of the chaos test.
type installation struct {
	program string
	db      *pgxpool.Pool
	env     []string
}

// install makes an installation of this program whose database has no table of carpool's yet.
func install(t *testing.T, redisURL string) *installation {
	t.Helper()
	databaseURL := testservers.Postgres(t)
	db, err := pgxpool.New(t.Context(), databaseURL)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(db.Close)
	return &installation{os.Args[0], db, []string{
		"DATABASE_URL=" + databaseURL, "REDIS_URL=" + redisURL, chaosEnv + "=" + protected,
		"LOG_FORMAT=json", "PATH=" + os.Getenv("PATH"),
	}}
}

func (l *installation) exec(t *testing.T, sql string) {
	t.Helper()
	if _, err := l.db.Exec(t.Context(), sql); err != nil {
		t.Fatalf("%s: %v", sql, err)
	}
}

// count returns the number that a query has for an answer.
func (l *installation) count(t *testing.T, sql string) (n int) {
	t.Helper()
	if err := l.db.QueryRow(t.Context(), sql).Scan(&n); err != nil {
		t.Fatalf("%s: %v", sql, err)
	}
	return n
}

// command prepares a command, which ends with the test at the latest.
func (l *installation) command(t *testing.T, args ...string) *exec.Cmd {
	t.Helper()
	cmd := exec.Command(l.program, args...)
	cmd.Env = l.env
	if _, err := cmd.StdinPipe(); err != nil { // it ends with us
		t.Fatal(err)
	}
	return cmd
}

// process is a command that goes on until it is killed.
type process struct {
	cmd *exec.Cmd
	log *workertest.Log
}

// start starts a command and waits until its log has a text.
func (l *installation) start(t *testing.T, until string, args ...string) *process {
	t.Helper()
	p := &process{l.command(t, args...), workertest.NewLog()}
	p.cmd.Stdout, p.cmd.Stderr = p.log, p.log
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		p.kill()
		if t.Failed() {
			t.Logf("the log of %q ends with:\n%s", args, lastLines(p.log.String(), 40))
		}
	})
	p.log.Wait(t, until)
	return p
}

// kill ends it with SIGKILL and returns when it is dead. Killing twice is safe.
func (p *process) kill() {
	if p.cmd.ProcessState == nil {
		_ = p.cmd.Process.Kill()
		_ = p.cmd.Wait()
	}
}

// terminate ends it with SIGTERM, as a deploy does, and waits for that.
func (p *process) terminate(t *testing.T) {
	t.Helper()
	if err := p.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	stop := time.AfterFunc(time.Minute, func() { _ = p.cmd.Process.Kill() })
	defer stop.Stop()
	if err := p.cmd.Wait(); err != nil {
		t.Errorf("it ended with %v", err)
	}
}

func lastLines(text string, n int) string {
	from := len(text)
	for ; from > 0 && n >= 0; from-- {
		if text[from-1] == '\n' {
			n--
		}
	}
	return text[from:]
}

// longest waits for a condition for minutes, as what it waits for may take a lease's length.
func longest(t *testing.T, patience time.Duration, what string, holds func(context.Context) bool) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	for !holds(ctx) {
		select {
		case <-ctx.Done():
			t.Fatalf("it does not come about within %v that %s", patience, what)
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// runs runs a command to its end, which must be a good one, and returns what it prints.
func (l *installation) runs(t *testing.T, wants string, args ...string) string {
	t.Helper()
	cmd := l.command(t, args...)
	var errs strings.Builder
	cmd.Stderr = &errs
	stop := time.AfterFunc(time.Minute, func() { _ = cmd.Process.Kill() })
	defer stop.Stop()
	out, err := cmd.Output()
	if err != nil || !strings.Contains(string(out), wants) {
		t.Errorf("%q: %v, want %q\n%s%s", args, err, wants, out, errs.String())
	}
	return strings.TrimSpace(string(out))
}

// effects counts the effects of each job, which must be one.
func (l *installation) effects(t *testing.T) map[string]int {
	t.Helper()
	rows, err := l.db.Query(t.Context(), "SELECT job_id, count(*) FROM effects GROUP BY 1")
	if err != nil {
		t.Fatal(err)
	}
	defer rows.Close()
	effects := make(map[string]int)
	for rows.Next() {
		var id string
		var n int
		if err := rows.Scan(&id, &n); err != nil {
			t.Fatal(err)
		}
		if effects[id] = n; n != 1 {
			t.Errorf("job %s has %d effects", id, n)
		}
	}
	if err := rows.Err(); err != nil {
		t.Fatal(err)
	}
	return effects
}

// jobs are those that were enqueued for certain.
type jobs struct {
	mu  sync.Mutex
	ids []string
}

func (j *jobs) add(id string) {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.ids = append(j.ids, id)
}
