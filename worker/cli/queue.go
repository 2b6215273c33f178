package cli

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/carpool-go/carpool/admin"
	"github.com/carpool-go/carpool/internal/instance"
)

// queueSetting names a queue.
type queueSetting struct {
	Queue string `arg:"" help:"The queue."`

	redisSettings `embed:""`
}

type pauseCmd struct {
	queueSetting `embed:""`
}

// Run pauses the queue.
func (c *pauseCmd) Run(ctx context.Context, in *invocation) error {
	return c.change(ctx, in, (*admin.Admin).Pause, "is paused: its jobs wait until: "+in.Name+" resume "+c.Queue)
}

type resumeCmd struct {
	queueSetting `embed:""`
}

// Run ends the queue's pause.
func (c *resumeCmd) Run(ctx context.Context, in *invocation) error {
	return c.change(ctx, in, (*admin.Admin).Resume, "is resumed: its jobs are run")
}

// change does something to the queue, and prints how it stands then.
func (c queueSetting) change(ctx context.Context, in *invocation, do func(*admin.Admin, context.Context, string) error, stands string) error {
	return in.withAdmin(c.redisSettings, databaseSettings{}, func(a *admin.Admin) error {
		err := do(a, ctx, c.Queue)
		if errors.Is(err, admin.ErrNoSuchQueue) {
			names, unread := a.QueueNames(ctx)
			if unread != nil {
				return unread
			}
			return fmt.Errorf("queue %q: %w; %s", c.Queue, admin.ErrNoSuchQueue, thereAre(names))
		}
		if err != nil {
			return err
		}
		_, err = fmt.Fprintln(in.stdout, c.Queue, stands)
		return err
	})
}

// thereAre names queues.
func thereAre(queues []string) string {
	if len(queues) == 0 {
		return "there is none yet"
	}
	return "there are: " + printable(strings.Join(queues, ", "))
}

// warnOfQueue says so if nobody pulls from the queue that a job is on. It is no fault, since
// a worker may come. An error is Redis', of which the job is safe.
func (in *invocation) warnOfQueue(ctx context.Context, a *admin.Admin, queue string) {
	served, err := a.ServedQueues(ctx)
	if err != nil || slices.Contains(served, queue) {
		return
	}
	if len(served) == 0 {
		fmt.Fprintf(in.stderr, "no worker is up: the job waits on the queue %s for one\n", queue)
		return
	}
	shared := slices.DeleteFunc(served, instance.IsQueue)
	fmt.Fprintf(in.stderr, "no worker that is up pulls from the queue %s: the job waits there for one; those that are up pull from %s\n",
		queue, printable(strings.Join(shared, ", ")))
}
