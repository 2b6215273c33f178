package cli

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/alecthomas/kong"

	"github.com/carpool-go/carpool/internal/startup"
	"github.com/carpool-go/carpool/worker"
)

type runCmd struct {
	Burst bool `help:"Work off what is queued and due, then exit: for a cron job that pays for nothing else."`
	runSettings
	Groups kong.Plugins `embed:""`
}

// errLogged is the error of a command that has logged what went wrong.
var errLogged = errors.New("the error was logged")

// Run runs a worker until ctx ends, and then until it has stopped, a second signal comes,
// or stopping takes too long.
func (r *runCmd) Run(ctx context.Context, in *invocation) error {
	cfg, err := r.config(in)
	if err != nil {
		return err
	}
	level, format := in.faults().log(r.logSettings)
	log := in.newLogger(level, format)
	in.process.logRedis(log)
	for _, line := range in.misspelt() {
		log.Warn(line)
	}
	if r.Fetchers != "" {
		log.Warn("WORKER_FETCHERS has no effect any more: a worker fetches as many jobs at once as it has free slots")
	}
	cfg.Logger, cfg.Burst = log, r.Burst

	ended := make(chan error, 1)
	go func() { ended <- worker.Run(ctx, cfg) }()
	select {
	case err = <-ended:
	case <-ctx.Done():
		log.Info("stopping: no more jobs are fetched, those that run may finish", "signal", context.Cause(ctx).Error())
		if err = in.awaitEnd(ended, cfg.StopsWithin(), log); err == errLogged {
			return err
		}
	}
	switch {
	case err == nil:
		log.Info("worker stopped")
		return nil
	case ctx.Err() != nil:
		log.Info("stopped before it had started", "error", err)
		return nil
	default:
		if taken, ok := errors.AsType[*worker.ListenError](err); ok {
			err = fmt.Errorf("HEALTH_ADDR: %w; another address is set so, for example HEALTH_ADDR=127.0.0.1:8082, and with none, HEALTH_ADDR=, nothing is served", taken.Err)
		}
		err, _ = startup.Explain("DATABASE_URL", cfg.Pool.URL, err)
		log.Error("the worker has failed", "error", err)
		return errLogged
	}
}

// awaitEnd returns the worker's error when it has stopped, or errLogged when a further
// signal comes or the limit is over, before the platform ends the process with SIGKILL and
// without a word.
func (in *invocation) awaitEnd(ended <-chan error, limit time.Duration, log *slog.Logger) error {
	why := "a second signal"
	select {
	case err := <-ended:
		return err
	case <-in.process.secondSignal():
	case <-time.After(limit):
		why = "no end within " + limit.String()
	}
	log.Warn("stopped at once; jobs that ran are run again when their leases are over", "because_of", why)
	return errLogged
}
