package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/hibiken/asynq"
	"github.com/redis/go-redis/v9"

	"github.com/carpool-go/carpool/internal/schema"
	"github.com/carpool-go/carpool/internal/testservers"
	"github.com/carpool-go/carpool/tasks"
)

func TestMain(m *testing.M) {
	if os.Getenv("CARPOOL_CHAOS_WORKER") != "" {
		os.Exit(chaosWorker())
	}
	redis.SetLogger(redisLog{discard()})
	testservers.RunMoreAtOnce()
	dir, err := os.MkdirTemp("", "carpool-worker-test-*")
	if err != nil {
		panic(err)
	}
	binary = sync.OnceValues(func() (string, error) { return build(filepath.Join(dir, "worker")) })
	testservers.Main(m, func() { _ = os.RemoveAll(dir) })
}

// binary is the worker as it is deployed, built once for the package's tests,
// when the first asks for it.
var binary func() (path string, err error)

func build(path string) (string, error) {
	args := []string{"build", "-o", path}
	if raceEnabled {
		args = append(args, "-race")
	}
	out, err := exec.Command("go", append(args, ".")...).CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("go build: %w\n%s", err, out)
	}
	return path, nil
}

// bundle is what a test of the binary works with: servers of its own, a client
// to enqueue with, and an inspector to look with.
type bundle struct {
	databaseURL, redisURL string
	client                *tasks.Client
	inspector             *asynq.Inspector
	env                   []string
}

func setup(t *testing.T) *bundle {
	t.Helper()
	b := &bundle{databaseURL: testservers.Postgres(t), redisURL: testservers.Redis(t)}
	if err := schema.Migrate(t.Context(), b.databaseURL, slog.New(slog.DiscardHandler)); err != nil {
		t.Fatal(err)
	}
	rdb := b.redis(t)
	b.client = tasks.NewClient(rdb)
	b.inspector = asynq.NewInspectorFromRedisClient(rdb)
	b.env = []string{
		"DATABASE_URL=" + b.databaseURL, "REDIS_URL=" + b.redisURL,
		"LOG_LEVEL=debug", "LOG_FORMAT=json", "PATH=" + os.Getenv("PATH"),
	}
	return b
}

func openRedis(t testing.TB, url string) redis.UniversalClient {
	t.Helper()
	rdb, err := tasks.OpenRedis(url)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = rdb.Close() })
	return rdb
}

func (b *bundle) redis(t *testing.T) redis.UniversalClient {
	t.Helper()
	return openRedis(t, b.redisURL)
}

// worker prepares a run of the binary with the bundle's servers; env wins over
// the bundle's.
func (b *bundle) worker(t *testing.T, env []string, args ...string) *exec.Cmd {
	t.Helper()
	path, err := binary()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(path, args...)
	cmd.Env = append(append([]string{}, b.env...), env...)
	return cmd
}

// process is a worker that runs in the background.
type process struct {
	cmd  *exec.Cmd
	log  *logBuffer
	done chan struct{}
	err  error
}

// start starts `worker run` and waits until it says that it has started.
func (b *bundle) start(t *testing.T, env ...string) *process {
	t.Helper()
	p := b.launch(t, env)
	p.log.wait(t, `"msg":"worker started"`)
	return p
}

func (b *bundle) launch(t *testing.T, env []string, args ...string) *process {
	t.Helper()
	p := &process{cmd: b.worker(t, env, append([]string{"run"}, args...)...), log: newLogBuffer(), done: make(chan struct{})}
	p.cmd.Stderr = p.log
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		p.err = p.cmd.Wait()
		close(p.done)
	}()
	t.Cleanup(func() {
		_ = p.cmd.Process.Kill()
		<-p.done
		if t.Failed() {
			t.Logf("the worker's log:\n%s", p.log)
		}
	})
	return p
}

func (p *process) signal(t *testing.T, sig syscall.Signal) {
	t.Helper()
	if err := p.cmd.Process.Signal(sig); err != nil {
		t.Fatal(err)
	}
}

// exit waits for the end of the process and returns its exit code.
func (p *process) exit(t *testing.T) int {
	t.Helper()
	select {
	case <-p.done:
		return p.cmd.ProcessState.ExitCode()
	case <-time.After(time.Minute):
		t.Fatal("the worker does not exit")
		return 0
	}
}

// logBuffer keeps a log and can wait for a text to come up in it.
type logBuffer struct {
	mu    sync.Mutex
	buf   bytes.Buffer
	grown chan struct{}
}

func newLogBuffer() *logBuffer { return &logBuffer{grown: make(chan struct{})} }

func (l *logBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	close(l.grown)
	l.grown = make(chan struct{})
	return l.buf.Write(p)
}

func (l *logBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.String()
}

func (l *logBuffer) wait(t *testing.T, text string) {
	t.Helper()
	giveUp := time.After(time.Minute)
	for {
		l.mu.Lock()
		found, grown := strings.Contains(l.buf.String(), text), l.grown
		l.mu.Unlock()
		if found {
			return
		}
		select {
		case <-grown:
		case <-giveUp:
			t.Fatalf("%q does not come up in the log:\n%s", text, l)
		}
	}
}

// run runs the binary to its end.
func run(t *testing.T, cmd *exec.Cmd) (stdout, stderr string, code int) {
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

// wait waits for a job's end.
func (b *bundle) wait(t *testing.T, info *asynq.TaskInfo) ([]byte, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	return b.client.Wait(ctx, info.Queue, info.ID, nil)
}

// eventually waits for a condition that nothing announces.
func eventually(t *testing.T, what string, holds func() bool) {
	t.Helper()
	for giveUp := time.Now().Add(time.Minute); !holds(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(giveUp) {
			t.Fatalf("it does not come about that %s", what)
		}
	}
}

func discard() *slog.Logger { return slog.New(slog.NewJSONHandler(io.Discard, nil)) }
