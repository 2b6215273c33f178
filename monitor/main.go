// Monitor shows the queues to people: asynqmon, behind a login, for browsers.
package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/signal"
	"runtime/debug"
	"strings"
	"syscall"
	"time"

	"github.com/alecthomas/kong"
	"github.com/hibiken/asynqmon"
	"github.com/redis/go-redis/v9"

	"github.com/carpool-go/carpool/tasks"
)

// config is declared for the environment, the flags and the help at once.
type config struct {
	RedisURL     string `name:"redis-url" env:"REDIS_URL" placeholder:"redis://…" help:"Redis that holds the queues. With a password in it, set the variable: flags are readable by everybody on the machine."`
	Addr         string `env:"MONITOR_ADDR" default:"127.0.0.1:8080" help:"Where to listen. An address that others can reach needs a password."`
	User         string `env:"MONITOR_USER" default:"carpool" help:"The user of the login."`
	Password     string `env:"MONITOR_PASSWORD" placeholder:"…" help:"The password of the login; none, no login. Environment only."`
	ReadOnly     bool   `env:"MONITOR_READ_ONLY" help:"Let nobody change anything."`
	ShowPayloads bool   `env:"MONITOR_SHOW_PAYLOADS" help:"Show the values in payloads and results, not just the names of the fields."`
	Version      bool   `help:"Show the version."`
}

// validate names everything that is wrong.
func (c *config) validate() error {
	var faults []string
	switch rdb, err := tasks.OpenRedis(c.RedisURL); {
	case c.RedisURL == "":
		faults = append(faults, "REDIS_URL is not set; for example REDIS_URL=redis://localhost:6379/0")
	case err != nil:
		faults = append(faults, "REDIS_URL is wrong: "+strings.TrimPrefix(err.Error(), "tasks: redis URL: "))
	default:
		_ = rdb.Close()
	}
	if c.RedisURL != os.Getenv("REDIS_URL") && strings.Contains(c.RedisURL, "@") {
		faults = append(faults, "REDIS_URL is given as a flag with a password in it, which everybody on the machine can read in the list of processes; set the variable instead")
	}
	if c.Password != os.Getenv("MONITOR_PASSWORD") {
		faults = append(faults, "MONITOR_PASSWORD is given as a flag, which everybody on the machine can read in the list of processes; set the variable instead")
	}
	host, _, err := net.SplitHostPort(c.Addr)
	switch {
	case err != nil:
		faults = append(faults, fmt.Sprintf("MONITOR_ADDR is %q, which is not host:port; for example MONITOR_ADDR=127.0.0.1:8080", c.Addr))
	case !isLoopback(host) && c.Password == "":
		faults = append(faults, fmt.Sprintf("MONITOR_ADDR is %q, which others can reach, and MONITOR_PASSWORD is not set; set it, or listen on 127.0.0.1", c.Addr))
	}
	if len(faults) == 0 {
		return nil
	}
	return errors.New(strings.Join(faults, "\n  "))
}

func main() {
	for _, entry := range os.Environ() { // set to nothing counts as not set
		if name, value, _ := strings.Cut(entry, "="); value == "" {
			_ = os.Unsetenv(name)
		}
	}
	var cfg config
	parser := kong.Must(&cfg, kong.Name("monitor"), kong.Description("Shows the queues, in a browser."))
	if _, err := parser.Parse(os.Args[1:]); err != nil {
		fmt.Fprintf(os.Stderr, "monitor: %v\nTry: monitor --help\n", err)
		os.Exit(2)
	}
	if cfg.Version {
		fmt.Println(version())
		return
	}
	if err := cfg.validate(); err != nil {
		fmt.Fprintf(os.Stderr, "monitor:\n  %v\n", err)
		os.Exit(2)
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, cfg, slog.New(slog.NewJSONHandler(os.Stderr, nil))); err != nil {
		fmt.Fprintf(os.Stderr, "monitor: %v\n", err)
		os.Exit(1)
	}
}

// shutdownTimeout is how long requests may go on after SIGTERM.
const shutdownTimeout = 5 * time.Second

// run serves until ctx ends.
func run(ctx context.Context, cfg config, log *slog.Logger) error {
	rdb, err := tasks.OpenRedis(cfg.RedisURL)
	if err != nil {
		return err
	}
	defer rdb.Close()
	redis.SetLogger(quiet{})
	listener, err := net.Listen("tcp", cfg.Addr)
	if err != nil {
		return fmt.Errorf("MONITOR_ADDR: %w", err)
	}
	pages := asynqmon.New(asynqmon.Options{
		RedisConnOpt:     shared{rdb},
		ReadOnly:         cfg.ReadOnly,
		PayloadFormatter: asynqmon.PayloadFormatterFunc(func(_ string, data []byte) string { return cfg.shown(data) }),
		ResultFormatter:  asynqmon.ResultFormatterFunc(func(_ string, data []byte) string { return cfg.shown(data) }),
	})
	server := &http.Server{
		Handler:           protect(pages, cfg),
		ReadHeaderTimeout: 10 * time.Second,
		IdleTimeout:       2 * time.Minute,
		ErrorLog:          slog.NewLogLogger(log.Handler(), slog.LevelWarn),
	}
	log.Info("monitor started", "version", version(), "url", "http://"+listener.Addr().String())
	served := make(chan error, 1)
	go func() { served <- server.Serve(listener) }()
	if err := rdb.Ping(ctx).Err(); err != nil && ctx.Err() == nil {
		log.Warn("Redis does not answer; the pages show errors until it does", "error", err)
	}
	select {
	case err := <-served:
		return fmt.Errorf("serve: %w", err)
	case <-ctx.Done():
	}
	ctx, cancel := context.WithTimeout(context.Background(), shutdownTimeout)
	defer cancel()
	if err := server.Shutdown(ctx); err != nil {
		return fmt.Errorf("stop: %w", errors.Join(err, server.Close()))
	}
	log.Info("monitor stopped")
	return nil
}

// shared lets asynqmon use the client we have. It asks for one twice.
type shared struct{ rdb redis.UniversalClient }

func (s shared) MakeRedisClient() any { return s.rdb }

// quiet drops what go-redis says of connections that it replaces; the pages show
// the errors that matter.
type quiet struct{}

func (quiet) Printf(context.Context, string, ...any) {}

// buildVersion is set by -ldflags "-X main.buildVersion=…".
var buildVersion string

func version() string {
	if buildVersion != "" {
		return buildVersion
	}
	if info, ok := debug.ReadBuildInfo(); ok && info.Main.Version != "" && info.Main.Version != "(devel)" {
		return info.Main.Version
	}
	return "development"
}
