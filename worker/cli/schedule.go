package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
	"time"
	_ "time/tzdata" // an image without zoneinfo knows the time zones all the same
	"unicode"

	"github.com/carpool-go/carpool/dbpool"
	"github.com/carpool-go/carpool/internal/schema"
	"github.com/carpool-go/carpool/scheduler"
	"github.com/carpool-go/carpool/tasks"
)

// scheduleCmd is what there is to do with what is run by the clock.
type scheduleCmd struct {
	Add     scheduleAddCmd     `cmd:"" help:"Add an entry; running workers take it up within a second."`
	Ls      scheduleLsCmd      `cmd:"" help:"List the entries, with their last and next ticks and what is wrong with them."`
	Enable  scheduleEnableCmd  `cmd:"" help:"Run an entry again, from its next tick on."`
	Disable scheduleDisableCmd `cmd:"" help:"Run an entry no more, until it is enabled."`
	Rm      scheduleRmCmd      `cmd:"" help:"Remove an entry."`
	RunNow  scheduleRunNowCmd  `cmd:"" help:"Enqueue an entry's job at once and print its id; its ticks stay as they are."`
	Next    scheduleNextCmd    `cmd:"" help:"Show the next ticks of an entry, or of a cron expression."`
}

// withSchedules opens the database for as long as use takes.
func (in *invocation) withSchedules(ctx context.Context, s databaseSettings, use func(db *dbpool.Pool) error) error {
	return in.withDatabase(s, func(db *dbpool.Pool) error {
		if err := schema.Check(ctx, db); err != nil {
			return err
		}
		err := use(db)
		if errors.Is(err, scheduler.ErrNotFound) {
			return fmt.Errorf("%w; see: %s schedule ls", err, in.Name)
		}
		return err
	})
}

type scheduleAddCmd struct {
	Name    string `arg:"" help:"The entry's own name: letters, digits, and _ . : -"`
	Cron    string `arg:"" help:"When: five fields such as '30 2 * * 1-5', or @hourly, @daily, @weekly, @monthly, @yearly, '@every 90s'."`
	Kind    string `arg:"" help:"The kind of job; see: ${name} kinds."`
	Payload string `arg:"" optional:"" name:"json" default:"{}" help:"The payload as JSON, or - to read it from standard input, where the list of processes doesn't show it."`

	TimeZone  string        `default:"UTC" placeholder:"Europe/Berlin" help:"The IANA time zone of the clock that the entry goes by."`
	Missed    string        `enum:"skip,once,all" default:"once" help:"What becomes of ticks for which no worker was there: skip, once for all of them together, or all, up to a hundred."`
	Overlap   string        `enum:"allow,skip,queue" default:"allow" help:"What becomes of a tick whose previous job has not ended: allow it, skip it, or queue it, one at most."`
	Queue     string        `help:"Queue of its jobs, instead of the kind's own."`
	MaxRetry  *int          `placeholder:"N" help:"Tries after the first one fails, instead of the kind's own; 0 for none."`
	Timeout   time.Duration `placeholder:"10m" help:"Bound on each try, instead of the kind's own."`
	Retention time.Duration `placeholder:"24h" help:"How long a finished job stays in sight, instead of the kind's own."`
	Replace   bool          `help:"Take the place of an entry of this name, also of one from the code."`

	databaseSettings `embed:""`
	payloadSettings  `embed:""`
}

// Run adds the entry and prints when it is next run.
func (a *scheduleAddCmd) Run(ctx context.Context, in *invocation) error {
	e, err := a.entry(ctx, in)
	if err != nil {
		return err
	}
	return in.withSchedules(ctx, a.databaseSettings, func(db *dbpool.Pool) error {
		err := scheduler.Add(ctx, db, e, a.Replace)
		if errors.Is(err, scheduler.ErrExists) {
			return fmt.Errorf("%w; --replace puts this one in its place", err)
		}
		if err != nil {
			return err
		}
		schedule, err := scheduler.ParseSchedule(e.Cron, e.TimeZone)
		if err != nil {
			return err
		}
		fmt.Fprintf(in.stdout, "%s is next run at %s\n", e.Name, scheduleTime(schedule.Next(time.Now()), e.TimeZone))
		return nil
	})
}

// entry is the entry to be added. The error names everything that is wrong with it.
func (a *scheduleAddCmd) entry(ctx context.Context, in *invocation) (scheduler.Entry, error) {
	var faults []string
	payload, _, err := in.readPayload(ctx, a.Kind, a.Payload, a.payloadSettings, func(task *tasks.Task) string {
		return quoteShell(task.Example())
	})
	if err != nil {
		if _, wrong := errors.AsType[argumentError](err); !wrong {
			return scheduler.Entry{}, err
		}
		faults, payload = append(faults, err.Error()), unread{}
	}
	maxRetry, err := maxRetryFlag(a.MaxRetry)
	if err != nil {
		faults = append(faults, err.Error())
	}
	e := scheduler.Entry{
		Name: a.Name, Cron: a.Cron, TimeZone: a.TimeZone, Payload: payload,
		Options: tasks.Options{Queue: a.Queue, MaxRetry: maxRetry, Timeout: a.Timeout, Retention: a.Retention},
		Missed:  scheduler.Missed(a.Missed), Overlap: scheduler.Overlap(a.Overlap),
	}
	faults = append(faults, errorLines(e.Validate())...)
	switch len(faults) {
	case 0:
		return e, nil
	case 1:
		return scheduler.Entry{}, argumentError(faults[0])
	}
	return scheduler.Entry{}, argumentError(fmt.Sprintf("%d things are wrong with the entry:\n  %s", len(faults), strings.Join(faults, "\n  ")))
}

// unread is in the place of a payload that could not be read, which is said already.
type unread struct{}

func (unread) Kind() string           { return "" }
func (unread) Options() tasks.Options { return tasks.Options{} }
func (unread) Validate() error        { return nil }

type scheduleLsCmd struct {
	JSON bool `help:"One JSON object a line."`

	databaseSettings `embed:""`
}

// Run lists the entries.
func (l *scheduleLsCmd) Run(ctx context.Context, in *invocation) error {
	return in.withSchedules(ctx, l.databaseSettings, func(db *dbpool.Pool) error {
		list, err := scheduler.List(ctx, db)
		if err != nil {
			return err
		}
		if l.JSON {
			return printLines(in.stdout, list)
		}
		return printSchedules(in.stdout, list)
	})
}

func printSchedules(out io.Writer, list []scheduler.Status) error {
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "NAME\tCRON\tTIME ZONE\tKIND\tMISSED\tOVERLAP\tFROM\tLAST TICK\tNEXT TICK\tPROBLEM")
	for _, s := range list {
		next := scheduleTime(s.NextTick, s.TimeZone)
		if !s.Enabled {
			next = "disabled"
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\n", s.Name, printable(s.Cron), printable(s.TimeZone), printable(s.Kind), s.Missed, s.Overlap, s.Source,
			scheduleTime(s.LastTick, s.TimeZone), next, printable(s.Problem))
	}
	return w.Flush()
}

// scheduleTime shows t by the entry's own clock, or by UTC if that isn't known.
func scheduleTime(t time.Time, zone string) string {
	if t.IsZero() {
		return "-"
	}
	if location, err := time.LoadLocation(zone); err == nil {
		t = t.In(location)
	}
	return t.Format(time.RFC3339)
}

type scheduleEnableCmd struct {
	Name string `arg:"" help:"The entry's name."`

	databaseSettings `embed:""`
}

// Run enables the entry.
func (e *scheduleEnableCmd) Run(ctx context.Context, in *invocation) error {
	return in.withSchedules(ctx, e.databaseSettings, func(db *dbpool.Pool) error { return scheduler.SetEnabled(ctx, db, e.Name, true) })
}

type scheduleDisableCmd struct {
	Name string `arg:"" help:"The entry's name."`

	databaseSettings `embed:""`
}

// Run disables the entry.
func (d *scheduleDisableCmd) Run(ctx context.Context, in *invocation) error {
	return in.withSchedules(ctx, d.databaseSettings, func(db *dbpool.Pool) error { return scheduler.SetEnabled(ctx, db, d.Name, false) })
}

type scheduleRmCmd struct {
	Name string `arg:"" help:"The entry's name."`

	databaseSettings `embed:""`
}

// Run removes the entry.
func (r *scheduleRmCmd) Run(ctx context.Context, in *invocation) error {
	return in.withSchedules(ctx, r.databaseSettings, func(db *dbpool.Pool) error {
		source, err := scheduler.Remove(ctx, db, r.Name)
		if err == nil && source == "code" {
			fmt.Fprintln(in.stderr, "it is from the code and comes back with the next worker that starts and still has it; to keep it from running:", in.Name, "schedule disable")
		}
		return err
	})
}

type scheduleRunNowCmd struct {
	Name string `arg:"" help:"The entry's name."`

	databaseSettings `embed:""`
}

// Run enqueues the entry's job and prints its id.
func (r *scheduleRunNowCmd) Run(ctx context.Context, in *invocation) error {
	return in.withSchedules(ctx, r.databaseSettings, func(db *dbpool.Pool) error {
		id, err := scheduler.RunNow(ctx, db, r.Name)
		if err != nil {
			return err
		}
		fmt.Fprintln(in.stdout, id)
		return nil
	})
}

type scheduleNextCmd struct {
	Of string `arg:"" name:"name|cron" help:"An entry's name, or a cron expression, for which no database is needed."`

	N        int    `short:"n" default:"5" help:"How many."`
	TimeZone string `default:"UTC" placeholder:"Europe/Berlin" help:"The time zone of a cron expression; an entry has its own."`

	databaseSettings `embed:""`
}

// Run prints the next ticks.
func (n *scheduleNextCmd) Run(ctx context.Context, in *invocation) error {
	if n.N < 1 || n.N > 1000 {
		return argumentError(fmt.Sprintf("-n: %d is not a number from 1 to 1000", n.N))
	}
	if strings.ContainsAny(n.Of, "@*?/,") || strings.ContainsFunc(n.Of, unicode.IsSpace) { // which no name has
		schedule, err := scheduler.ParseSchedule(n.Of, n.TimeZone)
		if err != nil {
			return argumentError(err.Error())
		}
		n.print(in.stdout, schedule, time.Now(), n.TimeZone)
		return nil
	}
	return in.withSchedules(ctx, n.databaseSettings, func(db *dbpool.Pool) error {
		list, err := scheduler.List(ctx, db)
		if err != nil {
			return err
		}
		for _, s := range list {
			if s.Name != n.Of {
				continue
			}
			schedule, err := scheduler.ParseSchedule(s.Cron, s.TimeZone)
			if err != nil {
				return err
			}
			if !s.Enabled {
				fmt.Fprintln(in.stderr, "it is disabled; if it were not:")
			}
			n.print(in.stdout, schedule, time.Now(), s.TimeZone)
			return nil
		}
		return fmt.Errorf("entry %.100q: %w", n.Of, scheduler.ErrNotFound)
	})
}

func (n *scheduleNextCmd) print(out io.Writer, schedule scheduler.Schedule, after time.Time, zone string) {
	for range n.N {
		after = schedule.Next(after)
		if after.IsZero() {
			return
		}
		fmt.Fprintln(out, scheduleTime(after, zone))
	}
}
