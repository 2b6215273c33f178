// Dev is the program a newcomer runs: `go run ./dev` brings up Redis, Postgres, a worker and the monitor on this machine,
// shows what jobs do on real data, and stays until Ctrl-C, when everything it started is gone, files included.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

const usage = `Usage: go run ./dev [-once] [-data DIR]

Brings up Redis, Postgres, a worker and the monitor on this machine, runs a tour of jobs on real data, and stays until Ctrl-C.
Everything it started is then gone, files included.

`

const environment = `
DATABASE_URL and REDIS_URL, if set, are used in place of servers of its own. The tour makes the tables
imports.seattle_weather and imports.seattle_weather_again there.
`

func main() {
	ctx, stop := untilSignal()
	code := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	os.Exit(code)
}

// options are what the command line says.
type options struct {
	once bool   // end after the tour
	data string // keep the data here; "" keeps nothing
}

// run is the whole program but for its process: it returns the exit code.
func run(ctx context.Context, args []string, out, errOut io.Writer) int {
	var opts options
	flags := flag.NewFlagSet("dev", flag.ContinueOnError)
	flags.SetOutput(errOut)
	flags.BoolVar(&opts.once, "once", false, "run the tour and exit: 0 only if every job succeeded")
	flags.StringVar(&opts.data, "data", "", "keep the data of Redis and Postgres in `DIR`")
	flags.Usage = func() {
		fmt.Fprint(errOut, usage)
		flags.PrintDefaults()
		fmt.Fprint(errOut, environment)
	}
	if err := flags.Parse(args); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			return 0
		}
		return 2
	}
	if flags.NArg() > 0 {
		fmt.Fprintf(errOut, "dev: %q is not understood; see: go run ./dev -help\n", flags.Arg(0))
		return 2
	}
	err := show(ctx, opts, out)
	switch {
	case err == nil:
		return 0
	case err == errStopped && !opts.once:
		return 0
	default:
		fmt.Fprintln(errOut, "dev:", err)
		return 1
	}
}

// errStopped says that we were asked to stop before the tour was over. What that cut short is no fault.
var errStopped = errors.New("stopped before the tour was over")

// show brings everything up, gives the tour, and stays until the context ends, unless it is to run once.
func show(ctx context.Context, opts options, out io.Writer) (err error) {
	began := time.Now()
	s, err := newStack(ctx)
	if err != nil {
		return err
	}
	defer func() {
		if downErr := s.bringDown(); downErr != nil {
			err = errors.Join(err, downErr)
			return
		}
		what := "everything that was started is gone, files included"
		if opts.data != "" {
			what = "everything that was started is gone; the data is kept in " + opts.data
		}
		fmt.Fprintf(out, "\ncarpool: %s.\n", what)
	}()
	fmt.Fprintln(out, "carpool: bringing everything up on this machine. Ctrl-C ends it all.")
	err = s.bringUp(ctx, opts, out)
	if err == nil {
		fmt.Fprintf(out, "  all up after %s\n", took(began))
		err = giveTour(ctx, s, out)
	}
	if ctx.Err() != nil {
		return errStopped
	}
	if err != nil || opts.once {
		return err
	}
	s.printWhatToTry(out)
	s.log.follow(out)
	select {
	case <-ctx.Done():
		return nil
	case <-s.worker.Done():
		return fmt.Errorf("the worker has ended: %w", s.worker.Err())
	case <-s.monitor.Done():
		return fmt.Errorf("the monitor has ended: %w", s.monitor.Err())
	}
}

// untilSignal returns a context that ends at Ctrl-C, SIGTERM or SIGHUP, and if `go run`, which passes no signal on, is gone.
// A second signal ends the program at once; the servers' watchdogs then clean up.
func untilSignal() (context.Context, context.CancelFunc) {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)
	context.AfterFunc(ctx, stop)
	if parent := os.Getppid(); isGo(parent) {
		go func() {
			tick := time.NewTicker(200 * time.Millisecond)
			defer tick.Stop()
			for {
				select {
				case <-ctx.Done():
					return
				case <-tick.C:
					if os.Getppid() != parent {
						stop()
					}
				}
			}
		}()
	}
	return ctx, stop
}

// isGo reports whether the process is the go command.
func isGo(pid int) bool {
	name, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "comm"))
	if err != nil {
		name, err = exec.Command("ps", "-o", "comm=", "-p", strconv.Itoa(pid)).Output()
	}
	return err == nil && filepath.Base(strings.TrimSpace(string(name))) == "go"
}

func took(since time.Time) string { return fmt.Sprintf("%.1f s", time.Since(since).Seconds()) }
