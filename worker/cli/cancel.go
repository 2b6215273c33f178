package cli

import (
	"context"
	"errors"
	"fmt"

	"github.com/carpool-go/carpool/admin"
	"github.com/carpool-go/carpool/tasks"
)

type cancelCmd struct {
	ID string `arg:"" help:"The job's id."`

	redisSettings    `embed:""`
	databaseSettings `embed:""`
}

// Run cancels the job. One that is still in the outbox is removed there, for which
// DATABASE_URL must be set.
func (c *cancelCmd) Run(ctx context.Context, in *invocation) error {
	return in.withAdmin(c.redisSettings, c.databaseSettings, func(a *admin.Admin) error {
		err := a.Cancel(ctx, c.ID)
		if errors.Is(err, admin.ErrNoDatabase) {
			return fmt.Errorf("tasks: cancel job %s: %w in Redis; the outbox was not looked at, as DATABASE_URL is not set", c.ID, tasks.ErrNoSuchJob)
		}
		if err != nil {
			return err
		}
		_, err = fmt.Fprintln(in.stdout, c.ID, "cancelled")
		return err
	})
}
