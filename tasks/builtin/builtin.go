// Package builtin has the ready-made kinds of job in one group, with the settings they
// need: csv:import, webhook:deliver and rows:prune. It is for programs that run a worker,
// which add the group [Tasks] to their own:
//
//	func main() { cli.Main(&builtin.Tasks{}, &shop.Tasks{}) }
//
// Services that only enqueue use the packages of the kinds: csvimport, webhook and
// rowsprune.
package builtin

import (
	"context"
	"errors"
	"fmt"
	"os"

	"github.com/carpool-go/carpool/tasks"
	"github.com/carpool-go/carpool/tasks/csvimport"
	"github.com/carpool-go/carpool/tasks/rowsprune"
	"github.com/carpool-go/carpool/tasks/webhook"
)

// Tasks is the group of the ready-made kinds. Its fields are their settings; they are
// read when a job runs, so they may be set after the group was registered and before
// the first job. The zero value works: a job that needs a setting is archived, and its
// reason names the variable.
type Tasks struct {
	// ImportDir is the folder below which csv:import may read files; "" refuses
	// them all. It must exist when the program starts.
	ImportDir string `env:"IMPORT_DIR" placeholder:"DIR" help:"csv:import may read file: sources below this folder; unset, it refuses them."`
	// ImportMaxMB is how many megabytes a file from the web may have that csv:import
	// downloads, unpacked; 0 means 1024.
	ImportMaxMB int `env:"IMPORT_MAX_MB" default:"1024" help:"csv:import refuses files from the web with more megabytes than this, unpacked."`
	// PruneAllow lists the tables of which rows:prune may delete rows: schema.table, separated
	// by commas, spelt as in the catalog; "" refuses them all. carpool's own are refused.
	PruneAllow string `env:"PRUNE_ALLOW" placeholder:"SCHEMA.TABLE,…" help:"rows:prune may delete rows of these tables: schema.table, separated by commas; unset, it refuses them all."`
	// WebhookSecret signs what webhook:deliver sends: "whsec_" and base64 of 24 to 64
	// bytes. "" refuses to deliver any.
	WebhookSecret string `env:"WEBHOOK_SECRET" secret:"" placeholder:"whsec_…" help:"webhook:deliver signs with this; unset, it refuses to deliver."`
}

// maxImportMB is a TB, more than any worker's disk.
const maxImportMB = 1 << 20

// Register adds csv:import, webhook:deliver and rows:prune to s.
func (t *Tasks) Register(s *tasks.Set) {
	tasks.RegisterOnce(s, t.importCSV)
	tasks.Register(s, t.deliverWebhook)
	tasks.Register(s, t.pruneRows)
}

func (t *Tasks) importCSV(ctx context.Context, job *tasks.Job, p csvimport.Import) (csvimport.Result, error) {
	return csvimport.Importer{Dir: t.ImportDir, MaxBytes: int64(t.ImportMaxMB) << 20}.Handle(ctx, job, p)
}

func (t *Tasks) deliverWebhook(ctx context.Context, job *tasks.Job, p webhook.Deliver) (webhook.Result, error) {
	return webhook.Deliverer{Secret: t.WebhookSecret}.Handle(ctx, job, p)
}

func (t *Tasks) pruneRows(ctx context.Context, job *tasks.Job, p rowsprune.Prune) (rowsprune.Result, error) {
	tables, err := rowsprune.ParseTables(t.PruneAllow)
	if err != nil {
		return rowsprune.Result{}, tasks.Permanent(fmt.Errorf("PRUNE_ALLOW is wrong: %w", err))
	}
	return rowsprune.Pruner{Tables: tables}.Handle(ctx, job, p)
}

// Check returns what is wrong with the settings, every fault at once, joined by
// [errors.Join]; nil if nothing is. A fault names its variable and an example, and shows
// no secret. The command line calls it before a worker starts.
func (t *Tasks) Check() error {
	var faults []error
	if t.ImportDir != "" {
		if info, err := os.Stat(t.ImportDir); err != nil || !info.IsDir() {
			faults = append(faults, fmt.Errorf("IMPORT_DIR is %q, which is not a folder that can be read; for example IMPORT_DIR=/var/imports", t.ImportDir))
		}
	}
	if t.ImportMaxMB < 0 || t.ImportMaxMB > maxImportMB {
		faults = append(faults, fmt.Errorf("IMPORT_MAX_MB is %d, which is not a whole number from 1 to %d; for example IMPORT_MAX_MB=1024", t.ImportMaxMB, maxImportMB))
	}
	if _, err := rowsprune.ParseTables(t.PruneAllow); err != nil {
		faults = append(faults, fmt.Errorf("PRUNE_ALLOW is wrong: %w; for example PRUNE_ALLOW=public.events,app.logins", err))
	}
	if t.WebhookSecret != "" {
		if err := webhook.ValidateSecret(t.WebhookSecret); err != nil {
			faults = append(faults, fmt.Errorf("WEBHOOK_SECRET is wrong: %w; for example WEBHOOK_SECRET=whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw", err))
		}
	}
	return errors.Join(faults...)
}
