// Package rowsprune has the kind of job rows:prune, which deletes the rows of a table
// that are older than a given age. It is for services that enqueue or schedule such jobs:
// [Prune] is the payload, and [Result] what comes of it.
//
// Workers have the kind with the group of package builtin. A group of one's own registers
// [Pruner.Handle] with [tasks.Register].
package rowsprune

import (
	"context"
	"errors"
	"fmt"
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
//
// A worker prunes those tables that its operator lists, see [Pruner].
type Prune struct {
	// Table is schema.table, or a table of the schema public, spelt as in the catalog.
	Table string `json:"table" doc:"schema.table, or a table of the schema public; the worker's PRUNE_ALLOW must list it" example:"public.events"`
	// Column is a timestamptz, timestamp or date column that tells a row's age. With an
	// index that begins with it, only old rows are read; else the whole table is, once.
	Column string `json:"column" doc:"a timestamptz, timestamp or date column that tells a row's age" example:"at"`
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

// Validate returns what is wrong with the form of the fields. Whether the table is one that
// the worker prunes, and is there with the column, is found out when the job runs.
func (p Prune) Validate() error {
	if err := p.table().check(); err != nil {
		return fmt.Errorf("table: %w", err)
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

// table is the one that the payload names.
func (p Prune) table() table {
	if t, ok := cutTable(p.Table); ok {
		return t
	}
	return table{"public", p.Table}
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

// Pruner runs rows:prune. The zero value prunes no table.
type Pruner struct {
	// Tables are those that may be pruned, from [ParseTables].
	Tables Tables
}

// Handle deletes the rows. It is a handler for [tasks.Register]. Between two batches it
// gives its connection back, so that whoever waits for the pool comes first. It waits for
// no row that others have locked, and counts how many it left.
//
// A table that is not one of p.Tables, a table or column that isn't there or isn't
// suitable (a view, a foreign table), a missing privilege (SELECT, UPDATE for the locks, and
// DELETE), and rows that a foreign key or a trigger keeps, are permanent errors; batches
// deleted before stay deleted. The other errors are the database's.
func (p Pruner) Handle(ctx context.Context, job *tasks.Job, payload Prune) (Result, error) {
	var result Result
	of := payload.table()
	if !p.Tables.has(of) {
		return result, tasks.Permanent(p.Tables.refusal(of))
	}
	age, err := prune.ParseAge(payload.OlderThan)
	if err != nil {
		return result, tasks.Permanent(fmt.Errorf("older_than: %w", err))
	}
	result.Left, err = prune.Run{
		DB: job.DB, Schema: of.schema, Table: of.name, Column: payload.Column, OlderThan: age, Batch: payload.Batch,
		Deleted: func(rows int64) {
			result.Deleted += rows
			result.Batches++
			// A progress that can't be shown is no reason to stop.
			_ = job.Progress(ctx, result)
		},
	}.Do(ctx)
	if err != nil {
		err = fmt.Errorf("prune %s: %w", of, err)
	}
	if _, ok := errors.AsType[*prune.PermanentError](err); ok {
		err = tasks.Permanent(err)
	}
	return result, err
}
