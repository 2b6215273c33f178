//go:build unix

package main

import (
	"bytes"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/carpool-go/carpool/dev/internal/command"
	"github.com/carpool-go/carpool/internal/schema"
	"github.com/carpool-go/carpool/internal/servers"
	"github.com/carpool-go/carpool/internal/testservers"
)

// asProgram makes this test program dev itself.
const asProgram = "CARPOOL_DEV_TEST_PROGRAM"

func TestMain(m *testing.M) {
	if os.Getenv(asProgram) != "" {
		main()
	}
	testservers.Main(m)
}

// giveUp bounds waits for a run of dev, which takes seconds once its programs are compiled and minutes before.
const giveUp = 8 * time.Minute

func TestDev_OnceTakesTheTourAndKeepsTheData(t *testing.T) {
	t.Parallel()
	data := filepath.Join(openDir(t), "data")
	d := startDev(t, nil, "-once", "-data", data)
	d.wantExit(0)
	for _, want := range []string{
		"1. A CSV file into Postgres", "imports.seattle_weather has 1461 days, 641 of them of rain; the hottest was 2014-08-11 with 35.6 °C",
		"2. The same from the command line", "$ worker enqueue csv:import", "imports.seattle_weather_again has 1461 days",
		"3. A signed webhook", "checked the signature",
		"4. The pool is validated", `"checked":`,
		"the pool: size 5, checked in ", "the data is kept in " + data,
	} {
		if !strings.Contains(d.output(), want) {
			t.Errorf("it does not say %q", want)
		}
	}
	if done := strings.Count(d.output(), ": done in "); done != 4 {
		t.Errorf("%d jobs done, want 4", done)
	}
	d.wantNothingLeft(nil)

	pg, err := servers.StartPostgres(t.Context(), servers.PostgresConfig{Dir: filepath.Join(data, "postgres")})
	if err != nil {
		t.Fatal(err)
	}
	defer pg.Stop()
	databaseURL, err := pg.Database(t.Context(), "carpool")
	if err != nil {
		t.Fatal(err)
	}
	if rows := query[int](t, databaseURL, "SELECT count(*) FROM imports.seattle_weather"); rows != 1461 {
		t.Errorf("%d rows were kept, want 1461", rows)
	}
}

// Here there is no redis-server, and what is printed to be pasted is pasted.
func TestDev_StaysUntilCtrlCAndThenNothingIsLeft(t *testing.T) {
	t.Parallel()
	d := startDev(t, []string{"PATH=" + pathWithoutRedis(t)})
	d.waitFor("Ctrl-C ends it all.\n\n")
	if !strings.Contains(d.output(), "there is no redis-server") {
		t.Error("it does not say that Redis is a stand-in")
	}
	_, try, _ := strings.Cut(d.output(), "What to try next")

	monitor := regexp.MustCompile(`http://\S+`).FindString(try)
	res, err := http.Get(monitor)
	if err != nil {
		t.Fatal(err)
	}
	_ = res.Body.Close()
	http.DefaultClient.CloseIdleConnections()
	if port, _ := strconv.Atoi(res.Request.URL.Port()); res.StatusCode != http.StatusOK || port < 8080 {
		t.Errorf("the monitor on %s answers %s", monitor, res.Status)
	}

	var script strings.Builder
	script.WriteString("set -e\n")
	pasted := 0
	for line := range strings.Lines(try) {
		if line = strings.TrimSpace(line); strings.HasPrefix(line, ". ") || strings.HasPrefix(line, "worker ") {
			script.WriteString(line + "\n")
			pasted++
		}
	}
	if pasted != 5 {
		t.Fatalf("%d lines to paste, want the environment, three commands, and the environment for a worker of one's own:\n%s", pasted, try)
	}
	script.WriteString("worker migrate\nworker status\n") // in the latter
	out, err := exec.CommandContext(t.Context(), "sh", "-c", script.String()).CombinedOutput()
	if err != nil {
		t.Errorf("the lines to paste: %v\n%s", err, out)
	}
	if !strings.Contains(string(out), "no instance is up") {
		t.Errorf("a worker of one's own would share its queues with the tour's:\n%s", out)
	}
	d.waitFor("webhook:deliver ") // jobs are shown as they end

	pids := descendants(t, d.cmd.Process.Pid)
	if len(pids) < 5 {
		t.Errorf("processes %v: want Postgres and its own, the worker, the monitor, the watchdogs", pids)
	}
	d.signal(os.Interrupt)
	d.wantExit(0)
	d.wantNothingLeft(pids)
}

func TestDev_KilledItLeavesNothing(t *testing.T) {
	t.Parallel()
	d := startDev(t, nil)
	d.waitFor("Ctrl-C ends it all.\n\n")
	pids := descendants(t, d.cmd.Process.Pid)
	d.signal(syscall.SIGKILL)
	d.wantNothingLeft(pids)
}

func TestDev_EndsWithGoRun(t *testing.T) {
	t.Parallel()
	d := newDev(t, "go", "run", "..")
	d.start(nil)
	d.waitFor("bringing everything up")
	pids := descendants(t, d.cmd.Process.Pid)
	d.signal(syscall.SIGKILL)
	d.wantNothingLeft(pids)
}

func TestDev_InterruptedBeforeItIsUpItLeavesNothing(t *testing.T) {
	t.Parallel()
	d := startDev(t, nil, "-once")
	d.waitFor("Postgres on ")
	pids := descendants(t, d.cmd.Process.Pid)
	d.signal(syscall.SIGTERM)
	d.wantExit(1)
	d.wantNothingLeft(pids)
	if strings.Contains(d.output(), "signal: ") {
		t.Error("it blames what it has itself cut short")
	}
}

// A folder that was there stays, with the owner it had.
func TestDev_AStartThatFailsLeavesNothing(t *testing.T) {
	t.Parallel()
	broken := t.TempDir()
	for program, script := range map[string]string{"postgres": "exit 0", "initdb": "echo no space left >&2; exit 1"} {
		if err := os.WriteFile(filepath.Join(broken, program), []byte("#!/bin/sh\n"+script+"\n"), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Chmod(broken, 0o755); err != nil {
		t.Fatal(err)
	}
	root := openDir(t)
	d := startDev(t, []string{"PATH=" + broken + ":" + os.Getenv("PATH")}, "-once", "-data", filepath.Join(root, "new", "data"))
	d.wantExit(1)
	d.wantNothingLeft(nil)
	if said := d.output(); !strings.Contains(said, "no space left") || !strings.Contains(said, "is gone, files included") {
		t.Error("it does not say why, or that all is gone")
	}
	left, err := os.ReadDir(root)
	if err != nil || len(left) > 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
}

func TestDev_AJobThatFailsFailsItAndOtherStepsAreTaken(t *testing.T) {
	t.Parallel()
	databaseURL, redisURL := testservers.Postgres(t), testservers.Redis(t)
	if err := schema.Migrate(t.Context(), databaseURL, slog.New(slog.DiscardHandler)); err != nil {
		t.Fatal(err)
	}
	// What bears the table's name is none.
	query[any](t, databaseURL, "CREATE VIEW imports.seattle_weather AS SELECT 1 AS one")

	d := startDev(t, []string{"DATABASE_URL=" + databaseURL, "REDIS_URL=" + redisURL}, "-once")
	d.wantExit(1)
	if failed, done := strings.Count(d.output(), "FAILED"), strings.Count(d.output(), ": done in "); failed != 1 || done != 3 {
		t.Errorf("%d steps failed and %d jobs are done, want 1 and 3", failed, done)
	}
	for _, url := range []string{databaseURL, redisURL} {
		if password := passwordOf(t, url); strings.Contains(d.output(), password) {
			t.Error("it shows a password")
		}
	}
	if rows := query[int](t, databaseURL, "SELECT count(*) FROM imports.seattle_weather_again"); rows != 1461 {
		t.Errorf("%d rows in the server that it was given, want 1461", rows)
	}
	d.wantNothingLeft(nil)
}

func TestRun_NamesTheWayToStartIt(t *testing.T) {
	t.Parallel()
	var said bytes.Buffer
	if code := run(t.Context(), nil, io.Discard, &said); code != 1 || !strings.Contains(said.String(), "go run ./dev") {
		t.Errorf("exit %d, %q; want 1 and the command", code, said.String())
	}
}

// dev is a run of the program, in an otherwise empty folder for temporary files.
type dev struct {
	t      *testing.T
	cmd    *exec.Cmd
	tmp    string
	exited chan struct{}

	mu      sync.Mutex
	said    bytes.Buffer
	changed chan struct{} // closed and replaced when more is said
}

func startDev(t *testing.T, env []string, args ...string) *dev {
	t.Helper()
	d := newDev(t, os.Args[0], args...)
	programs := filepath.Join(d.tmp, "programs")
	out, err := exec.CommandContext(t.Context(), "go", "build", "-o", programs+"/", "../../cmd/worker").CombinedOutput()
	if err != nil {
		t.Fatalf("compile the worker: %v\n%s", err, out)
	}
	d.start(append(env, asProgram+"=1", command.Programs+"="+programs))
	return d
}

func newDev(t *testing.T, path string, args ...string) *dev {
	d := &dev{t: t, cmd: exec.Command(path, args...), tmp: openDir(t), exited: make(chan struct{}), changed: make(chan struct{})}
	d.cmd.Stdout, d.cmd.Stderr = d, d
	d.cmd.WaitDelay = time.Second // who holds the output open may outlive it
	d.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	return d
}

func (d *dev) start(env []string) {
	d.t.Helper()
	// Not the developer's own servers.
	clean := slices.DeleteFunc(os.Environ(), func(v string) bool {
		return strings.HasPrefix(v, "DATABASE_URL=") || strings.HasPrefix(v, "REDIS_URL=")
	})
	d.cmd.Env = slices.Concat(clean, []string{"TMPDIR=" + d.tmp}, env)
	if err := d.cmd.Start(); err != nil {
		d.t.Fatal(err)
	}
	go func() {
		_ = d.cmd.Wait()
		close(d.exited)
	}()
	d.t.Cleanup(func() {
		_ = syscall.Kill(-d.cmd.Process.Pid, syscall.SIGKILL) // with what go run started
		<-d.exited
		if d.t.Failed() {
			d.t.Logf("dev said:\n%s", d.output())
		}
	})
}

func (d *dev) Write(b []byte) (int, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.said.Write(b)
	close(d.changed)
	d.changed = make(chan struct{})
	return len(b), nil
}

func (d *dev) output() string {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.said.String()
}

// waitFor waits until dev has said what.
func (d *dev) waitFor(what string) {
	d.t.Helper()
	timeout := time.After(giveUp)
	for {
		d.mu.Lock()
		said, changed := strings.Contains(d.said.String(), what), d.changed
		d.mu.Unlock()
		if said {
			return
		}
		select {
		case <-changed:
		case <-d.exited:
			d.t.Fatalf("dev ended before it said %q", what)
		case <-timeout:
			d.t.Fatalf("dev has not said %q", what)
		}
	}
}

func (d *dev) signal(s os.Signal) {
	d.t.Helper()
	if err := d.cmd.Process.Signal(s); err != nil {
		d.t.Fatal(err)
	}
}

func (d *dev) wantExit(code int) {
	d.t.Helper()
	select {
	case <-d.exited:
	case <-time.After(giveUp):
		d.t.Fatal("dev has not ended")
	}
	if got := d.cmd.ProcessState.ExitCode(); got != code {
		d.t.Errorf("dev exited with %d, want %d", got, code)
	}
}

// wantNothingLeft waits until no process is left of those given, no file, and nobody on the ports that dev named.
func (d *dev) wantNothingLeft(pids []int) {
	d.t.Helper()
	deadline := time.Now().Add(time.Minute)
	until := func(what string, gone func() bool) {
		d.t.Helper()
		for !gone() {
			if time.Now().After(deadline) {
				d.t.Errorf("%s is still there", what)
				return
			}
			time.Sleep(10 * time.Millisecond)
		}
	}
	for _, pid := range pids {
		until("process "+strconv.Itoa(pid)+" "+processes(d.t)[pid].command, func() bool { return !processes(d.t)[pid].runs })
	}
	until("a file", func() bool {
		left, err := os.ReadDir(d.tmp)
		// go run's own folder is not ours to remove, and the go command was killed.
		left = slices.DeleteFunc(left, func(e os.DirEntry) bool { return strings.HasPrefix(e.Name(), "go-build") })
		return err == nil && len(left) == 0
	})
	for _, address := range regexp.MustCompile(`127\.0\.0\.1:\d+`).FindAllString(d.output(), -1) {
		if strings.Contains(d.output(), "yours, from") {
			break // those stay
		}
		until("a server on "+address, func() bool {
			conn, err := net.Dial("tcp", address)
			if err == nil {
				_ = conn.Close()
			}
			return errors.Is(err, syscall.ECONNREFUSED)
		})
	}
}

type processState struct {
	parent  int
	runs    bool // one that has ended, but that nobody waited for, does not
	command string
}

func processes(t *testing.T) map[int]processState {
	t.Helper()
	out, err := exec.Command("ps", "-A", "-o", "pid=,ppid=,stat=,args=").Output()
	if err != nil {
		t.Fatal(err)
	}
	all := map[int]processState{}
	for line := range strings.Lines(string(out)) {
		fields := strings.Fields(line)
		if len(fields) < 4 {
			continue
		}
		pid, _ := strconv.Atoi(fields[0])
		parent, _ := strconv.Atoi(fields[1])
		all[pid] = processState{parent, !strings.HasPrefix(fields[2], "Z"), strings.Join(fields[3:], " ")}
	}
	return all
}

// descendants are a process's children, their children, and so on.
func descendants(t *testing.T, pid int) []int {
	t.Helper()
	all := processes(t)
	var found []int
	for parents := []int{pid}; len(parents) > 0; {
		var children []int
		for child, state := range all {
			if slices.Contains(parents, state.parent) {
				children = append(children, child)
			}
		}
		found = append(found, children...)
		parents = children
	}
	return found
}

// openDir is a temporary folder that other users may search, as Postgres may have to run as one.
func openDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "carpool-dev-test-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	return dir
}

// pathWithoutRedis is a folder of links to all programs on PATH but for Redis.
func pathWithoutRedis(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	for _, from := range filepath.SplitList(os.Getenv("PATH")) {
		entries, err := os.ReadDir(from)
		if err != nil {
			continue
		}
		for _, e := range entries {
			if e.Name() != "redis-server" && e.Name() != "valkey-server" {
				_ = os.Symlink(filepath.Join(from, e.Name()), filepath.Join(dir, e.Name())) // the first on PATH wins
			}
		}
	}
	return dir
}

func query[T any](t *testing.T, databaseURL, sql string) (value T) {
	t.Helper()
	conn, err := pgx.Connect(t.Context(), databaseURL)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(t.Context())
	rows, err := conn.Query(t.Context(), sql)
	if err != nil {
		t.Fatal(err)
	}
	defer rows.Close()
	if rows.Next() {
		if err := rows.Scan(&value); err != nil {
			t.Fatal(err)
		}
	}
	rows.Close()
	if err := rows.Err(); err != nil {
		t.Fatal(err)
	}
	return value
}

func passwordOf(t *testing.T, address string) string {
	t.Helper()
	u, err := url.Parse(address)
	if err != nil {
		t.Fatal(err)
	}
	password, ok := u.User.Password()
	if !ok {
		t.Fatal("there is no password in the URL")
	}
	return password
}
