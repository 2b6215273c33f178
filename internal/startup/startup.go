// Package startup waits for the servers that a program can't do without, since a deploy
// starts things in any order.
package startup

import (
	"context"
	"fmt"
	"log/slog"
	"time"

	"github.com/carpool-go/carpool/internal/wait"
)

// Server is one that is waited for.
type Server struct {
	// Variable is the setting that names it.
	Variable string
	// URL is its value. Errors show its hosts, and the names of the role and the database.
	URL string
	// Check returns nil once it is ready.
	Check func(context.Context) error
}

const (
	checkTimeout = 5 * time.Second
	firstPause   = 250 * time.Millisecond
	pauseCap     = 5 * time.Second
)

// Wait waits until every server's check passes, in turn, for the timeout at most, which
// all of them share. It doesn't wait for what no waiting mends: a refused password, a
// database that doesn't exist, a privilege that is missing. The error is as [Explain] makes
// it.
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
		if f := faultOf(s.URL, err); f != nil && f.forGood {
			err, _ = Explain(s.Variable, s.URL, err)
			return err
		}
		err = &explanation{oneLine(err.Error()), err}
		left := time.Until(giveUp)
		if left <= 0 {
			return &explanation{fmt.Sprintf("%s: not ready after %s: %v", s.Variable, timeout, err), err}
		}
		log.Warn("waiting for the server of "+s.Variable, "error", err, "giving_up_in", left.Round(time.Second).String())
		if err := wait.For(ctx, min(pause, left)); err != nil {
			return err
		}
	}
}
