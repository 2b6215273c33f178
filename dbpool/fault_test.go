package dbpool_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/carpool-go/carpool/dbpool"
	"github.com/carpool-go/carpool/internal/servers"
	"github.com/carpool-go/carpool/internal/testservers"
)

// startServer starts a Postgres that the test may break.
func startServer(t *testing.T, cfg servers.PostgresConfig) *servers.Postgres {
	t.Helper()
	server, err := servers.StartPostgres(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := server.Stop(); err != nil {
			t.Error(err)
		}
	})
	return server
}

func openOn(t *testing.T, databaseURL string, change func(*dbpool.Config)) *dbpool.Pool {
	t.Helper()
	cfg := dbpool.DefaultConfig(databaseURL)
	cfg.Logger = slog.New(slog.DiscardHandler)
	if change != nil {
		change(&cfg)
	}
	p, err := dbpool.Open(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.Close)
	return p
}

// mustWork runs statements of which none may fail.
func mustWork(t *testing.T, p *dbpool.Pool, after string) {
	t.Helper()
	for range 20 {
		if _, err := p.Exec(t.Context(), "SELECT 1"); err != nil {
			t.Errorf("after %s: %v", after, err)
			return
		}
	}
}

func TestPool_SurvivesWhatHappensToTheServer(t *testing.T) {
	t.Parallel()
	for _, tls := range []bool{false, true} {
		t.Run(fmt.Sprintf("TLS %v", tls), func(t *testing.T) {
			t.Parallel()
			server := startServer(t, servers.PostgresConfig{TLS: tls})
			p := openOn(t, server.URL(), func(c *dbpool.Config) { c.PingTimeout = 500 * time.Millisecond })
			if encrypted := isEncrypted(t, p); encrypted != tls {
				t.Fatalf("the connection is encrypted: %v", encrypted)
			}
			for _, idle := range []time.Duration{0, 20 * time.Millisecond, 1200 * time.Millisecond} {
				fill(t, p, 10)
				killAll(t, p)
				time.Sleep(idle) // pgxpool tells dead connections by it
				mustWork(t, p, fmt.Sprintf("all backends were killed and %s of rest", idle))
			}
			for _, mode := range []string{"fast", "immediate"} {
				fill(t, p, 10)
				if err := server.Restart(t.Context(), mode); err != nil {
					t.Fatal(err)
				}
				mustWork(t, p, "a restart, "+mode)
			}

			fill(t, p, 10)
			if err := server.Pause(); err != nil {
				t.Fatal(err)
			}
			late := errors.New("too late")
			ctx, cancel := context.WithTimeoutCause(t.Context(), 2*time.Second, late)
			defer cancel()
			c := acquire(t, p) // it is quiet, as far as anybody can know
			if _, err := c.Exec(ctx, "SELECT 1"); err == nil {
				t.Error("a stopped server has answered")
			}
			c.Release()
			if err := server.Resume(); err != nil {
				t.Fatal(err)
			}
			mustWork(t, p, "the server was stopped for a while")
			p.Close()

			url, proxy := testservers.ThroughProxy(t, server.URL())
			p = openOn(t, url, func(c *dbpool.Config) { c.PingIdle, c.PingTimeout = 0, 500*time.Millisecond })
			fill(t, p, 10)
			proxy.Reset()
			mustWork(t, p, "the network has reset all connections")
			fill(t, p, 10)
			losePing(t, p, proxy)
			mustWork(t, p, "the network was away")
		})
	}
}

func isEncrypted(t *testing.T, p *dbpool.Pool) (encrypted bool) {
	t.Helper()
	if err := p.QueryRow(t.Context(), "SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()").Scan(&encrypted); err != nil {
		t.Fatal(err)
	}
	return encrypted
}

func TestPool_ConnectionsThatHaveBecomeReadOnlyAreReplaced(t *testing.T) {
	t.Parallel()
	p := open(t, func(c *dbpool.Config) { c.Size = 3 })
	if _, err := p.Exec(t.Context(), "CREATE TABLE t (n int)"); err != nil {
		t.Fatal(err)
	}
	fill(t, p, 3)
	// What a failover does to the connections it leaves behind: they answer, and
	// refuse to write. The setting reaches the pool as a failover would, with what
	// the server says of itself.
	var held []*dbpool.Conn
	for range 3 {
		c := acquire(t, p)
		if _, err := c.Exec(t.Context(), "SET default_transaction_read_only = on"); err != nil {
			t.Fatal(err)
		}
		held = append(held, c)
	}
	for _, c := range held {
		c.Release()
	}
	for range 10 {
		if _, err := p.Exec(t.Context(), "INSERT INTO t VALUES (1)"); err != nil {
			t.Fatalf("a read-only connection was lent: %v", err)
		}
	}
	// Each is closed in the background.
	testservers.Eventually(t, "all three are closed", func() bool { return p.Stats().Counts.ClosedBroken >= 3 })
	if s := p.Stats(); s.Counts.ClosedBroken != 3 {
		t.Errorf("%+v", s)
	}
}

func TestPool_ServerWithoutRoomIsAnErrorThatSaysSo(t *testing.T) {
	t.Parallel()
	server := startServer(t, servers.PostgresConfig{Settings: map[string]string{"max_connections": "6", "superuser_reserved_connections": "1"}})
	admin, err := pgx.Connect(t.Context(), server.URL())
	if err != nil {
		t.Fatal(err)
	}
	defer admin.Close(context.Background())
	role := "carpool_tenant"
	if _, err := admin.Exec(t.Context(), "CREATE ROLE "+role+" LOGIN PASSWORD 'open sesame'"); err != nil {
		t.Fatal(err)
	}
	u := testservers.ParseURL(t, server.URL())
	u.User = url.UserPassword(role, "open sesame")
	p := openOn(t, u.String(), func(c *dbpool.Config) { c.Timeout = time.Second })
	var held []*dbpool.Conn
	for {
		c, err := p.Acquire(t.Context())
		if err != nil {
			if e, ok := errors.AsType[*pgconn.PgError](err); !ok || e.Code != "53300" || strings.Contains(err.Error(), "sesame") {
				t.Errorf("error %v, want too_many_connections and no password", err)
			}
			break
		}
		held = append(held, c)
	}
	if len(held) != 4 { // 6, less one reserved and ours
		t.Errorf("%d connections were lent", len(held))
	}
	held[0].Release()
	mustWork(t, p, "a connection was given back")

	// A password that is changed cuts nobody off, and is named when it matters.
	if _, err := admin.Exec(t.Context(), "ALTER ROLE "+role+" PASSWORD 'new'"); err != nil {
		t.Fatal(err)
	}
	mustWork(t, p, "the password was changed")
	for _, c := range held {
		c.Release()
	}
	killOthers(t, admin)
	_, err = p.Exec(t.Context(), "SELECT 1")
	if e, ok := errors.AsType[*pgconn.PgError](err); !ok || e.Code != "28P01" || strings.Contains(err.Error(), "sesame") {
		t.Errorf("error %v, want invalid_password and no password", err)
	}
}

func TestPool_ServerThatTurnsReadOnlyAndBackLeavesNoReadOnlyConnectionBehind(t *testing.T) {
	t.Parallel()
	server := startServer(t, servers.PostgresConfig{})
	p := openOn(t, server.URL(), nil)
	if _, err := p.Exec(t.Context(), "CREATE TABLE t (n int)"); err != nil {
		t.Fatal(err)
	}
	admin, err := pgx.Connect(t.Context(), server.URL())
	if err != nil {
		t.Fatal(err)
	}
	defer admin.Close(context.Background())
	turn := func(readOnly string) {
		t.Helper()
		for _, statement := range []string{
			"SET default_transaction_read_only = off", // this session's own
			"ALTER SYSTEM SET default_transaction_read_only = " + readOnly,
			"SELECT pg_reload_conf()",
		} {
			if _, err := admin.Exec(t.Context(), statement); err != nil {
				t.Fatal(err)
			}
		}
	}
	insert := func() error { _, err := p.Exec(t.Context(), "INSERT INTO t VALUES (1)"); return err }

	fill(t, p, 5)
	turn("on")
	testservers.Eventually(t, "the server takes no writes", func() bool { return insert() != nil })
	e, ok := errors.AsType[*pgconn.PgError](insert())
	if !ok || e.Code != "25006" {
		t.Errorf("while the server takes no writes: %v", e)
	}
	turn("off")
	testservers.Eventually(t, "the server takes writes", func() bool { return insert() == nil })
	for range 20 {
		if err := insert(); err != nil {
			t.Errorf("a read-only connection was lent: %v", err)
		}
	}
}
