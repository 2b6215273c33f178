package cli

import (
	"context"
	"errors"
	"fmt"
	"text/tabwriter"
	"time"

	"github.com/carpool-go/carpool/admin"
	"github.com/carpool-go/carpool/tasks"
)

// archiveCmd is what there is to do with jobs that were given up.
type archiveCmd struct {
	Ls     archiveLsCmd     `cmd:"" help:"List the jobs that were given up, with their reasons."`
	Show   archiveShowCmd   `cmd:"" help:"Show one of them."`
	Retry  archiveRetryCmd  `cmd:"" help:"Put them back on their queues, with all their tries."`
	Delete archiveDeleteCmd `cmd:"" help:"Delete them for good."`
}

// archiveFilter chooses jobs of the archive.
type archiveFilter struct {
	Kind   string `placeholder:"KIND" help:"Only jobs of this kind."`
	Reason string `placeholder:"TEXT" help:"Only jobs whose reason has this text in it."`
	Queue  string `placeholder:"QUEUE" help:"Only jobs of this queue."`

	redisSettings `embed:""`
}

// archiveSelection chooses jobs to change; not to choose is an error.
type archiveSelection struct {
	IDs []string `arg:"" optional:"" name:"id" help:"The jobs' ids."`
	All bool     `help:"All of them."`

	archiveFilter `embed:""`
}

// archive opens Redis for as long as use takes.
func (in *invocation) archive(r redisSettings, use func(*admin.Admin) error) error {
	return in.withAdmin(r, databaseSettings{}, use)
}

func (f archiveFilter) of() admin.ArchiveFilter {
	return admin.ArchiveFilter{Kind: f.Kind, Reason: f.Reason, Queue: f.Queue}
}

// choose returns the jobs of a selection. Every id must be in the archive.
func (s archiveSelection) choose(ctx context.Context, in *invocation, a *admin.Admin) ([]admin.ArchivedJob, error) {
	filtered := s.Kind != "" || s.Reason != "" || s.Queue != ""
	switch {
	case len(s.IDs) == 0 && !s.All && !filtered:
		return nil, argumentError("which jobs? Give their ids, or --kind, --reason or --queue, or --all")
	case len(s.IDs) > 0 && s.All:
		return nil, argumentError("ids and --all don't go together")
	}
	filter := s.of()
	if len(s.IDs) > 0 {
		filter.IDs = s.IDs
	}
	jobs, err := a.Archived(ctx, filter)
	if err != nil || len(s.IDs) == 0 {
		return jobs, err
	}
	byID := make(map[string]admin.ArchivedJob, len(jobs))
	for _, job := range jobs {
		byID[job.ID] = job
	}
	var chosen []admin.ArchivedJob
	for _, id := range s.IDs {
		job, ok := byID[id]
		if !ok {
			return nil, fmt.Errorf("job %s is not in the archive; nothing was changed; see: %s archive ls", id, in.Name)
		}
		chosen = append(chosen, job)
	}
	return chosen, nil
}

type archiveLsCmd struct {
	JSON  bool `help:"One JSON object a line."`
	Limit *int `placeholder:"N" help:"At most so many, the latest ones."`

	archiveFilter `embed:""`
}

// Run lists the jobs.
func (c *archiveLsCmd) Run(ctx context.Context, in *invocation) error {
	if c.Limit != nil && *c.Limit < 1 {
		return argumentError(fmt.Sprintf("--limit: %d is less than 1", *c.Limit))
	}
	return in.archive(c.redisSettings, func(a *admin.Admin) error {
		jobs, err := a.Archived(ctx, c.of())
		if err != nil {
			return err
		}
		if c.Limit != nil && len(jobs) > *c.Limit {
			defer fmt.Fprintf(in.stderr, "and %d more, which are older\n", len(jobs)-*c.Limit)
			jobs = jobs[:*c.Limit]
		}
		if c.JSON {
			return printLines(in.stdout, jobs)
		}
		w := tabwriter.NewWriter(in.stdout, 0, 0, 2, ' ', 0)
		fmt.Fprintln(w, "ID\tKIND\tQUEUE\tTRIES\tARCHIVED\tREASON")
		for _, job := range jobs {
			fmt.Fprintf(w, "%s\t%s\t%s\t%d\t%s\t%s\n", printable(job.ID), printable(job.Kind), printable(job.Queue), job.Tries, job.ArchivedAt.Format(time.DateTime), printable(job.Reason))
		}
		if err := w.Flush(); err != nil {
			return err
		}
		full, err := a.NearlyFull(ctx)
		for _, queue := range full {
			fmt.Fprintf(in.stderr, "the archive of queue %s is nearly full: beyond %d jobs, or after 90 days, the oldest are dropped\n", printable(queue), admin.ArchiveLimit)
		}
		return err
	})
}

type archiveShowCmd struct {
	ID      string `arg:"" help:"The job's id."`
	Payload bool   `help:"Show the payload as well."`

	redisSettings `embed:""`
}

// Run shows the job.
func (c *archiveShowCmd) Run(ctx context.Context, in *invocation) error {
	return in.archive(c.redisSettings, func(a *admin.Admin) error {
		jobs, err := archiveSelection{IDs: []string{c.ID}}.choose(ctx, in, a)
		if err != nil {
			return err
		}
		job := jobs[0]
		w := tabwriter.NewWriter(in.stdout, 0, 0, 2, ' ', 0)
		fmt.Fprintf(w, "id\t%s\nkind\t%s\nqueue\t%s\ntries\t%d\narchived\t%s\nreason\t%s\n",
			printable(job.ID), printable(job.Kind), printable(job.Queue), job.Tries, job.ArchivedAt.Format(time.RFC3339), oneLine(job.Reason))
		if c.Payload {
			fmt.Fprintf(w, "payload\t%s\n", job.Payload)
		} else {
			fmt.Fprintf(w, "payload\t%d bytes; --payload shows them\n", len(job.Payload))
		}
		return w.Flush()
	})
}

type archiveRetryCmd struct {
	archiveSelection `embed:""`
}

// Help says what other tools do instead.
func (*archiveRetryCmd) Help() string {
	return `A job has all its tries again, and its unique key; it stays in the archive while another job holds that.
The monitor's button Run does the same. That of an asynqmon of your own, and asynq's command line, go past both: the
job runs beside the one that holds its key, and has the tries that were left, one at least.`
}

// Run puts the jobs back.
func (c *archiveRetryCmd) Run(ctx context.Context, in *invocation) error {
	return c.change(ctx, in, "put back on its queue", (*admin.Admin).Retry)
}

type archiveDeleteCmd struct {
	archiveSelection `embed:""`
}

// Run deletes the jobs.
func (c *archiveDeleteCmd) Run(ctx context.Context, in *invocation) error {
	return c.change(ctx, in, "deleted", (*admin.Admin).Delete)
}

// change does something to each job of the selection, and prints what it did.
func (s archiveSelection) change(ctx context.Context, in *invocation, done string, do func(*admin.Admin, context.Context, admin.ArchivedJob) error) error {
	return in.archive(s.redisSettings, func(a *admin.Admin) error {
		jobs, err := s.choose(ctx, in, a)
		if err != nil {
			return err
		}
		n := 0
		for _, job := range jobs {
			err := do(a, ctx, job)
			if errors.Is(err, admin.ErrNotArchived) {
				continue // somebody else was faster
			}
			if duplicate, ok := errors.AsType[*tasks.DuplicateError](err); ok {
				fmt.Fprintf(in.stderr, "%s %s stays: job %s holds its unique key by now\n", printable(job.ID), printable(job.Kind), printable(duplicate.ID))
				continue
			}
			if errors.Is(err, tasks.ErrJobLost) {
				fmt.Fprintf(in.stderr, "%s stays: %v; remove what is left of it with: %s archive delete %s\n",
					printable(job.ID), tasks.ErrJobLost, in.Name, quoteShell(printable(job.ID)))
				continue
			}
			if err != nil {
				return fmt.Errorf("%w (%d of %d jobs were %s)", err, n, len(jobs), done)
			}
			fmt.Fprintf(in.stdout, "%s %s %s\n", printable(job.ID), printable(job.Kind), done)
			n++
		}
		if len(jobs) == 0 {
			fmt.Fprintln(in.stderr, "no job of the archive fits; nothing was changed")
		}
		return nil
	})
}
