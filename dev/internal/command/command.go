// Package command is the command line of `go run ./dev`, and what ends it. The program that compiles and the one that it
// becomes have them in common.
package command

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
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// Programs is the environment variable that tells the tour which folder its programs were compiled into.
const Programs = "CARPOOL_DEV_PROGRAMS"

// ErrStopped says that we were asked to stop before the tour was over. What that cut short is no fault.
var ErrStopped = errors.New("stopped before the tour was over")

const usage = `Usage: go run ./dev [-once] [-data DIR] [-install=false]

Brings up Redis, Postgres, a worker and the monitor on this machine, runs a tour of jobs on real data, and stays until Ctrl-C.
Everything it started is then gone, files included.

`

const environment = `
DATABASE_URL and REDIS_URL, if set, are used in place of servers of its own. The tour makes the tables
imports.seattle_weather and imports.seattle_weather_again there.

Postgres is taken from this machine. If there is none, its programs are downloaded into the cache folder, where they stay; if
that fails too, root has apt-get install it.
`

// Options are what the command line says.
type Options struct {
	Once    bool   // end after the tour
	Data    string // keep the data here; "" keeps nothing
	Install bool   // have apt-get install Postgres if there is no other way
}

// Parse reads the command line. If ok is false the program is to exit with code; what there is to say has been written.
func Parse(args []string, errOut io.Writer) (opts Options, code int, ok bool) {
	flags := flag.NewFlagSet("dev", flag.ContinueOnError)
	flags.SetOutput(errOut)
	flags.BoolVar(&opts.Once, "once", false, "run the tour and exit: 0 only if every job succeeded")
	flags.StringVar(&opts.Data, "data", "", "keep the data of Redis and Postgres in `DIR`")
	flags.BoolVar(&opts.Install, "install", true, "as root, have apt-get install Postgres if there is no other way")
	flags.Usage = func() {
		fmt.Fprint(errOut, usage)
		flags.PrintDefaults()
		fmt.Fprint(errOut, environment)
	}
	if err := flags.Parse(args); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			return opts, 0, false
		}
		return opts, 2, false
	}
	if flags.NArg() > 0 {
		fmt.Fprintf(errOut, "dev: %q is not understood; see: go run ./dev -help\n", flags.Arg(0))
		return opts, 2, false
	}
	return opts, 0, true
}

// ExitCode writes what went wrong, if anything did, and returns the program's exit code. To be stopped is the way to end
// unless it was to run once.
func (o Options) ExitCode(err error, errOut io.Writer) int {
	if err == nil || err == ErrStopped && !o.Once { // joined with another error, that one counts
		return 0
	}
	fmt.Fprintln(errOut, "dev:", err)
	return 1
}

// Main runs a program of `go run ./dev` until it ends or a signal comes, and ends the process with its exit code.
func Main(run func(ctx context.Context, args []string, out, errOut io.Writer) (code int)) {
	ctx, stop := UntilSignal()
	code := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	os.Exit(code)
}

// UntilSignal returns a context that ends at Ctrl-C, SIGTERM or SIGHUP, and if `go run`, which passes no signal on, is gone.
// A second signal ends the program at once; the servers' watchdogs then clean up.
func UntilSignal() (context.Context, context.CancelFunc) {
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

// File is the name of a program's file.
func File(program string) string {
	if runtime.GOOS == "windows" {
		program += ".exe"
	}
	return program
}

// Took says how long ago something began.
func Took(since time.Time) string { return fmt.Sprintf("%.1f s", time.Since(since).Seconds()) }
