package cli

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"
	"unicode"

	"github.com/carpool-go/carpool/admin"
	"github.com/carpool-go/carpool/tasks"
)

type statusCmd struct {
	JSON  bool `name:"json" help:"Print it as JSON, one object a line."`
	Watch bool `help:"Print it anew every 2 seconds, until Ctrl-C."`

	redisSettings    `embed:""`
	databaseSettings `embed:""`
}

// Help explains the words of the status.
func (*statusCmd) Help() string {
	return `Of an instance, which is one worker process:

  SLOTS     how many jobs it runs, of how many at most at once (WORKER_CONCURRENCY)
  POOL IN   connections of its pool that are open and idle, and
  OUT       those that jobs have
  OVERFLOW  how many of them are beyond DB_POOL_SIZE, and closed soon after
  WAITING   jobs that wait for a connection
  DATABASE  AWAY while its jobs wait for the database to come back

Of a queue, how many of its jobs are:

  PENDING    waiting for a worker that is free
  ACTIVE     run at this moment
  SCHEDULED  not due yet
  RETRY      failed, and waiting for their next try
  ARCHIVED   given up; see: archive ls
  LATENCY    is how long the oldest pending job has waited
  PAUSED     means that workers fetch none of its jobs; see: resume

Of the outbox, where jobs are that were enqueued in a transaction of the database:

  waiting    on their way to their queues, usually for less than a second
  set aside  can't become jobs, for the reasons below it; see: outbox ls

A line that begins with ! needs somebody.`
}

const watchEvery = 2 * time.Second

// Run shows the status. What it could not read it names after it has printed the rest.
func (s *statusCmd) Run(ctx context.Context, in *invocation) error {
	return in.withServers(s.redisSettings, s.databaseSettings, func(a *admin.Admin, explain explainer) error {
		if !s.Watch {
			return s.show(ctx, in, a, explain)
		}
		return s.watch(ctx, in, a, explain)
	})
}

// show prints the status once. Nothing is printed if Redis can't be read.
func (s *statusCmd) show(ctx context.Context, in *invocation, a *admin.Admin, explain explainer) error {
	now, unread := a.Status(ctx)
	if now == nil {
		return explain(fmt.Errorf("REDIS_URL: %w", unread))
	}
	if now.Outbox == nil && s.DatabaseURL == "" {
		now.OutboxNote = "not read, as DATABASE_URL is not set"
	}
	var text bytes.Buffer
	switch {
	case s.JSON:
		if err := json.NewEncoder(&text).Encode(now); err != nil {
			return err
		}
	case s.Watch && isTerminal(in.stdout):
		text.WriteString(clearScreen)
		printStatus(&text, now, in.painter())
	case s.Watch:
		printStatus(&text, now, in.painter())
		text.WriteByte('\n')
	default:
		printStatus(&text, now, in.painter())
	}
	if _, err := in.stdout.Write(text.Bytes()); err != nil {
		return err
	}
	if unread != nil {
		return explain(fmt.Errorf("DATABASE_URL: %w", unread))
	}
	return nil
}

// clearScreen is ANSI's "erase all of the display" and "cursor to the upper left".
const clearScreen = "\x1b[2J\x1b[H"

// watch shows the status until ctx ends. Servers that don't answer are what one
// watches for, so an error doesn't end it.
func (s *statusCmd) watch(ctx context.Context, in *invocation, a *admin.Admin, explain explainer) error {
	tick := time.NewTicker(watchEvery)
	defer tick.Stop()
	for {
		err := s.show(ctx, in, a, explain)
		if ctx.Err() != nil {
			return nil
		}
		if errors.Is(err, syscall.EPIPE) {
			return err // nobody reads it any more
		}
		if err != nil {
			fmt.Fprintf(in.stderr, "%s: %s %v\n", in.Name, time.Now().Format(time.TimeOnly), err)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

// printStatus writes the status for people.
func printStatus(out *bytes.Buffer, s *admin.Status, paint painter) {
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	if len(s.Instances) == 0 {
		fmt.Fprintln(w, paint(red, "no instance is up"))
	} else {
		fmt.Fprintln(w, "INSTANCE\tVERSION\tUP SINCE\tSLOTS\tPOOL IN\tOUT\tOVERFLOW\tWAITING\t"+paint(normal, "DATABASE")+"\tQUEUES")
	}
	for _, i := range s.Instances {
		database := paint(normal, "there")
		if i.DatabaseAway {
			database = paint(red, "AWAY")
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%d/%d\t%d\t%d\t%d\t%d\t%s\t%s\n",
			printable(i.Name), printable(i.Version), i.Started.UTC().Format(time.DateTime+"Z"), i.Running, i.Concurrency,
			i.Pool.CheckedIn, i.Pool.CheckedOut, i.Pool.Overflow, i.Pool.Waiting, database, printable(i.Weights()))
	}
	_ = w.Flush() // a buffer takes everything
	for _, i := range s.Instances {
		if i.Blocked != "" {
			fmt.Fprintln(out, paint(red, fmt.Sprintf("! %s: transactional jobs can't begin: %s", printable(i.Name), printable(i.Blocked))))
		}
	}
	for _, m := range s.Missing {
		fmt.Fprintln(out, paint(red, fmt.Sprintf("! %s gives no sign of life since %sZ, %s ago",
			printable(m.Name), m.Seen.UTC().Format(time.DateTime), age(s.At.Sub(m.Seen)))))
	}
	fmt.Fprintln(out)
	printQueues(w, out, s, paint)
	fmt.Fprintln(out)
	printOutbox(out, s, paint)
}

func printQueues(w *tabwriter.Writer, out *bytes.Buffer, s *admin.Status, paint painter) {
	if len(s.Queues) == 0 {
		fmt.Fprintln(out, "no queue has had a job yet")
		return
	}
	fmt.Fprintln(w, "QUEUE\tPENDING\tACTIVE\tSCHEDULED\tRETRY\tARCHIVED\tLATENCY\t")
	for _, q := range s.Queues {
		paused := ""
		if q.Paused {
			paused = paint(yellow, "PAUSED")
		}
		fmt.Fprintf(w, "%s\t%d\t%d\t%d\t%d\t%d\t%s\t%s\n", printable(q.Name),
			q.Pending, q.Active, q.Scheduled, q.Retry, q.Archived, age(time.Duration(q.LatencyMS)*time.Millisecond), paused)
	}
	_ = w.Flush()
	for _, q := range s.Queues {
		if q.Pending+q.Active+q.Scheduled+q.Retry > 0 && !s.IsServed(q.Name) {
			fmt.Fprintln(out, paint(red, fmt.Sprintf("! nobody pulls from %s: no instance has it among its WORKER_QUEUES", printable(q.Name))))
		}
		if q.Aggregating > 0 {
			fmt.Fprintln(out, paint(yellow, fmt.Sprintf("! %s: %d in groups of asynq's (the option Group), which no worker of carpool's fetches; "+
				"only a server of asynq's with a GroupAggregator does", printable(q.Name), q.Aggregating)))
		}
		if len(q.Lost) > 0 {
			fmt.Fprintln(out, paint(red, fmt.Sprintf("! %s: %s", printable(q.Name), lostJobs(q))))
		}
		for _, key := range q.Unreadable {
			fmt.Fprintln(out, paint(red, fmt.Sprintf("! %s: the key %s in Redis is no list of jobs; somebody has overwritten it: delete it", printable(q.Name), printable(key))))
		}
		if q.ArchiveNearlyFull {
			fmt.Fprintln(out, paint(yellow, fmt.Sprintf("! the archive of %s holds %d jobs; beyond %d, the oldest are dropped",
				printable(q.Name), q.Archived, admin.ArchiveLimit)))
		}
	}
}

// lostJobs says which jobs of a queue have lost their data, and what becomes of them.
func lostJobs(q admin.Queue) string {
	n := 0
	var which []string
	for _, state := range slices.Sorted(maps.Keys(q.Lost)) {
		n += q.Lost[state]
		which = append(which, fmt.Sprintf("%d %s", q.Lost[state], state))
	}
	said := "jobs have lost their data (" + strings.Join(which, ", ") +
		"): their keys in Redis were evicted, deleted or overwritten; set its maxmemory-policy to noeviction. "
	if n > q.Lost[string(tasks.StateArchived)]+q.Lost[string(tasks.StateCompleted)] {
		said += "The queue's workers remove what is left of those that wait, and log their ids. "
	}
	if q.Lost[string(tasks.StateArchived)] > 0 {
		said += "See: archive ls. "
	}
	return strings.TrimSpace(said)
}

func printOutbox(out *bytes.Buffer, s *admin.Status, paint painter) {
	o := s.Outbox
	if o == nil {
		fmt.Fprintf(out, "outbox: %s\n", s.OutboxNote)
		return
	}
	fmt.Fprintf(out, "outbox: %d waiting", o.Waiting)
	if o.Waiting > 0 {
		fmt.Fprintf(out, ", the oldest for %s", age(time.Duration(o.OldestMS)*time.Millisecond))
	}
	fmt.Fprintf(out, "; %d set aside\n", o.Rejected)
	for _, k := range o.UnknownKinds {
		fmt.Fprintln(out, paint(red, fmt.Sprintf("! %d waiting: no instance that is up knows the kind %s", k.Rows, printable(k.Kind))))
	}
	for _, p := range o.Problems {
		fmt.Fprintln(out, paint(yellow, fmt.Sprintf("! %d: %s", p.Rows, printable(p.Problem))))
	}
}

// age is a duration to the millisecond if it is short, else to the second.
func age(d time.Duration) string {
	if d < time.Second {
		return d.Round(time.Millisecond).String()
	}
	return d.Round(time.Second).String()
}

// oneLine has a space for each character that would move the cursor.
func oneLine(s string) string {
	return strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) {
			return ' '
		}
		return r
	}, s)
}

// printable keeps what others have written into Redis or the database from moving
// the cursor, and from filling the screen.
func printable(s string) string {
	const most = 120
	s = oneLine(s)
	if runes := []rune(s); len(runes) > most {
		return string(runes[:most-1]) + "…"
	}
	return s
}
