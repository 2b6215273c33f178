// Package cli is the command line of a worker: of the ready one, and of any program with
// tasks of its own. Such a program's whole main is
//
//	func main() { cli.Main(&builtin.Tasks{}, &shop.Tasks{}) }
//
// after which its commands migrate, run, enqueue, status and all the others work.
//
// What is the process's own is this package's alone: signals, the exit code, the
// environment, and the log of go-redis. Package worker touches none of it.
package cli

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime/debug"
	"strings"

	"github.com/alecthomas/kong"

	"github.com/carpool-go/carpool/scheduler"
	"github.com/carpool-go/carpool/tasks"
)

// Program is a command line with the tasks that it knows. The zero value knows none but
// those that every worker has.
type Program struct {
	// Name is what the program calls itself; "" is the name of its file.
	Name string
	// Version is shown by the command version and in the log; "" is what -ldflags has set
	// (see [Main]), or else the commit or the version that the go command has built in.
	Version string
	// Groups are its kinds of job, with their settings; see [tasks.Group].
	Groups []tasks.Group
	// Schedules are entries that it brings along.
	Schedules []scheduler.Entry
	// Commands are further commands: pointers to structs whose fields with the tag cmd are
	// commands as github.com/alecthomas/kong has them. Their Run methods may take a
	// context.Context, and find the groups' settings read from their variables.
	Commands []any
	// Env looks up a variable of the environment, "" for one that isn't set; nil is
	// os.Getenv.
	Env func(string) string
	// Environ lists the variables as os.Environ does, so that those are named that look like
	// a misspelt setting; nil is os.Environ if Env is nil too, and else none.
	Environ func() []string

	process *process // nil unless Main runs it
}

const (
	exitFailed = 1 // something went wrong while it worked
	exitUsage  = 2 // the command line or the settings are wrong
)

// buildVersion is set by -ldflags "-X github.com/carpool-go/carpool/worker/cli.buildVersion=…".
var buildVersion string

// commands is the command line.
type commands struct {
	Run      runCmd      `cmd:"" default:"withargs" help:"Pull jobs and run them until SIGTERM or SIGINT. This is the default."`
	Enqueue  enqueueCmd  `cmd:"" help:"Put a job on its queue and print its id."`
	Cancel   cancelCmd   `cmd:"" help:"Cancel a job: one that waits is removed, one that runs is stopped and not run again."`
	Archive  archiveCmd  `cmd:"" help:"Jobs that were given up: look at them, put them back, delete them."`
	Outbox   outboxCmd   `cmd:"" help:"Jobs that are still in the outbox: look at them, let a worker try them again, delete them."`
	Pause    pauseCmd    `cmd:"" help:"Keep workers from fetching jobs of a queue. Jobs that run go on."`
	Resume   resumeCmd   `cmd:"" help:"Let workers fetch jobs of a paused queue again."`
	Schedule scheduleCmd `cmd:"" help:"Jobs that go by the clock: look at them, change them."`
	Status   statusCmd   `cmd:"" help:"Show the instances, the queues and the outbox."`
	Monitor  monitorCmd  `cmd:"" help:"Show the queues in a browser."`
	Health   healthCmd   `cmd:"" help:"Ask the worker at HEALTH_ADDR whether it is ready: for the health check of a container."`
	Kinds    kindsCmd    `cmd:"" help:"Show the kinds of job, the fields of their payloads, and an example of each."`
	Migrate  migrateCmd  `cmd:"" help:"Bring carpool's tables in the database up to date."`
	Doctor   doctorCmd   `cmd:"" help:"Examine the settings, both servers and the jobs in them: what is wrong, and the way out."`
	Config   configCmd   `cmd:"" help:"Show the settings that are in effect, with secrets left out."`
	Version  versionCmd  `cmd:"" help:"Show the version."`

	Completion completionCmd `cmd:"" help:"Print what lets a shell complete commands, flags and kinds of job."`

	globalFlags
	kong.Plugins // the program's own
}

// globalFlags are the flags of every command.
type globalFlags struct {
	ShowVersion kong.VersionFlag `name:"version" help:"Show the version."`
}

// invocation is one call of the program: what its commands work with.
type invocation struct {
	Program
	settings       *groupSettings
	variables      []string // that any command reads, sorted
	stdin          io.Reader
	stdout, stderr io.Writer
}

// Run runs one command line, without the program's name, until it has ended or ctx ends
// it. It returns the exit code. It changes nothing of the process, so that programs may run
// side by side, each with groups of its own.
func (p Program) Run(ctx context.Context, args []string, stdin io.Reader, stdout, stderr io.Writer) (exitCode int) {
	p.Name = cmp.Or(p.Name, strings.TrimSuffix(filepath.Base(os.Args[0]), ".exe"))
	p.Version = cmp.Or(p.Version, version())
	if p.Env == nil {
		p.Env = os.Getenv
		if p.Environ == nil {
			p.Environ = os.Environ
		}
	}
	in := &invocation{Program: p, stdin: stdin, stdout: stdout, stderr: stderr}
	err := in.run(ctx, args)
	switch {
	case err == nil:
		return 0
	case !errors.Is(err, errLogged):
		fmt.Fprintf(stderr, "%s: %s\n", p.Name, linesOf(err))
	}
	if wrong, ok := errors.AsType[usageError](err); ok {
		fmt.Fprintf(stderr, "Try: %s --help\n", wrong.command)
		return exitUsage
	}
	if _, wrong := errors.AsType[configError](err); wrong {
		in.printMisspelt() // it may be why
		return exitUsage
	}
	return exitFailed
}

// linesOf is the text of an error without what would move the cursor: it may name what others
// have written into Redis or the database.
func linesOf(err error) string {
	lines := strings.Split(err.Error(), "\n")
	for i, line := range lines {
		lines[i] = oneLine(line)
	}
	return strings.Join(lines, "\n")
}

// usageError is a command line that can't be understood. Its command is as much of it as
// names a command, with the program's name.
type usageError struct {
	error
	command string
}

// version is that of the program's main module.
func version() string {
	if buildVersion != "" {
		return buildVersion
	}
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return unknownVersion
	}
	for _, s := range info.Settings {
		if s.Key == "vcs.revision" {
			return s.Value[:min(12, len(s.Value))]
		}
	}
	if v := info.Main.Version; v != "" && v != "(devel)" {
		return v
	}
	return unknownVersion
}

// unknownVersion is that of a program that was built without one, as by go run.
const unknownVersion = "development"
