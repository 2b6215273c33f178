// Tour is what `go run ./dev` becomes once it is compiled: it brings up everything on this machine, shows what jobs do on
// real data, and stays until it is stopped.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/carpool-go/carpool/dev/internal/command"
)

func main() { command.Main(run) }

// run is the whole program but for its process: it returns the exit code.
func run(ctx context.Context, args []string, out, errOut io.Writer) int {
	opts, code, ok := command.Parse(args, errOut)
	if !ok {
		return code
	}
	return opts.ExitCode(show(ctx, opts, out), errOut)
}

// show brings everything up, gives the tour, and stays until the context ends, unless it is to run once.
func show(ctx context.Context, opts command.Options, out io.Writer) (err error) {
	began := time.Now()
	s, err := newStack()
	if err != nil {
		return err
	}
	defer func() {
		if downErr := s.bringDown(); downErr != nil {
			err = errors.Join(err, downErr)
			return
		}
		what := "everything that was started is gone, files included"
		if s.keepsData() {
			what = "everything that was started is gone; the data is kept in " + opts.Data
		}
		fmt.Fprintf(out, "\ncarpool: %s.\n", what)
	}()
	fmt.Fprintln(out, "carpool: bringing everything up on this machine. Ctrl-C ends it all.")
	err = s.bringUp(ctx, opts, out)
	if err == nil {
		fmt.Fprintf(out, "  all up after %s\n", command.Took(began))
		err = giveTour(ctx, s, out)
	}
	if ctx.Err() != nil {
		return command.ErrStopped
	}
	if err != nil || opts.Once {
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
