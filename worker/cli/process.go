package cli

import (
	"context"
	"log/slog"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/carpool-go/carpool/tasks"
)

// process is what is the whole process's, so that only [Main] has it. The nil one is for a
// program that is run inside another: it hears no signals, and leaves go-redis' log alone.
type process struct {
	// further brings the signal after the first, which ends the context, unless it is the
	// same: see sameSignal.
	further chan os.Signal
}

const (
	// appName is Postgres' own variable for what pg_stat_activity shows, unless the
	// URL says something else.
	appName = "PGAPPNAME"
	// sameSignal is how long after the first signal a further one is taken for the same:
	// timeout(1), and a terminal with a shell or a supervisor between, signal the process
	// and its group.
	sameSignal = time.Second
	// lastWords is how long a command that listens for the second signal has to log it.
	lastWords = time.Second
)

// Main is a whole main function for a program with these groups of tasks. It doesn't
// return: it exits with 0, with 1 if something went wrong, or with 2 if the command line or
// the settings are wrong.
//
// The first SIGTERM or SIGINT ends what it does, gracefully; one that comes a second later,
// or after that, at once. The version is set with
//
//	go build -ldflags "-X github.com/carpool-go/carpool/worker/cli.buildVersion=v1.2.3"
func Main(groups ...tasks.Group) {
	Program{Groups: groups}.Main()
}

// Main is [Main] for a program with more than groups.
func (p Program) Main() {
	if os.Getenv(appName) == "" {
		_ = os.Setenv(appName, "carpool")
	}
	ctx, cancel := context.WithCancelCause(context.Background())
	p.process = &process{further: make(chan os.Signal, 1)}
	signals := make(chan os.Signal, 2)
	signal.Notify(signals, syscall.SIGTERM, syscall.SIGINT)
	go func() {
		cancel(signalError{<-signals})
		for first := time.Now(); ; {
			further := <-signals
			if time.Since(first) > sameSignal {
				p.process.further <- further
				break
			}
		}
		time.Sleep(lastWords)
		os.Exit(exitFailed)
	}()
	os.Exit(p.Run(ctx, os.Args[1:], os.Stdin, os.Stdout, os.Stderr))
}

// signalError is the cause of a context that a signal has ended.
type signalError struct{ os.Signal }

func (e signalError) Error() string { return e.String() }

// secondSignal brings a signal when a second one has come.
func (p *process) secondSignal() <-chan os.Signal {
	if p == nil {
		return nil
	}
	return p.further
}

// logRedis lets go-redis log to log.
func (p *process) logRedis(log *slog.Logger) {
	if p != nil {
		redis.SetLogger(redisLog{log})
	}
}
