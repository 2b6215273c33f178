// Faults does the same harm to several connection pools and counts the
// statements that fail. It prints a table in Markdown.
package main

import (
	"bufio"
	"context"
	"database/sql"
	"encoding/json"
	"fmt"
	"io"
	"log"
	"log/slog"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	_ "github.com/jackc/pgx/v5/stdlib"

	"github.com/carpool-go/carpool/dbpool"
	"github.com/carpool-go/carpool/internal/servers"
)

const (
	idle       = 10               // connections when the fault comes
	statements = 15               // after it, one after another
	patience   = 3 * time.Second  // for each of them
	limit      = 40 * time.Second // for all of them, where patience has no hold
)

// result is what came of the statements after a fault.
type result struct {
	Failed      int      `json:"failed"`
	RecoveredMS *float64 `json:"recovered_ms"` // to the first that succeeded; nil if none did
}

func (r result) String() string {
	if r.RecoveredMS == nil {
		return fmt.Sprintf("%d, no recovery", r.Failed)
	}
	return fmt.Sprintf("%d, %.0f ms", r.Failed, *r.RecoveredMS)
}

// pool is one of those compared.
type pool struct {
	fill  func(n int) error
	run   func(n int) (result, error)
	close func()
}

// fault is done to the connections, or the server, of a pool that has them all
// idle.
type fault struct {
	name string
	do   func(ctx context.Context, s *servers.Postgres, p *proxy) error
}

func killAndRest(rest time.Duration) func(context.Context, *servers.Postgres, *proxy) error {
	return func(ctx context.Context, s *servers.Postgres, _ *proxy) error {
		conn, err := pgx.Connect(ctx, s.URL())
		if err != nil {
			return err
		}
		defer conn.Close(ctx)
		_, err = conn.Exec(ctx, `SELECT pg_terminate_backend(pid) FROM pg_stat_activity
			WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()`)
		time.Sleep(rest)
		return err
	}
}

var faults = []fault{
	{"10 backends killed, 0.2 s ago", killAndRest(200 * time.Millisecond)},
	{"10 backends killed, 2 s ago", killAndRest(2 * time.Second)},
	{"10 connections reset", func(_ context.Context, _ *servers.Postgres, p *proxy) error { p.reset(); return nil }},
	{"10 connections half-open, last used just before", func(_ context.Context, _ *servers.Postgres, p *proxy) error { p.lose(); return nil }},
	{"10 connections half-open, last used 2 s before", func(_ context.Context, _ *servers.Postgres, p *proxy) error {
		time.Sleep(2 * time.Second)
		p.lose()
		return nil
	}},
	{"server restarted", func(ctx context.Context, s *servers.Postgres, _ *proxy) error { return s.Restart(ctx, "fast") }},
}

func main() {
	if err := run(context.Background(), os.Stdout); err != nil {
		log.Fatal(err)
	}
}

func run(ctx context.Context, out io.Writer) error {
	server, err := servers.StartPostgres(ctx, servers.PostgresConfig{})
	if err != nil {
		return err
	}
	defer server.Stop()
	pools := []struct {
		name string
		open func(ctx context.Context, url string) (*pool, error)
	}{
		{"carpool", openCarpool},
		{"pgxpool", func(ctx context.Context, url string) (*pool, error) { return openPgxpool(ctx, url, false) }},
		{"pgxpool that pings each time", func(ctx context.Context, url string) (*pool, error) { return openPgxpool(ctx, url, true) }},
		{"database/sql with pgx", openStandard},
		{"SQLAlchemy QueuePool, pre-ping", openSQLAlchemy},
	}
	fmt.Fprintf(out, "Failed statements of %d, and the time to the first that succeeded:\n\n| fault |", statements)
	for _, p := range pools {
		fmt.Fprintf(out, " %s |", p.name)
	}
	fmt.Fprintf(out, "\n| --- |%s\n", strings.Repeat(" --- |", len(pools)))
	for _, f := range faults {
		fmt.Fprintf(out, "| %s |", f.name)
		for _, p := range pools {
			r, err := suffer(ctx, server, f, p.open)
			if err != nil {
				fmt.Fprintf(out, " (%v) |", err)
				continue
			}
			fmt.Fprintf(out, " %s |", r)
		}
		fmt.Fprintln(out)
	}
	return nil
}

func suffer(ctx context.Context, server *servers.Postgres, f fault, open func(context.Context, string) (*pool, error)) (result, error) {
	u, err := url.Parse(server.URL())
	if err != nil {
		return result{}, err
	}
	between, err := newProxy(u.Host)
	if err != nil {
		return result{}, err
	}
	defer between.close()
	u.Host = between.listener.Addr().String()
	p, err := open(ctx, u.String())
	if err != nil {
		return result{}, err
	}
	defer p.close()
	if err := p.fill(idle); err != nil {
		return result{}, err
	}
	if err := f.do(ctx, server, between); err != nil {
		return result{}, err
	}
	return p.run(statements)
}

// repeat runs statements one after another.
func repeat(n int, statement func(context.Context) error) (result, error) {
	var r result
	began := time.Now()
	for range n {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		err := statement(ctx)
		cancel()
		switch {
		case err != nil:
			r.Failed++
		case r.RecoveredMS == nil:
			ms := float64(time.Since(began)) / float64(time.Millisecond)
			r.RecoveredMS = &ms
		}
	}
	return r, nil
}

func openCarpool(ctx context.Context, url string) (*pool, error) {
	cfg := dbpool.DefaultConfig(url)
	cfg.Logger = slog.New(slog.DiscardHandler)
	p, err := dbpool.Open(ctx, cfg)
	if err != nil {
		return nil, err
	}
	return &pool{
		fill: func(n int) error {
			for range n {
				c, err := p.Acquire(ctx)
				if err != nil {
					return err
				}
				defer c.Release()
			}
			return nil
		},
		run: func(n int) (result, error) {
			return repeat(n, func(ctx context.Context) error { _, err := p.Exec(ctx, "SELECT 1"); return err })
		},
		close: p.Close,
	}, nil
}

func openPgxpool(ctx context.Context, url string, ping bool) (*pool, error) {
	cfg, err := pgxpool.ParseConfig(url)
	if err != nil {
		return nil, err
	}
	cfg.MaxConns = idle
	if ping {
		cfg.ShouldPing = func(context.Context, pgxpool.ShouldPingParams) bool { return true }
		cfg.PingTimeout = 2 * time.Second // as carpool's
	}
	p, err := pgxpool.NewWithConfig(ctx, cfg)
	if err != nil {
		return nil, err
	}
	return &pool{
		fill: func(n int) error {
			for range n {
				c, err := p.Acquire(ctx)
				if err != nil {
					return err
				}
				defer c.Release()
			}
			return nil
		},
		run: func(n int) (result, error) {
			return repeat(n, func(ctx context.Context) error { _, err := p.Exec(ctx, "SELECT 1"); return err })
		},
		close: func() { go p.Close() }, // it may take 15 s
	}, nil
}

func openStandard(ctx context.Context, url string) (*pool, error) {
	db, err := sql.Open("pgx", url)
	if err != nil {
		return nil, err
	}
	db.SetMaxOpenConns(idle)
	db.SetMaxIdleConns(idle)
	return &pool{
		fill: func(n int) error {
			for range n {
				c, err := db.Conn(ctx)
				if err != nil {
					return err
				}
				defer c.Close()
			}
			return nil
		},
		run: func(n int) (result, error) {
			return repeat(n, func(ctx context.Context) error { _, err := db.ExecContext(ctx, "SELECT 1"); return err })
		},
		close: func() { go db.Close() },
	}, nil
}

func openSQLAlchemy(_ context.Context, url string) (*pool, error) {
	const python = "/usr/bin/python3" // Debian's own, for which its packages are
	if err := exec.Command(python, "-c", "import sqlalchemy, psycopg2").Run(); err != nil {
		return nil, fmt.Errorf("python3-sqlalchemy and python3-psycopg2 are not installed")
	}
	_, here, _, _ := runtime.Caller(0)
	cmd := exec.Command(python, filepath.Join(filepath.Dir(here), "sqlalchemy_pool.py"))
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	lines := bufio.NewReader(stdout)
	ask := func(format string, args ...any) (r result, err error) {
		if _, err := fmt.Fprintf(in, format+"\n", args...); err != nil {
			return r, err
		}
		hung := time.AfterFunc(limit, func() { _ = cmd.Process.Kill() })
		defer hung.Stop()
		line, err := lines.ReadBytes('\n')
		if err != nil {
			return r, fmt.Errorf("no end within %s", limit)
		}
		return r, json.Unmarshal(line, &r)
	}
	if _, err := fmt.Fprintln(in, strings.Replace(url, "postgres://", "postgresql://", 1)); err != nil {
		return nil, err
	}
	return &pool{
		fill:  func(n int) error { _, err := ask("fill %d", n); return err },
		run:   func(n int) (result, error) { return ask("run %d", n) },
		close: func() { _ = cmd.Process.Kill(); _ = cmd.Wait() },
	}, nil
}
