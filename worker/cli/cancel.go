package cli

import (
	"context"
	"fmt"

	"github.com/carpool-go/carpool/admin"
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
		if err := a.Cancel(ctx, c.ID); err != nil {
			return err
		}
		_, err := fmt.Fprintln(in.stdout, c.ID, "cancelled")
		return err
	})
}
