// Package worker runs background jobs from Redis on one shared pool of Postgres
// connections. It is for programs that embed a worker; most have a main function of one
// line, with package cli, which adds settings and commands:
//
//	func main() { cli.Main(&builtin.Tasks{}, &shop.Tasks{}) }
//
// A worker touches nothing that is the process's: no signals, no environment, no exit.
package worker

import (
	"context"
	"fmt"
	"log/slog"

	"github.com/carpool-go/carpool/dbpool"
	"github.com/carpool-go/carpool/internal/schema"
	"github.com/carpool-go/carpool/tasks"
	"github.com/carpool-go/carpool/tasks/maintenance"
)

// Kinds returns the kinds of job that a worker with these groups runs: the groups', and
// those that every worker has. The error names a kind that is registered twice, or can't
// be.
func Kinds(groups ...tasks.Group) (*tasks.Set, error) { return kinds(&maintenance.Tasks{}, groups) }

func kinds(own *maintenance.Tasks, groups []tasks.Group) (*tasks.Set, error) {
	return tasks.NewSet(append([]tasks.Group{own}, groups...)...)
}

// Migrate brings carpool's tables in the database up to date and writes down the groups'
// kinds, which carpool.enqueue takes from then on. The limit on payloads in the database
// stays what the last worker that started has made it. It logs each migration it applies.
// Several may run at once. A nil log is [slog.Default].
func Migrate(ctx context.Context, databaseURL string, log *slog.Logger, groups ...tasks.Group) error {
	set, err := Kinds(groups...)
	if err != nil {
		return fmt.Errorf("worker: %w", err)
	}
	if log == nil {
		log = slog.Default()
	}
	if err := schema.Migrate(ctx, databaseURL, log); err != nil {
		return err
	}
	cfg := dbpool.DefaultConfig(databaseURL)
	cfg.Size, cfg.MaxOverflow, cfg.Logger = 1, 0, log
	db, err := dbpool.Open(ctx, cfg)
	if err != nil {
		return err
	}
	defer db.Close()
	return tasks.RecordKinds(ctx, db, set)
}
