// Package rowsprune has the kind of job rows:prune, which deletes the rows of a table
// that are older than a given age. It is for services that enqueue or schedule such jobs:
// [Prune] is the payload, and [Result] what comes of it.
//
// Workers have the kind with the group of package builtin. A group of one's own registers
// [Handle] with [tasks.Register].
package rowsprune

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/carpool-go/carpool/internal/pgtext"
	"github.com/carpool-go/carpool/internal/prune"
	"github.com/carpool-go/carpool/tasks"
)

// Prune is the payload of rows:prune, which deletes the rows of a table that are older than
// a given age, in batches, each a short transaction of its own. It is idempotent: a job
// that was interrupted, and runs again, goes on where it was.
//
// The age is taken from the database's clock when the job begins. A timestamp
// without time zone is read in the time zone of the database's sessions, as
// DEFAULT now() writes it; of a date column, those days are old that have ended
// before. Rows whose column is NULL stay. Rows of partitions and of inheriting
// tables are pruned like the table's own.
type Prune struct {
	// Table is schema.table, or a table of the schema public, spelt as in the catalog.
	Table string `json:"table" doc:"schema.table, or a table of the schema public" example:"carpool.webhook_deliveries"`
	// Column is a timestamptz, timestamp or date column that tells a row's age. With an
	// index that begins with it, only old rows are read; else the whole table is, once.
	Column string `json:"column" doc:"a timestamptz, timestamp or date column that tells a row's age" example:"delivered_at"`
	// OlderThan is the age: days of 24 hours and Go's units, such as 30d, 1d12h or 90m.
	OlderThan string `json:"older_than" doc:"the age: days and Go's units, such as 30d, 1d12h or 90m" example:"30d"`
	// Batch is how many rows a transaction deletes, 1 to 50000; 0 means 1000.
	Batch int `json:"batch,omitempty" doc:"rows a transaction, 1 to 50000; 1000 if left out" example:"1000"`
}

const maxBatch = 50_000

// Kind returns "rows:prune".
func (Prune) Kind() string { return "rows:prune" }

// Options returns a timeout of an hour, because the first run on a large table may take
// that long, and a retention of a day.
func (Prune) Options() tasks.Options {
	return tasks.Options{Timeout: time.Hour, Retention: 24 * time.Hour, SQL: tasks.SQLOperators}
}

// Validate returns what is wrong with the form of the fields. Whether the table and the
// column are there is found out when the job runs.
func (p Prune) Validate() error {
	schema, table := p.tableName()
	if !isIdentifier(schema) || !isIdentifier(table) {
		return fmt.Errorf("table: must be schema.table or table, each name at most %d bytes and spelt as in the catalog, without quotes", pgtext.MaxIdentifier)
	}
	if strings.HasPrefix(schema, "pg_") || schema == "information_schema" {
		return errors.New("table: the schema is Postgres' own; its rows are not pruned")
	}
	if !isIdentifier(p.Column) {
		return fmt.Errorf("column: must be a column's name, at most %d bytes, without quotes", pgtext.MaxIdentifier)
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
	return s != "" && len(s) <= pgtext.MaxIdentifier && !strings.ContainsAny(s, ".\"\x00")
}

// Result is the result of rows:prune.
type Result struct {
	// Deleted is how many rows were deleted.
	Deleted int64 `json:"deleted"`
	// Batches is how many transactions deleted something.
	Batches int64 `json:"batches"`
	// Left is how many old rows were passed over, because somebody else had
	// locked them. A later job takes them.
	Left int64 `json:"left,omitempty"`
}

// Handle deletes the rows. It is a handler for [tasks.Register]. Between two batches it
// gives its connection back, so that whoever waits for the pool comes first. It waits for
// no row that others have locked, and counts how many it left.
//
// A table or column that isn't there or isn't suitable, a missing privilege
// (SELECT, UPDATE for the locks, and DELETE), and rows that a foreign key or a trigger
// keeps, are permanent errors; batches deleted before stay deleted. The other errors are
// the database's.
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
