// Package startup waits for the servers that a program can't do without, since a deploy
// starts things in any order.
package startup

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/jackc/pgerrcode"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/redis/go-redis/v9"

	"github.com/carpool-go/carpool/internal/wait"
)

// Server is one that is waited for.
type Server struct {
	// Variable is the setting that names it.
	Variable string
	// Check returns nil once it is ready.
	Check func(context.Context) error
}

const (
	checkTimeout = 5 * time.Second
	firstPause   = 250 * time.Millisecond
	pauseCap     = 5 * time.Second
)

// Wait waits until every server's check passes, in turn, for the timeout at most, which
// all of them share. It doesn't wait for one that refuses the user or the password.
func Wait(ctx context.Context, timeout time.Duration, log *slog.Logger, servers ...Server) error {
	giveUp := time.Now().Add(timeout)
	for _, s := range servers {
		if err := s.await(ctx, giveUp, timeout, log); err != nil {
			return err
		}
	}
	return nil
}

func (s Server) await(ctx context.Context, giveUp time.Time, timeout time.Duration, log *slog.Logger) error {
	for pause := firstPause; ; pause = min(2*pause, pauseCap) {
		checkCtx, cancel := context.WithTimeout(ctx, checkTimeout)
		err := s.Check(checkCtx)
		cancel()
		if err == nil {
			return nil
		}
		if refuses(err) {
			return fmt.Errorf("%s: the server refuses this user or password: %w", s.Variable, err)
		}
		left := time.Until(giveUp)
		if left <= 0 {
			return fmt.Errorf("%s: not ready after %s: %w", s.Variable, timeout, err)
		}
		log.Warn("waiting for the server of "+s.Variable, "error", err, "giving_up_in", left.Round(time.Second).String())
		if err := wait.For(ctx, min(pause, left)); err != nil {
			return err
		}
	}
}

// refuses reports whether a server lets this user, or this password, not in.
func refuses(err error) bool {
	if e, ok := errors.AsType[*pgconn.PgError](err); ok {
		return e.Code == pgerrcode.InvalidPassword || e.Code == pgerrcode.InvalidAuthorizationSpecification
	}
	return redis.HasErrorPrefix(err, "WRONGPASS") || redis.HasErrorPrefix(err, "NOAUTH")
}
