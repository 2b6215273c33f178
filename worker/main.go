// Worker runs background jobs from Redis on one shared pool of Postgres
// connections. See `worker --help`.
package main

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/alecthomas/kong"

	"github.com/carpool-go/carpool/tasks"
	"github.com/carpool-go/carpool/tasks/builtin"
	"github.com/carpool-go/carpool/tasks/maintenance"
)

const (
	exitFailed = 1 // something went wrong while it worked
	exitUsage  = 2 // the command line or the settings are wrong
)

type cli struct {
	Run      runCmd      `cmd:"" default:"withargs" help:"Pull jobs and run them until SIGTERM or SIGINT. This is the default."`
	Enqueue  enqueueCmd  `cmd:"" help:"Put a job on its queue and print its id."`
	Cancel   cancelCmd   `cmd:"" help:"Cancel a job: one that waits is removed, one that runs is stopped and not run again."`
	Archive  archiveCmd  `cmd:"" help:"Jobs that were given up: look at them, put them back, delete them."`
	Schedule scheduleCmd `cmd:"" help:"Jobs that go by the clock: look at them, change them."`
	Status   statusCmd   `cmd:"" help:"Show the instances, the queues and the outbox."`
	Kinds    kindsCmd    `cmd:"" help:"Show the kinds of job, the fields of their payloads, and an example of each."`
	Migrate  migrateCmd  `cmd:"" help:"Bring carpool's tables in the database up to date."`
	Config   configCmd   `cmd:"" help:"Show the settings that are in effect, with secrets left out."`
	Version  versionCmd  `cmd:"" help:"Show the version."`
}

func main() { os.Exit(program(os.Args[1:], allKinds)) }

// kindsOf makes the set of kinds that a program knows, of these groups among others.
type kindsOf func(*builtin.Tasks, *maintenance.Tasks) *tasks.Set

func allKinds(b *builtin.Tasks, m *maintenance.Tasks) *tasks.Set { return tasks.NewSet(b, m) }

// set is for commands that run none of the kinds.
func (kinds kindsOf) set() *tasks.Set { return kinds(new(builtin.Tasks), new(maintenance.Tasks)) }

// program is the command line with the kinds it works with; it returns the exit
// code.
func program(args []string, kinds kindsOf) int {
	unsetEmpty()
	if os.Getenv(appName) == "" {
		_ = os.Setenv(appName, "carpool")
	}
	parser, err := kong.New(new(cli),
		kong.Bind(kinds),
		kong.Name("worker"),
		kong.Description("Background jobs from Redis, run on one shared pool of Postgres connections.\n\n"+
			"Every setting is a variable of the environment, and a flag of the same name that wins over it. "+
			"Flags are readable by everybody on the machine: a URL with a password goes into its variable."),
		kong.UsageOnError(),
		kong.ConfigureHelp(kong.HelpOptions{Compact: true, WrapUpperBound: 100}),
	)
	if err != nil {
		panic(err) // the declarations above are wrong
	}
	ctx, err := parser.Parse(args)
	if err != nil {
		fmt.Fprintf(os.Stderr, "worker: %v\nTry: worker --help\n", err)
		return exitUsage
	}
	if err := ctx.Run(); err != nil {
		if !errors.Is(err, errLogged) {
			fmt.Fprintf(os.Stderr, "worker: %v\n", err)
		}
		if _, wrong := errors.AsType[configError](err); wrong {
			return exitUsage
		}
		return exitFailed
	}
	return 0
}

// appName is Postgres' own variable for what pg_stat_activity shows, unless the
// URL says something else.
const appName = "PGAPPNAME"

// unsetEmpty makes a variable that is set to nothing count as not set, as a
// blank line in a dashboard's form is meant.
func unsetEmpty() {
	for _, entry := range os.Environ() {
		if name, value, _ := strings.Cut(entry, "="); value == "" {
			_ = os.Unsetenv(name)
		}
	}
}
