package cli

import (
	"bytes"
	"context"
	"io"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/carpool-go/carpool/tasks"
	"github.com/carpool-go/carpool/tasks/builtin"
	"github.com/carpool-go/carpool/worker/internal/workertest"
)

func TestMain(m *testing.M) {
	if os.Getenv(asStubborn) != "" {
		Program{Name: "stubborn", Commands: []any{new(stubbornCommands)}}.Main()
	}
	workertest.Main(m)
}

// bundle is what a test works with: servers of its own, and a worker to run on them.
type bundle struct{ *workertest.Bundle }

func setup(t *testing.T) *bundle {
	t.Helper()
	return &bundle{workertest.Setup(t)}
}

// run runs a command of the ready binary in this process, in the bundle's environment; env
// wins over it.
func (b *bundle) run(t *testing.T, env []string, args ...string) (stdout, stderr string, code int) {
	t.Helper()
	return b.runReading(t, strings.NewReader(""), env, args...)
}

// runReading is run with something to read.
func (b *bundle) runReading(t *testing.T, stdin io.Reader, env []string, args ...string) (stdout, stderr string, code int) {
	t.Helper()
	ready := Program{Name: "worker", Groups: []tasks.Group{new(builtin.Tasks)}, Env: environment(append(append([]string{}, b.Env...), env...))}
	return ready.runTo(t, stdin, args...)
}

// runTo runs a command to its end.
func (p Program) runTo(t *testing.T, stdin io.Reader, args ...string) (stdout, stderr string, code int) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	var out, errs bytes.Buffer
	code = p.Run(ctx, args, stdin, &out, &errs)
	if ctx.Err() != nil {
		t.Errorf("%q does not end", args)
	}
	return out.String(), errs.String(), code
}

// environment looks up variables in a list as a process has it, where the last one wins.
func environment(list []string) func(string) string {
	m := make(map[string]string)
	for _, entry := range list {
		name, value, _ := strings.Cut(entry, "=")
		m[name] = value
	}
	return variables(m)
}

// plain is a group that is a function, and so has no settings.
type plain func(*tasks.Set)

func (p plain) Register(s *tasks.Set) { p(s) }
