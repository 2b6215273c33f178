// Package bench measures carpool side by side with what one would use in its
// stead. It is a module of its own, so that peers' dependencies don't reach the
// product.
package bench

import (
	"context"
	"database/sql"
	"fmt"
	"log/slog"
	"os"
	"testing"

	_ "github.com/jackc/pgx/v5/stdlib"

	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/carpool-go/carpool/dbpool"
	"github.com/carpool-go/carpool/internal/servers"
)

var databaseURL string

func TestMain(m *testing.M) {
	server, err := servers.StartPostgres(context.Background(), servers.PostgresConfig{})
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	databaseURL = server.URL()
	code := m.Run()
	if err := server.Stop(); err != nil {
		fmt.Fprintln(os.Stderr, err)
	}
	os.Exit(code)
}

// borrow acquires a connection, runs a statement on it if sql isn't "", and
// gives it back.
type borrow func(ctx context.Context, sql string) error

func carpool(b *testing.B, change func(*dbpool.Config)) borrow {
	cfg := dbpool.DefaultConfig(databaseURL)
	cfg.Logger = slog.New(slog.DiscardHandler)
	change(&cfg)
	p, err := dbpool.Open(b.Context(), cfg)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(p.Close)
	return func(ctx context.Context, sql string) error {
		c, err := p.Acquire(ctx)
		if err != nil {
			return err
		}
		defer c.Release()
		if sql != "" {
			_, err = c.Exec(ctx, sql)
		}
		return err
	}
}

func plain(b *testing.B, change func(*pgxpool.Config)) borrow {
	cfg, err := pgxpool.ParseConfig(databaseURL)
	if err != nil {
		b.Fatal(err)
	}
	change(cfg)
	p, err := pgxpool.NewWithConfig(b.Context(), cfg)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(p.Close)
	return func(ctx context.Context, sql string) error {
		c, err := p.Acquire(ctx)
		if err != nil {
			return err
		}
		defer c.Release()
		if sql != "" {
			_, err = c.Exec(ctx, sql)
		}
		return err
	}
}

func standard(b *testing.B) borrow {
	db, err := sql.Open("pgx", databaseURL)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { _ = db.Close() })
	return func(ctx context.Context, sql string) error {
		c, err := db.Conn(ctx)
		if err != nil {
			return err
		}
		defer c.Close()
		if sql != "" {
			_, err = c.ExecContext(ctx, sql)
		}
		return err
	}
}

func BenchmarkAcquire(b *testing.B) {
	for _, pool := range []struct {
		name string
		open func(*testing.B) borrow
	}{
		{"carpool", func(b *testing.B) borrow { return carpool(b, func(*dbpool.Config) {}) }},
		{"carpool_without_leak_stacks", func(b *testing.B) borrow {
			return carpool(b, func(c *dbpool.Config) { c.LeakAfter = 0 })
		}},
		{"carpool_without_check", func(b *testing.B) borrow {
			return carpool(b, func(c *dbpool.Config) { c.PrePing = false })
		}},
		{"carpool_without_either", func(b *testing.B) borrow {
			return carpool(b, func(c *dbpool.Config) { c.PrePing, c.LeakAfter = false, 0 })
		}},
		{"pgxpool", func(b *testing.B) borrow { return plain(b, func(*pgxpool.Config) {}) }},
		{"pgxpool_that_pings", func(b *testing.B) borrow {
			return plain(b, func(c *pgxpool.Config) {
				c.ShouldPing = func(context.Context, pgxpool.ShouldPingParams) bool { return true }
			})
		}},
		{"database_sql", standard},
	} {
		for _, statement := range []string{"", "SELECT 1"} {
			name := pool.name
			if statement != "" {
				name += "/with_SELECT_1"
			}
			b.Run(name, func(b *testing.B) {
				do := pool.open(b)
				if err := do(b.Context(), "SELECT 1"); err != nil {
					b.Fatal(err)
				}
				b.ReportAllocs()
				for b.Loop() {
					if err := do(b.Context(), statement); err != nil {
						b.Fatal(err)
					}
				}
			})
		}
	}
}
