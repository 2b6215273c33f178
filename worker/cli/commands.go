package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"reflect"
	"strings"
	"text/tabwriter"

	"github.com/alecthomas/kong"

	"github.com/carpool-go/carpool/dbpool"
	"github.com/carpool-go/carpool/internal/startup"
	"github.com/carpool-go/carpool/tasks"
	"github.com/carpool-go/carpool/worker"
)

// run parses the arguments and runs the command.
func (in *invocation) run(ctx context.Context, args []string) (err error) {
	defer func() {
		switch p := recover().(type) {
		case nil:
		case helpShown:
			err = nil
		default:
			panic(p)
		}
	}()
	own, err := namesOf(new(runCmd))
	if err != nil {
		return err
	}
	if in.settings, err = newGroupSettings(in.Groups, own, in.Env, redact); err != nil {
		return programFault("the groups of tasks don't go together", err)
	}
	for _, own := range in.Commands {
		if v := reflect.ValueOf(own); v.Kind() != reflect.Pointer || v.IsNil() || v.Elem().Kind() != reflect.Struct {
			return programFault("the program's own commands can't be used", fmt.Errorf("%T: it must be a pointer to a struct", own))
		}
	}
	grammar := &commands{Plugins: in.Commands}
	grammar.Run.Groups, grammar.Config.Groups = in.settings.plugins(), in.settings.plugins()
	parser, err := newParser(grammar, in.Env,
		kong.Name(in.Name),
		kong.Vars{"name": in.Name},
		kong.Description("Background jobs from Redis, run on one shared pool of Postgres connections.\n\n"+
			"Every setting is a variable of the environment, and a flag of the same name that wins over it. "+
			"Flags are readable by everybody on the machine: a URL with a password goes into its variable."),
		kong.ConfigureHelp(kong.HelpOptions{Compact: true, WrapUpperBound: 100}),
		kong.Writers(in.stdout, in.stderr),
		kong.Exit(func(int) { panic(helpShown{}) }),
		kong.Bind(in),
		kong.BindTo(ctx, (*context.Context)(nil)),
	)
	if err != nil {
		return programFault("the program's own commands can't be used", err)
	}
	command, err := parser.Parse(args)
	if err != nil {
		return usageError{err}
	}
	if isOwn(command) {
		f := in.faults()
		f.list = in.settings.readVariables()
		if err := f.err(); err != nil {
			return err
		}
	}
	return command.Run()
}

// helpShown is what kong panics with, in place of ending the process, when it has shown
// the help.
type helpShown struct{}

// programFault is what only a programmer can mend, a line for each fault.
func programFault(what string, err error) error {
	return configError(what + ":\n  " + strings.Join(errorLines(err), "\n  "))
}

// isOwn reports whether the command is one of [Program.Commands].
func isOwn(command *kong.Context) bool {
	name, _, _ := strings.Cut(command.Command(), " ")
	_, builtIn := reflect.TypeFor[commands]().FieldByNameFunc(func(field string) bool {
		return strings.EqualFold(field, name)
	})
	return !builtIn
}

// kinds returns the set of the program's kinds.
func (in *invocation) kinds() (*tasks.Set, error) {
	set, err := worker.Kinds(in.Groups...)
	if err != nil {
		what := strings.TrimPrefix(err.Error(), "tasks: Register: ")
		return nil, programFault("the kinds of job don't go together", errors.New(what))
	}
	return set, nil
}

type kindsCmd struct{}

// Run prints the kinds.
func (kindsCmd) Run(in *invocation) error {
	set, err := in.kinds()
	if err != nil {
		return err
	}
	for i, kind := range set.Kinds() {
		task, err := set.Lookup(kind)
		if err != nil {
			return err
		}
		if i > 0 {
			fmt.Fprintln(in.stdout)
		}
		o := task.Options
		fmt.Fprintf(in.stdout, "%s   queue %s, %d retries, %s for each try\n", kind, o.Queue, o.MaxRetry, o.Timeout)
		w := tabwriter.NewWriter(in.stdout, 0, 0, 2, ' ', 0)
		for _, f := range task.Fields {
			optional := ""
			if f.Optional {
				optional = " (optional)"
			}
			fmt.Fprintf(w, "  %s\t%s\t%s%s\n", f.Name, f.Type, f.Doc, optional)
		}
		if err := w.Flush(); err != nil {
			return err
		}
		fmt.Fprintf(in.stdout, "  %s\n", in.exampleLine(task))
	}
	return nil
}

// exampleLine is a command that can be pasted into a shell.
func (in *invocation) exampleLine(task *tasks.Task) string {
	return fmt.Sprintf("%s enqueue %s '%s'", in.Name, task.Kind, strings.ReplaceAll(task.Example(), "'", `'\''`))
}

type migrateCmd struct {
	databaseSettings `embed:""`
	startupSettings  `embed:""`
	logSettings      `embed:""`
}

// Run brings the tables up to date, once the server is there.
func (m *migrateCmd) Run(ctx context.Context, in *invocation) error {
	if _, err := in.kinds(); err != nil {
		return err
	}
	f := in.faults()
	url := f.databaseURL(m.DatabaseURL)
	timeout := f.startup(m.startupSettings)
	level, format := f.log(m.logSettings)
	if err := f.err(); err != nil {
		return err
	}
	log := in.newLogger(level, format)
	db, err := dbpool.Open(ctx, dbpool.DefaultConfig(url))
	if err != nil {
		return err
	}
	defer db.Close()
	if err := startup.Wait(ctx, timeout, log, startup.Server{Variable: "DATABASE_URL", Check: db.Ping}); err != nil {
		return err
	}
	return worker.Migrate(ctx, url, log, in.Groups...)
}

type configCmd struct {
	runSettings `embed:""`
	Groups      kong.Plugins `embed:""`
}

// Run prints the settings, and then what is wrong with them.
func (c *configCmd) Run(in *invocation) error {
	w := tabwriter.NewWriter(in.stdout, 0, 0, 2, ' ', 0)
	printSettings(w, reflect.ValueOf(c.runSettings))
	in.settings.print(w)
	if err := w.Flush(); err != nil {
		return err
	}
	_, err := c.config(in)
	return err
}

// printSettings prints a line "NAME\tvalue" for every setting, secrets left out.
func printSettings(w io.Writer, settings reflect.Value) {
	for i := range settings.NumField() {
		field := settings.Type().Field(i)
		if field.Anonymous {
			printSettings(w, settings.Field(i))
			continue
		}
		name := field.Tag.Get("env")
		fmt.Fprintf(w, "%s\t%s\n", name, redact(name, settings.Field(i).String()))
	}
}

// redact is the value of a variable as it may be shown.
func redact(variable, value string) string {
	if strings.HasSuffix(variable, "_URL") {
		return redactURL(value)
	}
	return value
}

type versionCmd struct{}

// Run prints the version.
func (versionCmd) Run(in *invocation) error {
	_, err := fmt.Fprintln(in.stdout, in.Version)
	return err
}
