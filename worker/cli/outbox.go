package cli

import (
	"context"
	"fmt"
	"text/tabwriter"
	"time"

	"github.com/carpool-go/carpool/admin"
	"github.com/carpool-go/carpool/dbpool"
)

// outboxCmd is what there is to do with jobs that are still in the outbox.
type outboxCmd struct {
	Ls     outboxLsCmd     `cmd:"" help:"List the jobs that wait in the outbox, or were set aside, with the problem."`
	Retry  outboxRetryCmd  `cmd:"" help:"Let jobs that were set aside wait again, so that a worker takes them."`
	Delete outboxDeleteCmd `cmd:"" help:"Delete jobs from the outbox for good."`
}

// outboxFilter chooses jobs of the outbox.
type outboxFilter struct {
	Kind    string `placeholder:"KIND" help:"Only jobs of this kind."`
	Problem string `placeholder:"TEXT" help:"Only jobs that were set aside and whose problem has this text in it."`

	databaseSettings `embed:""`
}

// outboxState chooses jobs of the outbox by whether they have a problem.
type outboxState struct {
	Waiting  bool `xor:"state" help:"Only jobs that wait for a worker to take them."`
	Rejected bool `xor:"state" aliases:"set-aside" help:"Only jobs that were set aside."`
}

func (f outboxFilter) of(s outboxState) admin.OutboxFilter {
	return admin.OutboxFilter{Kind: f.Kind, Problem: f.Problem, Waiting: s.Waiting, Rejected: s.Rejected}
}

// outbox opens the database for as long as use takes.
func (in *invocation) outbox(d databaseSettings, use func(*admin.Admin) error) error {
	return in.withDatabase(d, func(db *dbpool.Pool) error { return use(admin.New(nil, db)) })
}

type outboxLsCmd struct {
	Limit *int `placeholder:"N" help:"At most so many, those that were put in first."`
	JSON  bool `name:"json" help:"One JSON object a line."`

	outboxState  `embed:""`
	outboxFilter `embed:""`
}

// Run lists the jobs.
func (c *outboxLsCmd) Run(ctx context.Context, in *invocation) error {
	if c.Limit != nil && *c.Limit < 1 {
		return argumentError(fmt.Sprintf("--limit: %d is less than 1", *c.Limit))
	}
	return in.outbox(c.databaseSettings, func(a *admin.Admin) error {
		filter := c.of(c.outboxState)
		if c.Limit != nil {
			filter.Limit = *c.Limit + 1 // to see whether there are more
		}
		jobs, err := a.OutboxJobs(ctx, filter)
		if err != nil {
			return err
		}
		if c.Limit != nil && len(jobs) > *c.Limit {
			defer fmt.Fprintln(in.stderr, "and more, which came later")
			jobs = jobs[:*c.Limit]
		}
		if c.JSON {
			return printLines(in.stdout, jobs)
		}
		w := tabwriter.NewWriter(in.stdout, 0, 0, 2, ' ', 0)
		fmt.Fprintln(w, "ID\tKIND\tQUEUE\tAGE\tPROBLEM")
		for _, job := range jobs {
			queue, problem := job.Queue, job.Problem
			if queue == "" {
				queue = "(the kind's own)"
			}
			if problem == "" {
				problem = "(waiting)"
			}
			fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\n", job.ID, printable(job.Kind), printable(queue),
				age(time.Duration(job.AgeMS)*time.Millisecond), printable(problem))
		}
		return w.Flush()
	})
}

// outboxSelection chooses jobs to change; not to choose is an error.
type outboxSelection struct {
	IDs []string `arg:"" optional:"" name:"id" help:"The jobs' ids."`
	All bool     `help:"All of them."`

	outboxFilter `embed:""`
}

type outboxRetryCmd struct {
	outboxSelection `embed:""`
}

// Run lets the jobs wait again.
func (c *outboxRetryCmd) Run(ctx context.Context, in *invocation) error {
	return outboxChange{
		flags: "--kind, --problem", state: outboxState{Rejected: true}, missing: "was not set aside in the outbox",
		done: "waits again", notDone: "stays: it is not set aside any more",
		do: (*admin.Admin).RetryOutbox,
	}.run(ctx, in, c.outboxSelection, false)
}

type outboxDeleteCmd struct {
	outboxState     `embed:""`
	outboxSelection `embed:""`
}

// Run deletes the jobs.
func (c *outboxDeleteCmd) Run(ctx context.Context, in *invocation) error {
	return outboxChange{
		flags: "--kind, --problem, --waiting, --rejected", state: c.outboxState, missing: "is not in the outbox",
		done: "deleted", notDone: "stays: a worker takes it at this moment, or has taken it; see: " + in.Name + " cancel --help",
		do: (*admin.Admin).DeleteOutbox,
	}.run(ctx, in, c.outboxSelection, c.Waiting || c.Rejected)
}

// outboxChange is something that is done to jobs of the outbox, with its words.
type outboxChange struct {
	flags         string // what may choose the jobs
	state         outboxState
	missing       string // of an id that can't be chosen
	done, notDone string
	do            func(*admin.Admin, context.Context, []admin.OutboxJob) ([]admin.OutboxJob, error)
}

// run changes the jobs of a selection, and prints what it did. byState says that the state
// was asked for, which chooses, too.
func (c outboxChange) run(ctx context.Context, in *invocation, s outboxSelection, byState bool) error {
	switch {
	case len(s.IDs) == 0 && !s.All && !byState && s.Kind == "" && s.Problem == "":
		return argumentError("which jobs? Give their ids, or one of " + c.flags + ", or --all")
	case len(s.IDs) > 0 && s.All:
		return argumentError("ids and --all don't go together")
	}
	return in.outbox(s.databaseSettings, func(a *admin.Admin) error {
		jobs, err := s.choose(ctx, in, a, c)
		if err != nil {
			return err
		}
		changed, err := c.do(a, ctx, jobs)
		is := make(map[string]bool, len(changed))
		for _, job := range changed {
			is[job.ID] = true
			fmt.Fprintf(in.stdout, "%s %s %s\n", job.ID, printable(job.Kind), c.done)
		}
		if err != nil {
			return fmt.Errorf("%w (%d of %d jobs were changed)", err, len(changed), len(jobs))
		}
		for _, job := range jobs {
			if !is[job.ID] {
				fmt.Fprintf(in.stderr, "%s %s %s\n", job.ID, printable(job.Kind), c.notDone)
			}
		}
		if len(jobs) == 0 {
			fmt.Fprintln(in.stderr, "no job of the outbox fits; nothing was changed")
		}
		return nil
	})
}

// choose returns the jobs of the selection. Every id must be among them.
func (s outboxSelection) choose(ctx context.Context, in *invocation, a *admin.Admin, c outboxChange) ([]admin.OutboxJob, error) {
	filter := s.of(c.state)
	filter.IDs = s.IDs
	jobs, err := a.OutboxJobs(ctx, filter)
	if err != nil || len(s.IDs) == 0 {
		return jobs, err
	}
	is := make(map[string]bool, len(jobs))
	for _, job := range jobs {
		is[job.ID] = true
	}
	for _, id := range s.IDs {
		if !is[id] {
			return nil, fmt.Errorf("job %s %s; nothing was changed; see: %s outbox ls", id, c.missing, in.Name)
		}
	}
	return jobs, nil
}
