// Package workertest is what the tests of a worker's rooms share: servers of their own, the
// worker as it is deployed, and its log.
package workertest

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/hibiken/asynq"
	"github.com/jackc/pgx/v5"
	"github.com/redis/go-redis/v9"

	"github.com/carpool-go/carpool/internal/schema"
	"github.com/carpool-go/carpool/internal/testservers"
	"github.com/carpool-go/carpool/tasks"
)

// program is the package of the worker as it is deployed.
const program = "github.com/carpool-go/carpool/cmd/worker"

// binary builds it, once for a package's tests, when the first asks for it. It is
// package-level because a test has no other way to reach what [Main] made.
var binary func() (path string, err error)

// Main is to be called by TestMain of a package whose tests run the worker. It runs the
// tests, four to a processor, stops the servers that they have used, and exits.
func Main(m *testing.M) {
	redis.SetLogger(quiet{})
	testservers.RunMoreAtOnce()
	dir, err := os.MkdirTemp("", "carpool-worker-test-*")
	if err != nil {
		panic(err)
	}
	binary = sync.OnceValues(func() (string, error) { return build(filepath.Join(dir, "worker")) })
	testservers.Main(m, func() { _ = os.RemoveAll(dir) })
}

// quiet drops what go-redis says of connections that it replaces.
type quiet struct{}

func (quiet) Printf(context.Context, string, ...any) {}

func build(path string) (string, error) {
	cmd := exec.Command("go", "build", "-o", path, program)
	if raceEnabled {
		cmd.Env = append(os.Environ(), "CGO_ENABLED=1", "GOFLAGS=-race") // as the test was compiled
	}
	out, err := cmd.CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("go build: %w\n%s", err, out)
	}
	return path, nil
}

// Bundle is what a test of the binary works with: servers of its own, a client
// to enqueue with, and an inspector to look with.
type Bundle struct {
	DatabaseURL, RedisURL string
	Client                *tasks.Client
	Inspector             *asynq.Inspector
	// Env is the environment of the worker.
	Env []string
}

// Setup makes a bundle whose servers are gone when the test ends.
func Setup(t *testing.T) *Bundle {
	t.Helper()
	b := &Bundle{DatabaseURL: testservers.Postgres(t), RedisURL: testservers.Redis(t)}
	if err := schema.Migrate(t.Context(), b.DatabaseURL, slog.New(slog.DiscardHandler)); err != nil {
		t.Fatal(err)
	}
	rdb := b.Redis(t)
	b.Client = tasks.NewClient(rdb)
	b.Inspector = asynq.NewInspectorFromRedisClient(rdb)
	b.Env = []string{
		"DATABASE_URL=" + b.DatabaseURL, "REDIS_URL=" + b.RedisURL,
		"LOG_LEVEL=debug", "LOG_FORMAT=json", "PATH=" + os.Getenv("PATH"),
	}
	return b
}

// OpenRedis opens a client that is closed when the test ends.
func OpenRedis(t testing.TB, url string) redis.UniversalClient {
	t.Helper()
	rdb, err := tasks.OpenRedis(url)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = rdb.Close() })
	return rdb
}

// Redis opens a client of its own.
func (b *Bundle) Redis(t *testing.T) redis.UniversalClient {
	t.Helper()
	return OpenRedis(t, b.RedisURL)
}

// Worker prepares a run of the binary with the bundle's servers; env wins over
// the bundle's.
func (b *Bundle) Worker(t *testing.T, env []string, args ...string) *exec.Cmd {
	t.Helper()
	path, err := binary()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(path, args...)
	cmd.Env = append(append([]string{}, b.Env...), env...)
	return cmd
}

// Process is a worker that runs in the background.
type Process struct {
	Cmd  *exec.Cmd
	Log  *Log
	done chan struct{}
	err  error
}

// Start starts `worker run` and waits until it says that it has started.
func (b *Bundle) Start(t *testing.T, env ...string) *Process {
	t.Helper()
	p := b.Launch(t, env)
	p.Log.Wait(t, `"msg":"worker started"`)
	return p
}

// Launch starts `worker run` with further arguments.
func (b *Bundle) Launch(t *testing.T, env []string, args ...string) *Process {
	t.Helper()
	p := &Process{Cmd: b.Worker(t, env, append([]string{"run"}, args...)...), Log: NewLog(), done: make(chan struct{})}
	p.Cmd.Stderr = p.Log
	if err := p.Cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		p.err = p.Cmd.Wait()
		close(p.done)
	}()
	t.Cleanup(func() {
		_ = p.Cmd.Process.Kill()
		<-p.done
		if t.Failed() {
			t.Logf("the worker's log:\n%s", p.Log)
		}
	})
	return p
}

// Signal sends a signal.
func (p *Process) Signal(t *testing.T, sig syscall.Signal) {
	t.Helper()
	if err := p.Cmd.Process.Signal(sig); err != nil {
		t.Fatal(err)
	}
}

// Exit waits for the end of the process and returns its exit code.
func (p *Process) Exit(t *testing.T) int {
	t.Helper()
	select {
	case <-p.done:
		return p.Cmd.ProcessState.ExitCode()
	case <-time.After(time.Minute):
		t.Fatal("the worker does not exit")
		return 0
	}
}

// Log is [testservers.Log].
type Log = testservers.Log

// NewLog returns an empty log.
func NewLog() *Log { return new(testservers.Log) }

// Run runs the binary to its end.
func Run(t *testing.T, cmd *exec.Cmd) (stdout, stderr string, code int) {
	t.Helper()
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	kill := time.AfterFunc(time.Minute, func() { _ = cmd.Process.Kill() })
	defer kill.Stop()
	_ = cmd.Wait() // the exit code says it
	return out.String(), errs.String(), cmd.ProcessState.ExitCode()
}

// Wait waits for a job's end.
func (b *Bundle) Wait(t *testing.T, info *tasks.Info) ([]byte, error) {
	t.Helper()
	return b.WaitFor(t, info.Queue, info.ID)
}

// WaitFor waits for the end of a job that another program may have enqueued.
func (b *Bundle) WaitFor(t *testing.T, queue, id string) ([]byte, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	return b.Client.Wait(ctx, queue, id, nil)
}

// Eventually is [testservers.Eventually].
func Eventually(t testing.TB, what string, holds func() bool) {
	t.Helper()
	testservers.Eventually(t, what, holds)
}

// Discard is a log that nobody reads.
func Discard() *slog.Logger { return slog.New(slog.NewJSONHandler(io.Discard, nil)) }

// ACLUsers are the users of Redis that docs/security.md has: by its name there, the rules of each after its password, as ACL
// SETUSER takes them. security is the path of the page from the test's folder.
func ACLUsers(t testing.TB, security string) map[string]string {
	t.Helper()
	page, err := os.ReadFile(security)
	if err != nil {
		t.Fatal(err)
	}
	users := make(map[string]string)
	for _, m := range regexp.MustCompile(`(?m)^ACL SETUSER (\w+) on >PASSWORD (.*)$`).FindAllStringSubmatch(string(page), -1) {
		users[m[1]] = m[2]
	}
	for _, name := range []string{"worker", "enqueue", "enqueue_and_wait"} {
		if users[name] == "" {
			t.Fatalf("%s has no user %s", security, name)
		}
	}
	return users
}

// Exec executes a statement on the bundle's database.
func (b *Bundle) Exec(t *testing.T, sql string) {
	t.Helper()
	conn, err := pgx.Connect(t.Context(), b.DatabaseURL)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(context.Background())
	if _, err := conn.Exec(t.Context(), sql); err != nil {
		t.Fatalf("%s: %v", sql, err)
	}
}

// ThroughProxy is [testservers.ThroughProxy].
func ThroughProxy(t testing.TB, raw string) (string, *testservers.Proxy) {
	t.Helper()
	return testservers.ThroughProxy(t, raw)
}
