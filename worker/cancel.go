package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"regexp"

	"github.com/carpool-go/carpool/dbpool"
	"github.com/carpool-go/carpool/tasks"
)

type cancelCmd struct {
	ID string `arg:"" help:"The job's id."`

	redisSettings    `embed:""`
	databaseSettings `embed:""`
}

// Run is `worker cancel`. A job that is still in the outbox, for which
// DATABASE_URL must be set, is removed there.
func (c *cancelCmd) Run() error {
	return c.withArchive(func(ctx context.Context, a *archive) error {
		if err := c.cancel(ctx, tasks.NewClient(a.rdb)); err != nil {
			return err
		}
		fmt.Println(c.ID, "cancelled")
		return nil
	})
}

func (c *cancelCmd) cancel(ctx context.Context, client *tasks.Client) error {
	if c.DatabaseURL == "" || !isUUID.MatchString(c.ID) {
		return client.Cancel(ctx, c.ID)
	}
	removed, err := c.removeFromOutbox(ctx)
	if err != nil {
		return fmt.Errorf("look for job %s in the outbox: %w", c.ID, err)
	}
	// A relay may have moved it to Redis before its row could be removed.
	err = client.Cancel(ctx, c.ID)
	if removed && errors.Is(err, tasks.ErrNoSuchJob) {
		return nil
	}
	return err
}

// isUUID tells the ids that the outbox makes.
var isUUID = regexp.MustCompile(`^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$`)

func (c *cancelCmd) removeFromOutbox(ctx context.Context) (removed bool, err error) {
	var f faults
	cfg := dbpool.DefaultConfig(f.databaseURL(c.DatabaseURL))
	if err := f.err(); err != nil {
		return false, err
	}
	cfg.Size, cfg.MaxOverflow, cfg.Timeout = 1, 0, statusTimeout
	cfg.Logger = slog.New(slog.DiscardHandler)
	db, err := dbpool.Open(ctx, cfg)
	if err != nil {
		return false, err
	}
	defer db.Close()
	tag, err := db.Exec(ctx, "DELETE FROM carpool.outbox WHERE id = $1::text::uuid", c.ID)
	return tag.RowsAffected() > 0, err
}
