package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"slices"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"

	"github.com/hibiken/asynq"
	"github.com/redis/go-redis/v9"

	"github.com/carpool-go/carpool/internal/asynqkey"
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

// archive is asynq's archives of all queues.
type archive struct {
	rdb       redis.UniversalClient
	inspector *asynq.Inspector
}

// withArchive opens the archive for as long as use takes.
func (s redisSettings) withArchive(use func(ctx context.Context, a *archive) error) error {
	rdb, err := s.open()
	if err != nil {
		return err
	}
	defer rdb.Close()
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	return use(ctx, &archive{rdb, asynq.NewInspectorFromRedisClient(rdb)})
}

const archivePage = 500

// list returns the jobs that fit, the latest first.
func (a *archive) list(ctx context.Context, f archiveFilter) ([]*asynq.TaskInfo, error) {
	queues, err := a.inspector.Queues()
	if err != nil {
		return nil, fmt.Errorf("list the queues: %w", err)
	}
	var jobs []*asynq.TaskInfo
	for _, queue := range queues {
		if f.Queue != "" && queue != f.Queue {
			continue
		}
		for page := 1; ; page++ {
			if err := ctx.Err(); err != nil {
				return nil, err
			}
			some, err := a.inspector.ListArchivedTasks(queue, asynq.Page(page), asynq.PageSize(archivePage))
			if err != nil {
				return nil, fmt.Errorf("list the archive of queue %s: %w", queue, err)
			}
			for _, job := range some {
				if (f.Kind == "" || job.Type == f.Kind) && strings.Contains(deadLetterOf(job).Reason, f.Reason) {
					jobs = append(jobs, job)
				}
			}
			if len(some) < archivePage {
				break
			}
		}
	}
	slices.SortFunc(jobs, func(a, b *asynq.TaskInfo) int { return b.LastFailedAt.Compare(a.LastFailedAt) })
	return jobs, nil
}

// choose returns the jobs of a selection. Every id must be in the archive.
func (a *archive) choose(ctx context.Context, s archiveSelection) ([]*asynq.TaskInfo, error) {
	filtered := s.Kind != "" || s.Reason != "" || s.Queue != ""
	switch {
	case len(s.IDs) == 0 && !s.All && !filtered:
		return nil, configError("which jobs? Give their ids, or --kind, --reason or --queue, or --all")
	case len(s.IDs) > 0 && s.All:
		return nil, configError("ids and --all don't go together")
	}
	jobs, err := a.list(ctx, s.archiveFilter)
	if err != nil || len(s.IDs) == 0 {
		return jobs, err
	}
	byID := make(map[string]*asynq.TaskInfo, len(jobs))
	for _, job := range jobs {
		byID[job.ID] = job
	}
	var chosen []*asynq.TaskInfo
	for _, id := range s.IDs {
		job := byID[id]
		if job == nil {
			return nil, fmt.Errorf("job %s is not in the archive; nothing was changed; see: worker archive ls", id)
		}
		chosen = append(chosen, job)
	}
	return chosen, nil
}

type archiveLsCmd struct {
	JSON bool `help:"One JSON object a line."`

	archiveFilter `embed:""`
}

// deadLetter is a job that was given up, as `worker archive` shows it.
type deadLetter struct {
	ID         string    `json:"id"`
	Kind       string    `json:"kind"`
	Queue      string    `json:"queue"`
	Tries      int       `json:"tries"`
	ArchivedAt time.Time `json:"archived_at"`
	Reason     string    `json:"reason"`
}

func deadLetterOf(job *asynq.TaskInfo) deadLetter {
	reason := job.LastErr
	if reason == context.Canceled.Error() {
		reason = "cancelled" // asynq's word for it
	}
	tries := job.Retried + 1
	if strings.HasPrefix(reason, gaveUp) {
		tries-- // the last time it was delivered it wasn't run
	}
	return deadLetter{job.ID, job.Type, job.Queue, tries, job.LastFailedAt.UTC(), reason}
}

func (c *archiveLsCmd) Run() error {
	return c.withArchive(func(ctx context.Context, a *archive) error {
		jobs, err := a.list(ctx, c.archiveFilter)
		if err != nil {
			return err
		}
		if c.JSON {
			enc := json.NewEncoder(os.Stdout)
			for _, job := range jobs {
				if err := enc.Encode(deadLetterOf(job)); err != nil {
					return err
				}
			}
			return nil
		}
		w := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', 0)
		fmt.Fprintln(w, "ID\tKIND\tQUEUE\tTRIES\tARCHIVED\tREASON")
		for _, job := range jobs {
			d := deadLetterOf(job)
			fmt.Fprintf(w, "%s\t%s\t%s\t%d\t%s\t%s\n", d.ID, d.Kind, d.Queue, d.Tries, d.ArchivedAt.Format(time.DateTime), printable(d.Reason))
		}
		if err := w.Flush(); err != nil {
			return err
		}
		a.warnIfNearlyFull(ctx)
		return nil
	})
}

// nearlyFull returns the queues whose archive is about to drop jobs.
func (a *archive) nearlyFull(ctx context.Context) (queues []string) {
	names, err := a.inspector.Queues()
	if err != nil {
		return nil
	}
	for _, queue := range names {
		if n, err := a.rdb.ZCard(ctx, asynqkey.List(queue, "archived")).Result(); err == nil && n >= archiveWarning {
			queues = append(queues, queue)
		}
	}
	return queues
}

func (a *archive) warnIfNearlyFull(ctx context.Context) {
	for _, queue := range a.nearlyFull(ctx) {
		fmt.Fprintf(os.Stderr, "the archive of queue %s is nearly full: beyond %d jobs, or after 90 days, the oldest are dropped\n", queue, archiveLimit)
	}
}

type archiveShowCmd struct {
	ID      string `arg:"" help:"The job's id."`
	Payload bool   `help:"Show the payload as well."`

	redisSettings `embed:""`
}

func (c *archiveShowCmd) Run() error {
	return c.withArchive(func(ctx context.Context, a *archive) error {
		jobs, err := a.choose(ctx, archiveSelection{IDs: []string{c.ID}})
		if err != nil {
			return err
		}
		job := jobs[0]
		d := deadLetterOf(job)
		w := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', 0)
		fmt.Fprintf(w, "id\t%s\nkind\t%s\nqueue\t%s\ntries\t%d\narchived\t%s\nreason\t%s\n",
			d.ID, d.Kind, d.Queue, d.Tries, d.ArchivedAt.Format(time.RFC3339), d.Reason)
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

func (c *archiveRetryCmd) Run() error {
	return c.change("put back on its queue", (*archive).retry)
}

type archiveDeleteCmd struct {
	archiveSelection `embed:""`
}

func (c *archiveDeleteCmd) Run() error {
	return c.change("deleted", func(a *archive, _ context.Context, job *asynq.TaskInfo) error {
		return a.inspector.DeleteTask(job.Queue, job.ID)
	})
}

// change does something to each job of the selection, and says what it did.
func (s archiveSelection) change(done string, do func(*archive, context.Context, *asynq.TaskInfo) error) error {
	return s.withArchive(func(ctx context.Context, a *archive) error {
		jobs, err := a.choose(ctx, s)
		if err != nil {
			return err
		}
		n := 0
		for _, job := range jobs {
			err := cmp.Or(ctx.Err(), do(a, ctx, job))
			if errors.Is(err, asynq.ErrTaskNotFound) {
				continue // somebody else was faster
			}
			if duplicate, ok := errors.AsType[*tasks.DuplicateError](err); ok {
				fmt.Fprintf(os.Stderr, "%s %s stays: job %s holds its unique key by now\n", job.ID, job.Type, duplicate.ID)
				continue
			}
			if err != nil {
				return fmt.Errorf("job %s: %w (%d of %d jobs were %s)", job.ID, err, n, len(jobs), done)
			}
			fmt.Printf("%s %s %s\n", job.ID, job.Type, done)
			n++
		}
		if len(jobs) == 0 {
			fmt.Fprintln(os.Stderr, "no job of the archive fits; nothing was changed")
		}
		return nil
	})
}

// retryScript moves a job from the archive to its queue.
var retryScript = redis.NewScript(`
if redis.call("ZREM", KEYS[1], ARGV[1]) == 0 then return 0 end
redis.call("HSET", KEYS[3], "msg", ARGV[2], "state", "pending", "pending_since", ARGV[3])
redis.call("HDEL", KEYS[3], "` + freeField + `")
redis.call("LPUSH", KEYS[2], ARGV[1])
return 1`)

// retry puts a job back. asynq's own way of it leaves the tries used up, so that
// the next failure would be the last.
func (a *archive) retry(ctx context.Context, job *asynq.TaskInfo) error {
	key := asynqkey.Task(job.Queue, job.ID)
	data, err := a.rdb.HGet(ctx, key, "msg").Bytes()
	if errors.Is(err, redis.Nil) {
		return asynq.ErrTaskNotFound
	}
	if err != nil {
		return err
	}
	msg, err := parseMessage(data)
	if err != nil {
		return err
	}
	if err := tasks.NewClient(a.rdb).RetakeUnique(ctx, job.Queue, job.ID, job.Headers); err != nil {
		return err
	}
	msg.retried = 0
	keys := []string{asynqkey.List(job.Queue, "archived"), asynqkey.List(job.Queue, "pending"), key}
	moved, err := retryScript.Run(ctx, a.rdb, keys, job.ID, msg.encode(), time.Now().UnixNano()).Int()
	if err == nil && moved == 0 {
		return asynq.ErrTaskNotFound
	}
	return err
}
