// Package rowsprune is the kind of job rows:prune, which deletes the rows of a table
// that are older than a given age.
//
// A program that enqueues such jobs uses [Prune]. Workers have the kind with the
// group of package builtin; a worker that wants it alone registers [Handle] with
// [tasks.Register].
package rowsprune

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/carpool-go/carpool/internal/prune"
	"github.com/carpool-go/carpool/tasks"
)

// Prune deletes the rows of a table that are older than a given age, in
// batches, each a short transaction of its own.
//
// It is idempotent by construction: a row that is gone isn't deleted again, so a
// job that was interrupted, and runs again, goes on where it was.
//
// The age is taken from the database's clock when the job begins. A timestamp
// without time zone is read in the time zone of the database's sessions, as
// DEFAULT now() writes it; of a date column, those days are old that have ended
// before. Rows whose column is NULL stay. Rows of partitions and of inheriting
// tables are pruned like the table's own.
type Prune struct {
	Table     string `json:"table" doc:"schema.table, or a table of the schema public" example:"carpool.webhook_deliveries"`
	Column    string `json:"column" doc:"a timestamptz, timestamp or date column that tells a row's age" example:"delivered_at"`
	OlderThan string `json:"older_than" doc:"the age: days and Go's units, such as 30d, 1d12h or 90m" example:"30d"`
	Batch     int    `json:"batch,omitempty" doc:"rows a transaction, 1 to 50000; 1000 if left out" example:"1000"`
}

const (
	maxBatch = 50_000
	// maxIdentifier is how many bytes of a name Postgres keeps (NAMEDATALEN - 1).
	maxIdentifier = 63
)

// Kind returns "rows:prune".
func (Prune) Kind() string { return "rows:prune" }

// Options: the first run on a large table may take an hour, and the result stays
// for a day.
func (Prune) Options() tasks.Options {
	return tasks.Options{Timeout: time.Hour, Retention: 24 * time.Hour}
}

// Validate checks the fields' form. That the table and the column are there is
// checked when the job runs.
func (p Prune) Validate() error {
	schema, table := p.tableName()
	if !isIdentifier(schema) || !isIdentifier(table) {
		return fmt.Errorf("table: must be schema.table or table, each name at most %d bytes and spelt as in the catalog, without quotes", maxIdentifier)
	}
	if strings.HasPrefix(schema, "pg_") || schema == "information_schema" {
		return errors.New("table: the schema is Postgres' own; its rows are not pruned")
	}
	if !isIdentifier(p.Column) {
		return fmt.Errorf("column: must be a column's name, at most %d bytes, without quotes", maxIdentifier)
	}
	if _, err := prune.ParseAge(p.OlderThan); err != nil {
		return fmt.Errorf("older_than: %w", err)
	}
	if p.Batch < 0 || p.Batch > maxBatch {
		return fmt.Errorf("batch: must be 1 to %d; left out, it is %d", maxBatch, prune.DefaultBatch)
	}
	return nil
}

// tableName splits the table's name; a name of three parts has a table with a
// dot, which isIdentifier refuses.
func (p Prune) tableName() (schema, table string) {
	schema, table, ok := strings.Cut(p.Table, ".")
	if !ok {
		return "public", p.Table
	}
	return schema, table
}

func isIdentifier(s string) bool {
	return s != "" && len(s) <= maxIdentifier && !strings.ContainsAny(s, ".\"\x00")
}

// Result says what was deleted.
type Result struct {
	Deleted int64 `json:"deleted"`
	// Batches is how many transactions deleted something.
	Batches int64 `json:"batches"`
	// Left is how many old rows were passed over, because somebody else had
	// locked them. The next run takes them.
	Left int64 `json:"left,omitempty"`
}

// Handle deletes the rows. Between two batches it gives its connection
// back, so that whoever waits for the pool comes first. It waits for no row that
// others have locked, and says how many it left.
//
// A table or column that isn't there or isn't suitable, a missing privilege
// (SELECT, UPDATE for the locks, and DELETE), and rows that a foreign key still
// needs, are permanent errors; batches deleted before stay deleted.
func Handle(ctx context.Context, job *tasks.Job, p Prune) (Result, error) {
	var result Result
	age, err := prune.ParseAge(p.OlderThan)
	if err != nil {
		return result, tasks.Permanent(fmt.Errorf("older_than: %w", err))
	}
	schema, table := p.tableName()
	result.Left, err = prune.Run{
		DB: job.DB, Schema: schema, Table: table, Column: p.Column, OlderThan: age, Batch: p.Batch,
		Deleted: func(rows int64) {
			result.Deleted += rows
			result.Batches++
			// A progress that can't be shown is no reason to stop.
			_ = job.Progress(ctx, result)
		},
	}.Do(ctx)
	if err != nil {
		err = fmt.Errorf("prune %s: %w", p.Table, err)
	}
	if _, ok := errors.AsType[*prune.PermanentError](err); ok {
		err = tasks.Permanent(err)
	}
	return result, err
}
