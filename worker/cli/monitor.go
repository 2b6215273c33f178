package cli

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"strings"
	"time"

	"github.com/alecthomas/kong"

	"github.com/carpool-go/carpool/monitor"
)

// monitorAddress is where the monitor listens.
type monitorAddress struct {
	Addr string `env:"MONITOR_ADDR" default:"127.0.0.1:8080" group:"Monitor" help:"Where the monitor listens. An address that others can reach needs a password."`
}

type monitorCmd struct {
	monitorAddress `embed:""`

	User         string `env:"MONITOR_USER" default:"carpool" group:"Monitor" help:"The user of the login."`
	Password     string `env:"MONITOR_PASSWORD" placeholder:"…" group:"Monitor" help:"The password of the login; none, no login. Environment only."`
	ReadOnly     onOff  `env:"MONITOR_READ_ONLY" group:"Monitor" help:"Let nobody change anything."`
	ShowPayloads onOff  `env:"MONITOR_SHOW_PAYLOADS" group:"Monitor" help:"Show the values in payloads and results, not just the names of the fields."`

	redisSettings `embed:""`
}

// onOff is the text of a setting that is true or false, which as a flag needs no value.
type onOff string

// Decode implements [kong.MapperValue].
func (o *onOff) Decode(ctx *kong.DecodeContext) error {
	*o = "true"
	if ctx.Scan.Peek().Type == kong.FlagValueToken {
		*o = onOff(ctx.Scan.Pop().String())
	}
	return nil
}

// IsBool implements [kong.BoolMapperValue].
func (*onOff) IsBool() bool { return true }

// onOff reads a setting that is off unless it is set.
func (f *faults) onOff(name string, value onOff) bool {
	switch strings.ToLower(string(value)) {
	case "yes":
		return true
	case "", "no":
		return false
	}
	return f.boolean(name, string(value), "true")
}

// config reads the settings, but for the Redis that is to be opened.
func (m *monitorCmd) config(in *invocation) (monitor.Config, error) {
	f := in.faults()
	f.redisURL(m.RedisURL)
	if m.Password != f.env("MONITOR_PASSWORD") {
		f.list = append(f.list, "MONITOR_PASSWORD is given as a flag, "+flagsAreSeen)
	}
	wrong := len(f.list)
	host := f.hostPort("MONITOR_ADDR", m.Addr, "127.0.0.1:8080")
	if len(f.list) == wrong && !monitor.IsLoopback(host) && m.Password == "" {
		f.list = append(f.list, fmt.Sprintf("MONITOR_ADDR is %q, which others can reach, and MONITOR_PASSWORD is not set; set it, or listen on 127.0.0.1", m.Addr))
	}
	cfg := monitor.Config{
		User: m.User, Password: m.Password, Host: host,
		ReadOnly: f.onOff("MONITOR_READ_ONLY", m.ReadOnly), ShowPayloads: f.onOff("MONITOR_SHOW_PAYLOADS", m.ShowPayloads),
	}
	return cfg, f.err()
}

// monitorGrace is how long requests may go on when the monitor is to stop.
const monitorGrace = 5 * time.Second

// Run serves the monitor until ctx ends.
func (m *monitorCmd) Run(ctx context.Context, in *invocation) error {
	cfg, err := m.config(in)
	if err != nil {
		return err
	}
	log := slog.New(slog.NewJSONHandler(in.stderr, nil))
	rdb, err := m.open(in)
	if err != nil {
		return err
	}
	defer rdb.Close()
	cfg.Redis, cfg.Logger = rdb, log
	listener, err := net.Listen("tcp", m.Addr)
	if err != nil {
		return fmt.Errorf("MONITOR_ADDR: %w; another address is set so, for example MONITOR_ADDR=127.0.0.1:8081", err)
	}
	server := monitor.NewServer(cfg)
	log.Info("monitor started", "version", in.Version, "url", "http://"+listener.Addr().String())
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
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), monitorGrace)
	defer cancel()
	if err := server.Shutdown(ctx); err != nil {
		return fmt.Errorf("stop: %w", errors.Join(err, server.Close()))
	}
	log.Info("monitor stopped")
	return nil
}
