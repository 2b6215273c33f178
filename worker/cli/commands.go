package cli

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"reflect"
	"slices"
	"strings"
	"text/tabwriter"

	"github.com/alecthomas/kong"

	"github.com/carpool-go/carpool/internal/limit"
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
	own, err := namesOf(new(runCmd), new(configCmd), new(doctorCmd), new(monitorCmd), new(globalFlags))
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
	grammar.Run.Groups, grammar.Config.Groups, grammar.Doctor.Groups = in.settings.plugins(), in.settings.plugins(), in.settings.plugins()
	parser, err := newParser(grammar, in.Env,
		kong.Name(in.Name),
		kong.Vars{"name": in.Name, "version": in.Version},
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
	in.variables = in.settingsOfAll(parser.Model)
	command, err := parser.Parse(args)
	if err != nil {
		return usageError{err, in.commandOf(err, args)}
	}
	if isOwn(command) {
		f := in.faults()
		f.list = in.settings.readVariables()
		if err := f.err(); err != nil {
			return err
		}
	}
	err = command.Run()
	if wrong, ok := errors.AsType[argumentError](err); ok {
		return usageError{wrong, in.pathOf(command)}
	}
	return err
}

// pathOf returns the names of a command that was parsed, with the program's name before
// them.
func (in *invocation) pathOf(command *kong.Context) string {
	path := in.Name
	for _, at := range command.Path {
		if at.Command != nil {
			path += " " + at.Command.Name
		}
	}
	return path
}

// commandOf returns the command that a fault of the command line belongs to, as it was
// given, with the program's name before it.
func (in *invocation) commandOf(err error, args []string) string {
	command := in.Name
	fault, ok := errors.AsType[*kong.ParseError](err)
	if !ok {
		return command
	}
	for _, at := range fault.Context.Path {
		if at.Command == nil {
			continue
		}
		i := slices.IndexFunc(args, func(arg string) bool { return arg == at.Command.Name || slices.Contains(at.Command.Aliases, arg) })
		if i < 0 {
			break // it is the default
		}
		command, args = command+" "+at.Command.Name, args[i+1:]
	}
	return command
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

type migrateCmd struct {
	databaseSettings `embed:""`
	startupSettings  `embed:""`
	logSettings      `embed:""`
	payloadSettings  `embed:""`
}

// Run brings the tables up to date, once the server is there. It writes MAX_PAYLOAD to the
// database if that was given, because else the limit of the workers would be lost to a
// default.
func (m *migrateCmd) Run(ctx context.Context, command *kong.Context, in *invocation) error {
	if _, err := in.kinds(); err != nil {
		return err
	}
	f := in.faults()
	f.databaseURL(m.DatabaseURL)
	timeout := f.startup(m.startupSettings)
	level, format := f.log(m.logSettings)
	maxPayload := f.maxPayload(m.MaxPayload)
	if err := f.err(); err != nil {
		return err
	}
	log := in.newLogger(level, format)
	for _, line := range in.misspelt() {
		log.Warn(line)
	}
	db, err := m.open(log)
	if err != nil {
		return err
	}
	defer db.Close()
	if err := startup.Wait(ctx, timeout, log, startup.Server{Variable: "DATABASE_URL", URL: m.DatabaseURL, Check: db.Ping}); err != nil {
		return err
	}
	err = worker.Migrate(ctx, m.DatabaseURL, log, in.Groups...)
	if err == nil && in.sources(command)("MAX_PAYLOAD") != fromDefault {
		err = limit.Record(ctx, db, maxPayload)
	}
	err, _ = startup.Explain("DATABASE_URL", m.DatabaseURL, err)
	return err
}

type configCmd struct {
	JSON bool `name:"json" help:"One JSON object a line."`

	runSettings `embed:""`
	Groups      kong.Plugins `embed:""`
}

// shownSetting is a setting as config shows it, a secret as ***.
type shownSetting struct {
	Name  string `json:"name"`
	Value string `json:"value"`
	// Default is what Value is when nothing else is said, by the program or its groups.
	Default string `json:"default"`
	// Source is where Value is from: a flag, a variable, or the default.
	Source string `json:"source"`
}

// The sources of a setting.
const (
	fromFlag     = "flag"
	fromVariable = "variable"
	fromDefault  = "default"
)

// Run prints the settings, and then what is wrong with them.
func (c *configCmd) Run(command *kong.Context, in *invocation) error {
	source := in.sources(command)
	list := append(shownSettings(reflect.ValueOf(c.runSettings), source), in.settings.shown(source)...)
	var err error
	if c.JSON {
		err = printLines(in.stdout, list)
	} else {
		err = printSettings(in.stdout, list)
	}
	if err != nil {
		return err
	}
	if _, err = c.config(in); err != nil {
		return err
	}
	in.printMisspelt()
	return nil
}

// sources tells where the value of a variable's setting is from, for a command that was
// parsed.
func (in *invocation) sources(command *kong.Context) func(variable string) string {
	given := make(map[string]bool)
	for _, at := range command.Path {
		if at.Flag == nil || at.Resolved {
			continue
		}
		for _, variable := range at.Flag.Envs {
			given[variable] = true
		}
	}
	return func(variable string) string {
		switch {
		case given[variable]:
			return fromFlag
		case in.Env(variable) != "":
			return fromVariable
		}
		return fromDefault
	}
}

// shownSettings are those of a struct of settings, and of the structs in it.
func shownSettings(settings reflect.Value, source func(variable string) string) (list []shownSetting) {
	for i := range settings.NumField() {
		field := settings.Type().Field(i)
		if field.Anonymous {
			list = append(list, shownSettings(settings.Field(i), source)...)
			continue
		}
		name := field.Tag.Get("env")
		list = append(list, shownSetting{name, redact(name, settings.Field(i).String()), field.Tag.Get("default"), source(name)})
	}
	return list
}

// printLines prints a JSON object a line.
func printLines[T any](out io.Writer, list []T) error {
	lines := json.NewEncoder(out)
	for _, object := range list {
		if err := lines.Encode(object); err != nil {
			return err
		}
	}
	return nil
}

// printSettings prints a line for each setting, for people.
func printSettings(out io.Writer, list []shownSetting) error {
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	for _, s := range list {
		fmt.Fprintf(w, "%s\t%s\n", s.Name, s.Value)
	}
	return w.Flush()
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
