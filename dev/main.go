// Dev is the program a newcomer runs: `go run ./dev` brings up Redis, Postgres, a worker and the monitor on this machine,
// shows what jobs do on real data, and stays until Ctrl-C, when everything it started is gone, files included.
//
// All that is in dev/tour. This program is what `go run` compiles before anything can be said, so it imports little: it is
// compiled in seconds, says that it compiles the rest, and becomes the tour.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/carpool-go/carpool/dev/internal/command"
)

func main() { command.Main(run) }

// run is the whole program but for its process: it returns the exit code, unless it becomes the tour.
func run(ctx context.Context, args []string, out, errOut io.Writer) int {
	opts, code, ok := command.Parse(args, errOut)
	if !ok {
		return code
	}
	folder, err := os.MkdirTemp("", "carpool-dev-programs-")
	if err != nil {
		return opts.ExitCode(err, errOut)
	}
	defer os.RemoveAll(folder)
	if err := compile(ctx, folder, out, errOut); err != nil {
		if ctx.Err() != nil {
			err = command.ErrStopped
		}
		return opts.ExitCode(err, errOut)
	}
	code, err = become(filepath.Join(folder, command.File("tour")), args, append(os.Environ(), command.Programs+"="+folder))
	if err != nil {
		return opts.ExitCode(err, errOut)
	}
	return code
}

// compile compiles the tour and the program that Render runs, together, as they share most of what they are made of.
func compile(ctx context.Context, folder string, out, errOut io.Writer) error {
	root, err := moduleRoot(ctx)
	if err != nil {
		return err
	}
	began := time.Now()
	said := make(chan struct{})
	slow := time.AfterFunc(2*time.Second, func() {
		defer close(said)
		fmt.Fprintln(out, "carpool: compiling; the first time takes a minute or two, and Go fetches what it needs …")
	})
	cmd := exec.CommandContext(ctx, "go", "build", "-o", folder+string(filepath.Separator), "-buildvcs=false", "./dev/tour", "./cmd/worker")
	cmd.Dir, cmd.Stdout, cmd.Stderr = root, out, errOut
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) }
	cmd.WaitDelay = 5 * time.Second
	err = cmd.Run()
	if !slow.Stop() {
		<-said
		if err == nil {
			fmt.Fprintf(out, "carpool: compiled in %s\n", command.Took(began))
		}
	}
	if err != nil {
		return fmt.Errorf("compile the tour and the worker: %w", err)
	}
	return nil
}

// moduleRoot finds the clone of carpool that we are in: the programs are compiled from there.
func moduleRoot(ctx context.Context) (string, error) {
	out, err := exec.CommandContext(ctx, "go", "env", "GOMOD").Output()
	if err != nil {
		return "", fmt.Errorf("ask go where the module is: %w", err)
	}
	root := filepath.Dir(strings.TrimSpace(string(out)))
	for _, folder := range []string{"cmd/worker", "dev/tour"} {
		if _, err := os.Stat(filepath.Join(root, folder)); err != nil {
			return "", errors.New("this is not a clone of carpool; run it in one: go run ./dev")
		}
	}
	return root, nil
}

// become replaces this process by the program. Where that is not possible, on Windows, it runs it and returns its exit code.
func become(path string, args, env []string) (code int, err error) {
	err = syscall.Exec(path, append([]string{path}, args...), env)
	if !errors.Is(err, errors.ErrUnsupported) {
		return 1, fmt.Errorf("start the tour: %w", err)
	}
	cmd := exec.Command(path, args...)
	cmd.Stdout, cmd.Stderr, cmd.Env = os.Stdout, os.Stderr, env
	if err := cmd.Run(); cmd.ProcessState == nil {
		return 1, fmt.Errorf("start the tour: %w", err)
	}
	return cmd.ProcessState.ExitCode(), nil
}
