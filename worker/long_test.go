//go:build long

package worker_test

import (
	"context"
	"os"
	"os/exec"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/carpool-go/carpool/internal/schema"
	"github.com/carpool-go/carpool/internal/testservers"
	"github.com/carpool-go/carpool/worker/internal/workertest"
)

// longRun is what a long test works with: a database, and this program as a worker and as its
// commands, with the kinds of the chaos test.
type longRun struct {
	program string
	db      *pgxpool.Pool
	env     []string
}

func openLongRun(t *testing.T, redisURL string) *longRun {
	t.Helper()
	l := openUnmigrated(t, redisURL)
	if err := schema.Migrate(t.Context(), l.db.Config().ConnString(), workertest.Discard()); err != nil {
		t.Fatal(err)
	}
	return l
}

// openUnmigrated is openLongRun without carpool's tables.
func openUnmigrated(t *testing.T, redisURL string) *longRun {
	t.Helper()
	databaseURL := testservers.Postgres(t)
	db, err := pgxpool.New(t.Context(), databaseURL)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(db.Close)
	return &longRun{os.Args[0], db, []string{
		"DATABASE_URL=" + databaseURL, "REDIS_URL=" + redisURL, chaosEnv + "=" + protected,
		"LOG_FORMAT=json", "PATH=" + os.Getenv("PATH"),
	}}
}

func (l *longRun) exec(t *testing.T, sql string) {
	t.Helper()
	if _, err := l.db.Exec(t.Context(), sql); err != nil {
		t.Fatalf("%s: %v", sql, err)
	}
}

// count returns the number that a query has for an answer.
func (l *longRun) count(t *testing.T, sql string) (n int) {
	t.Helper()
	if err := l.db.QueryRow(t.Context(), sql).Scan(&n); err != nil {
		t.Fatalf("%s: %v", sql, err)
	}
	return n
}

// command prepares a command, which ends with the test at the latest.
func (l *longRun) command(t *testing.T, args ...string) *exec.Cmd {
	t.Helper()
	cmd := exec.Command(l.program, args...)
	cmd.Env = l.env
	if _, err := cmd.StdinPipe(); err != nil { // it ends with us
		t.Fatal(err)
	}
	return cmd
}

// longProcess is a command that goes on until it is killed.
type longProcess struct {
	cmd *exec.Cmd
	log *workertest.Log
}

// start starts a command and waits until its log has a text.
func (l *longRun) start(t *testing.T, until string, args ...string) *longProcess {
	t.Helper()
	p := &longProcess{l.command(t, args...), workertest.NewLog()}
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
func (p *longProcess) kill() {
	if p.cmd.ProcessState == nil {
		_ = p.cmd.Process.Kill()
		_ = p.cmd.Wait()
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
