package dbpool_test

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/carpool-go/carpool/dbpool"
	"github.com/carpool-go/carpool/internal/servers"
)

func TestUsage_CountsConnectionsThatDiedUnderTheirBorrower(t *testing.T) {
	t.Parallel()
	server := startServer(t, servers.PostgresConfig{})
	p := openOn(t, server.URL(), nil)
	other := openOn(t, server.URL(), nil)
	for _, c := range []struct {
		name string
		die  bool
		do   func(ctx context.Context, tx pgx.Tx) error
	}{
		{"nothing", false, func(context.Context, pgx.Tx) error { return nil }},
		{"a failure of its own", false, func(ctx context.Context, tx pgx.Tx) error {
			_, err := tx.Exec(ctx, "SELECT 1/0")
			return err
		}},
		{"an end of its own", false, func(ctx context.Context, tx pgx.Tx) error {
			_ = tx.Conn().Close(ctx)
			return errors.New("closed")
		}},
		{"terminated amid a statement", true, func(ctx context.Context, tx pgx.Tx) error {
			_, err := tx.Exec(ctx, "SELECT pg_terminate_backend(pg_backend_pid())")
			return err
		}},
		{"terminated between two statements", true, func(ctx context.Context, tx pgx.Tx) error {
			_, err := other.Exec(ctx, "SELECT pg_terminate_backend($1, 10000)", tx.Conn().PgConn().PID())
			return err // the commit fails
		}},
		{"a restart before the commit", true, func(ctx context.Context, _ pgx.Tx) error {
			return server.Restart(ctx, "immediate")
		}},
	} {
		ctx, borrower := p.Track(t.Context(), c.name)
		err := pgx.BeginFunc(ctx, p, func(tx pgx.Tx) error { return c.do(ctx, tx) })
		if died := borrower.End().Died; died > 0 != c.die || c.die && err == nil {
			t.Errorf("%s: %d died, error %v", c.name, died, err)
		}
	}
}

func TestIsAway_KnowsRefusalsAndEndingsButNotFailures(t *testing.T) {
	t.Parallel()
	server := startServer(t, servers.PostgresConfig{})
	p := openOn(t, server.URL(), nil)
	_, failure := p.Exec(t.Context(), "SELECT 1/0")
	_, ending := p.Exec(t.Context(), "SELECT pg_terminate_backend(pg_backend_pid())")
	small := openOn(t, server.URL(), func(c *dbpool.Config) { c.Size, c.MaxOverflow, c.Timeout = 1, 0, 3*time.Second })
	ctx, borrower := small.Track(t.Context(), "greedy")
	defer borrower.End()
	first, err := small.Acquire(ctx)
	if err != nil {
		t.Fatal(err)
	}
	defer first.Release()
	_, own := small.Acquire(ctx)
	_, others := small.Acquire(t.Context())
	if err := server.Stop(); err != nil {
		t.Fatal(err)
	}
	gone := openOn(t, server.URL(), func(c *dbpool.Config) { c.Timeout = time.Second })
	_, refusal := gone.Exec(t.Context(), "SELECT 1")
	for name, c := range map[string]struct {
		err  error
		away bool
	}{
		"nil":                              {nil, false},
		"a failed statement":               {failure, false},
		"a backend that was ended":         {ending, true},
		"a refused connection":             {refusal, true},
		"a full pool":                      {others, true},
		"a pool that is full of one's own": {own, false},
		"an error that has nothing to do with it all": {errors.New("no"), false},
	} {
		if got := dbpool.IsAway(c.err); got != c.away {
			t.Errorf("%s: %t, want %t: %v", name, got, c.away, c.err)
		}
	}
}
