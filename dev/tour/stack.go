package main

import (
	"context"
	"crypto/rand"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/carpool-go/carpool/dev/data"
	"github.com/carpool-go/carpool/dev/internal/command"
	"github.com/carpool-go/carpool/internal/servers"
)

// stack is everything that dev starts. Fields are nil until their part is up; bringDown takes down what there is.
type stack struct {
	folder   *servers.Folder // the program, the file to import, the environment to paste
	postgres *servers.Postgres
	redis    interface{ Stop() error }
	receiver *receiver
	worker   *servers.Program
	monitor  *servers.Program
	log      *workerLog

	data    string                   // the folder of the data that is kept; "" keeps nothing
	missing []servers.MissingFolders // those for data that were not there before
	up      bool                     // everything has come up

	databaseURL, redisURL string
	monitorURL            string
	webhookSecret         string
}

// giveUpAfter bounds each wait for something that takes seconds when all is well.
const giveUpAfter = 2 * time.Minute

// newStack prepares what is about to be brought up; bringDown removes it.
func newStack() (*stack, error) {
	secret := make([]byte, 24)
	_, _ = rand.Read(secret) // never fails
	folder, err := servers.NewFolder("carpool-dev-")
	if err != nil {
		return nil, err
	}
	return &stack{
		folder: folder, log: newWorkerLog(),
		webhookSecret: "whsec_" + base64.StdEncoding.EncodeToString(secret),
	}, nil
}

// bringUp starts everything. On an error, what is up by then waits for bringDown.
func (s *stack) bringUp(ctx context.Context, opts command.Options, out io.Writer) error {
	if err := os.MkdirAll(s.importDir(), 0o700); err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(s.importDir(), "seattle-weather.csv"), data.SeattleWeather, 0o600); err != nil {
		return err
	}
	if err := s.takeProgram(); err != nil {
		return err
	}
	if err := s.rememberWhatIsMissing(opts.Data); err != nil {
		return err
	}
	// These two take their time, so they are done at once. Each says when it has finished; the first error ends all.
	progress := &lines{out: out}
	starting, fail := context.WithCancelCause(ctx)
	defer fail(nil)
	var all sync.WaitGroup
	for _, start := range []func(context.Context, command.Options, *lines) error{s.startPostgres, s.startRedis} {
		all.Go(func() {
			if err := start(starting, opts, progress); err != nil {
				fail(err)
			}
		})
	}
	all.Wait()
	if err := context.Cause(starting); err != nil {
		return err
	}
	for _, start := range []func(context.Context, *lines) error{
		s.migrate, s.startReceiver, s.startWorker, s.startMonitor, s.writeEnvironment,
	} {
		if err := start(ctx, progress); err != nil {
			return err
		}
	}
	s.up = true
	return nil
}

// takeProgram takes the worker's program out of the folder where it was compiled, which has then served: on unix a program
// that runs, as we do from there, needs no file. What cannot be removed is removed by who started us.
func (s *stack) takeProgram() error {
	compiled := os.Getenv(command.Programs)
	if compiled == "" {
		return errors.New("there is no worker compiled for it; start it so: go run ./dev")
	}
	if err := os.Mkdir(filepath.Dir(s.program()), 0o700); err != nil {
		return err
	}
	if err := os.Rename(filepath.Join(compiled, filepath.Base(s.program())), s.program()); err != nil {
		return err
	}
	_ = os.RemoveAll(compiled)
	return nil
}

// rememberWhatIsMissing notes which folders for the data are about to be made.
func (s *stack) rememberWhatIsMissing(dir string) error {
	if dir == "" {
		return nil
	}
	s.data = dir
	for _, server := range []string{"redis", "postgres"} {
		missing, err := servers.MissingFoldersOf(filepath.Join(dir, server))
		if err != nil {
			return err
		}
		s.missing = append(s.missing, missing)
	}
	return nil
}

// keepsData says whether there is data that outlives us.
func (s *stack) keepsData() bool {
	if s.data == "" {
		return false
	}
	_, err := os.Stat(s.data)
	return err == nil
}

// bringDown ends what runs, last things first, and removes what is temporary; if it has not come up, also the folders for
// data that were made for it.
func (s *stack) bringDown() error {
	// The worker may finish what it has begun; its own limit comes before this one.
	const grace = 15 * time.Second
	if s.worker != nil {
		s.worker.Stop(grace)
	}
	if s.monitor != nil {
		s.monitor.Stop(grace)
	}
	var errs []error
	if s.receiver != nil {
		errs = append(errs, s.receiver.stop())
	}
	if s.redis != nil {
		errs = append(errs, s.redis.Stop())
	}
	if s.postgres != nil {
		errs = append(errs, s.postgres.Stop())
	}
	if !s.up {
		for _, folders := range s.missing {
			errs = append(errs, folders.Remove())
		}
	}
	return errors.Join(append(errs, s.folder.Remove())...)
}

func (s *stack) importDir() string       { return filepath.Join(s.folder.Path(), "imports") }
func (s *stack) environmentFile() string { return filepath.Join(s.folder.Path(), "env") }

// ownEnvironmentFile is for a worker of the reader's own on the tour's servers.
func (s *stack) ownEnvironmentFile() string { return filepath.Join(s.folder.Path(), "own") }

// program is the worker's, of which the monitor is a command.
func (s *stack) program() string {
	return filepath.Join(s.folder.Path(), "bin", command.File("worker"))
}

// runToEnd runs a program until it ends, or the context does.
func runToEnd(ctx context.Context, cmd *exec.Cmd, out io.Writer) error {
	p, err := servers.StartProgram(cmd, out)
	if err != nil {
		return err
	}
	defer p.Stop(5 * time.Second)
	select {
	case <-p.Done():
		return p.Err()
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

func (s *stack) startPostgres(ctx context.Context, opts command.Options, progress *lines) error {
	if s.databaseURL = os.Getenv("DATABASE_URL"); s.databaseURL != "" {
		progress.printf("  Postgres: yours, from DATABASE_URL")
		return nil
	}
	began := time.Now()
	cfg := servers.PostgresConfig{Install: opts.Install, Log: fetching{progress}}
	if opts.Data != "" {
		cfg.Dir, cfg.Durable = filepath.Join(opts.Data, "postgres"), true
	}
	ctx, cancel := context.WithTimeout(ctx, 5*giveUpAfter) // it may have to be downloaded
	defer cancel()
	pg, err := servers.StartPostgres(ctx, cfg)
	if err != nil {
		if !errors.Is(err, servers.ErrNotFound) {
			return err
		}
		hint := "or set DATABASE_URL to a Postgres that you have"
		if !opts.Install {
			hint += ", or leave out -install=false"
		}
		return fmt.Errorf("%w\n(%s)", err, hint)
	}
	s.postgres = pg
	if s.databaseURL, err = pg.Database(ctx, "carpool"); err != nil {
		return err
	}
	progress.printf("  Postgres %s", where(s.databaseURL, began))
	return nil
}

func (s *stack) startRedis(ctx context.Context, opts command.Options, progress *lines) error {
	if s.redisURL = os.Getenv("REDIS_URL"); s.redisURL != "" {
		progress.printf("  Redis: yours, from REDIS_URL")
		return nil
	}
	began := time.Now()
	cfg := servers.RedisConfig{}
	if opts.Data != "" {
		cfg.Dir, cfg.AppendFsync = filepath.Join(opts.Data, "redis"), "everysec"
	}
	ctx, cancel := context.WithTimeout(ctx, giveUpAfter)
	defer cancel()
	r, err := servers.StartRedis(ctx, cfg)
	if err == nil {
		s.redis, s.redisURL = r, r.URL()
		progress.printf("  Redis %s", where(s.redisURL, began))
		return nil
	}
	if !errors.Is(err, servers.ErrNotFound) {
		return err
	}
	mini, miniErr := servers.StartMiniRedis(ctx)
	if miniErr != nil {
		return errors.Join(err, miniErr)
	}
	s.redis, s.redisURL = mini, mini.URL()
	progress.printf("  Redis: a stand-in within this process, since there is no redis-server; it is slower and keeps nothing")
	return nil
}

// where says where a server is, without its password.
func where(address string, began time.Time) string {
	host := ""
	if u, err := url.Parse(address); err == nil {
		host = u.Host
	}
	return fmt.Sprintf("on %s after %s", host, command.Took(began))
}

func (s *stack) migrate(ctx context.Context, progress *lines) error {
	cmd := exec.Command(s.program(), "migrate")
	cmd.Env = s.environ("LOG_FORMAT=text", "NO_COLOR=1")
	if err := runToEnd(ctx, cmd, nil); err != nil {
		return fmt.Errorf("worker migrate: %w", err)
	}
	progress.printf("  migrations applied (worker migrate)")
	return nil
}

func (s *stack) startReceiver(context.Context, *lines) (err error) {
	s.receiver, err = startReceiver(s.webhookSecret)
	return err
}

func (s *stack) startWorker(ctx context.Context, progress *lines) error {
	cmd := exec.Command(s.program(), "run")
	cmd.Env = s.environ("LOG_FORMAT=json", "LOG_LEVEL=debug", "DB_POOL_VALIDATE_EVERY=2s", "WORKER_SHUTDOWN_TIMEOUT=5s")
	worker, err := servers.StartProgram(cmd, s.log)
	if err != nil {
		return err
	}
	s.worker = worker
	select {
	case <-s.log.started:
		progress.printf("  worker started (worker run)")
		return nil
	case <-worker.Done():
		return fmt.Errorf("the worker did not start: %w", worker.Err())
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-time.After(giveUpAfter):
		return fmt.Errorf("the worker has not started within %s", giveUpAfter)
	}
}

// startMonitor starts the monitor on port 8080, or on the next one that is free. Somebody may be quicker: then it ends, and
// another port is tried.
func (s *stack) startMonitor(ctx context.Context, progress *lines) error {
	const tries = 5
	giveUp := time.After(giveUpAfter)
	for try := 1; ; try++ {
		port, err := portNear(8080)
		if err != nil {
			return err
		}
		address := net.JoinHostPort("127.0.0.1", strconv.Itoa(port))
		cmd := exec.Command(s.program(), "monitor")
		cmd.Env = s.environ("LOG_FORMAT=json", "MONITOR_ADDR="+address, "MONITOR_SHOW_PAYLOADS=true")
		log := newWorkerLog()
		if s.monitor, err = servers.StartProgram(cmd, log); err != nil {
			return err
		}
		select {
		case <-log.started:
			s.monitorURL = "http://" + address + "/"
			progress.printf("  monitor on %s (worker monitor)", s.monitorURL)
			return nil
		case <-s.monitor.Done():
			if try == tries {
				return fmt.Errorf("the monitor did not start: %w", s.monitor.Err())
			}
			s.monitor.Stop(0)
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-giveUp:
			return fmt.Errorf("the monitor has not started within %s", giveUpAfter)
		}
	}
}

// portNear finds a free port on 127.0.0.1 from the wanted one upwards.
func portNear(wanted int) (int, error) {
	for port := wanted; port < wanted+100; port++ {
		if l, err := net.Listen("tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(port))); err == nil {
			return port, l.Close()
		}
	}
	return servers.FreePort()
}

// settings is the environment of the programs: what differs from the user's own.
func (s *stack) settings() []string {
	return []string{
		"DATABASE_URL=" + s.databaseURL,
		"REDIS_URL=" + s.redisURL,
		"IMPORT_DIR=" + s.importDir(),
		"WEBHOOK_SECRET=" + s.webhookSecret,
		"OUTBOUND_ALLOW=127.0.0.1", // where the receiver of webhooks is
	}
}

// environ is the user's environment with the settings and further ones in it.
func (s *stack) environ(further ...string) []string {
	return slices.Concat(os.Environ(), s.settings(), further)
}

// writeEnvironment writes a file to be read by a shell, so that the passwords in it need not be shown.
func (s *stack) writeEnvironment(ctx context.Context, _ *lines) error {
	path := "export PATH=" + quoted(filepath.Dir(s.program())) + ":\"$PATH\"\n"
	if err := writeExports(s.environmentFile(), s.settings(), path); err != nil {
		return err
	}
	if !s.hasOwnServers() {
		return nil
	}
	// Two programs that pull from one queue each fetch the other's jobs, so a worker of the
	// reader's has a database and queues of its own.
	databaseURL, err := s.postgres.Database(ctx, "own")
	if err != nil {
		return err
	}
	redisURL, err := url.Parse(s.redisURL)
	if err != nil {
		return err
	}
	redisURL.Path = "/1"
	return writeExports(s.ownEnvironmentFile(), []string{"DATABASE_URL=" + databaseURL, "REDIS_URL=" + redisURL.String()}, "")
}

// hasOwnServers reports whether neither server is the user's.
func (s *stack) hasOwnServers() bool { return s.postgres != nil && s.redis != nil }

// writeExports writes settings as a shell reads them, and what comes after them.
func writeExports(file string, settings []string, then string) error {
	var b strings.Builder
	for _, setting := range settings {
		name, value, _ := strings.Cut(setting, "=")
		fmt.Fprintf(&b, "export %s=%s\n", name, quoted(value))
	}
	return os.WriteFile(file, []byte(b.String()+then), 0o600)
}

func (s *stack) printWhatToTry(out io.Writer) {
	csv := `{"source": "file:///seattle-weather.csv", "table": "weather", "mode": "replace"}`
	webhook := fmt.Sprintf(`{"url": %q, "event": "hello", "body": {"to": "you"}}`, s.receiver.url)
	own := ""
	if s.hasOwnServers() {
		own = fmt.Sprintf("  For a worker of your own (see README.md), a database and queues of its own on these servers:\n    . %s\n", quoted(s.ownEnvironmentFile()))
	}
	fmt.Fprintf(out, `
What to try next
  Look at the queues and at each job's result: %s
  In another terminal, first take over the environment, then enqueue jobs and look at what they did:
    . %s
    worker kinds
    worker enqueue csv:import %s --wait
    worker enqueue webhook:deliver %s --wait
    psql "$DATABASE_URL" -c 'SELECT weather, count(*) FROM imports.weather GROUP BY 1'
  Put a CSV file of your own into %s and import it.
%s
Jobs are shown here as they end. Ctrl-C ends it all.

`, s.monitorURL, quoted(s.environmentFile()), quoted(csv), quoted(webhook), s.importDir(), own)
}

// lines writes whole lines from several goroutines.
type lines struct {
	mu  sync.Mutex
	out io.Writer
}

func (l *lines) printf(format string, args ...any) {
	l.mu.Lock()
	defer l.mu.Unlock()
	fmt.Fprintf(l.out, format+"\n", args...)
}

// fetching passes on what the start of Postgres says of fetching it, which takes long, and drops the rest.
type fetching struct{ progress *lines }

func (f fetching) Write(b []byte) (int, error) {
	for line := range strings.Lines(string(b)) {
		switch line = strings.TrimSpace(line); {
		case strings.HasPrefix(line, "downloading "):
			f.progress.printf("  … %s", line)
		case strings.HasPrefix(line, "installing "):
			f.progress.printf("  … %s (-install=false forbids it)", line)
		}
	}
	return len(b), nil
}

// quoted is an argument that can be pasted into a shell.
func quoted(s string) string { return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'" }
