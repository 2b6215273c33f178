package scheduler

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"

	"github.com/carpool-go/carpool/dbpool"
	"github.com/carpool-go/carpool/internal/outbox"
	"github.com/carpool-go/carpool/internal/pgtext"
)

var (
	// ErrExists is wrapped by the error of [Add] for an entry whose name is taken.
	ErrExists = errors.New("there is an entry of this name already")
	// ErrNotFound is wrapped by the errors of [SetEnabled], [Remove] and [RunNow] for
	// an entry that carpool.schedules doesn't have.
	ErrNotFound = errors.New("there is no entry of this name")
)

const (
	// insertSQL takes the [definition.args]. What is done about an entry of the same name
	// is to follow.
	insertSQL = `INSERT INTO carpool.schedules AS s
		(name, cron, time_zone, kind, payload, queue, max_retry, timeout, retention, missed, overlap, source)
	VALUES ($1, $2, $3, $4, $5, $6, $7, make_interval(secs => $8), make_interval(secs => $9), $10, $11, $12)
	ON CONFLICT (name) DO `
	// updateSQL puts the new definition in the place of the old one.
	updateSQL = `(cron, time_zone, kind, payload, queue, max_retry, timeout, retention, missed, overlap)
		= (excluded.cron, excluded.time_zone, excluded.kind, excluded.payload, excluded.queue, excluded.max_retry,
			excluded.timeout, excluded.retention, excluded.missed, excluded.overlap)`

	addSQL     = insertSQL + `NOTHING`
	replaceSQL = insertSQL + `UPDATE SET ` + updateSQL + `, source = excluded.source, problem = NULL`
)

// args are those of insertSQL; source is "code" or "table".
func (d definition) args(source string) []any {
	return []any{d.name, d.cron, d.zone, d.kind, d.payload, d.queue, d.maxRetry, d.timeout, d.retention, d.missed, d.overlap, source}
}

// Add validates an entry and writes it to carpool.schedules; running workers take it
// up within a second. Where another entry has its name, Add puts this one in its place
// if replace is true, enabled or disabled as that one was; else the error wraps
// [ErrExists]. Any other error is that of [Entry.Validate], or of Postgres, which refuses a
// payload above the limit that the workers have written to it, with the code 22023.
func Add(ctx context.Context, db *dbpool.Pool, e Entry, replace bool) error {
	if err := e.Validate(); err != nil {
		return fmt.Errorf("scheduler: add: %w", err)
	}
	d, err := e.definition()
	if err != nil {
		return fmt.Errorf("scheduler: add: %w", err)
	}
	sql := addSQL
	if replace {
		sql = replaceSQL
	}
	tag, err := db.Exec(ctx, sql, d.args("table")...)
	if err != nil {
		return fmt.Errorf("scheduler: add %.100q: %w", e.Name, err)
	}
	if tag.RowsAffected() == 0 {
		return fmt.Errorf("scheduler: add %.100q: %w", e.Name, ErrExists)
	}
	return nil
}

// SetEnabled enables or disables an entry. The ticks that pass while it is disabled
// don't count as missed. The error wraps [ErrNotFound] if there is no entry of this
// name; any other is that of Postgres.
func SetEnabled(ctx context.Context, db *dbpool.Pool, name string, enabled bool) error {
	tag, err := db.Exec(ctx, "UPDATE carpool.schedules SET enabled = $2, problem = NULL WHERE name = $1", name, enabled)
	if err == nil && tag.RowsAffected() == 0 {
		err = ErrNotFound
	}
	if err != nil {
		return fmt.Errorf("scheduler: enable or disable %.100q: %w", name, err)
	}
	return nil
}

// Remove deletes an entry and returns its source, as in [Status]. An entry of the code
// comes back when a worker starts that has it. The error wraps [ErrNotFound] if there
// is no entry of this name; any other is that of Postgres.
func Remove(ctx context.Context, db *dbpool.Pool, name string) (source string, err error) {
	err = db.QueryRow(ctx, "DELETE FROM carpool.schedules WHERE name = $1 RETURNING source", name).Scan(&source)
	if errors.Is(err, pgx.ErrNoRows) {
		err = ErrNotFound
	}
	if err != nil {
		return "", fmt.Errorf("scheduler: remove %.100q: %w", name, err)
	}
	return source, nil
}

// RunNow enqueues the entry's job at once, enabled or not, and returns the job's id.
// This is no tick: the ticks go on as they would have, and the entry's overlap does not
// count the job. The error wraps [ErrNotFound] if there is no entry of this name; any
// other is that of Postgres.
func RunNow(ctx context.Context, db *dbpool.Pool, name string) (id string, err error) {
	failed := func(err error) (string, error) { return "", fmt.Errorf("scheduler: run %.100q: %w", name, err) }
	v7, err := uuid.NewV7()
	if err != nil {
		return failed(err)
	}
	var d definition
	err = db.QueryRow(ctx, `SELECT kind, payload::text, queue, max_retry, extract(epoch FROM timeout)::float8, extract(epoch FROM retention)::float8
		FROM carpool.schedules WHERE name = $1`, name).Scan(&d.kind, &d.payload, &d.queue, &d.maxRetry, &d.timeout, &d.retention)
	if errors.Is(err, pgx.ErrNoRows) {
		err = ErrNotFound
	}
	if err != nil {
		return failed(err)
	}
	job := new(pgx.Batch)
	outbox.Insert(job, d.job(v7))
	if err := db.SendBatch(ctx, job).Close(); err != nil {
		return failed(err)
	}
	return v7.String(), nil
}

// Status is an entry as carpool.schedules has it, and how far it is.
type Status struct {
	// Name, Cron, TimeZone, Missed and Overlap are as in [Entry]. Defaults are
	// spelled out: the time zone, for one, is "UTC" and not "".
	Name     string `json:"name"`
	Cron     string `json:"cron"`
	TimeZone string `json:"time_zone"`
	// Kind is its jobs', and Queue theirs if it is not the kind's own, else "".
	Kind    string  `json:"kind"`
	Queue   string  `json:"queue,omitempty"`
	Missed  Missed  `json:"missed"`
	Overlap Overlap `json:"overlap"`
	// Enabled is false for an entry that [SetEnabled] has disabled.
	Enabled bool `json:"enabled"`
	// Source is "code" for an entry that a program brings along, else "table".
	Source string `json:"source"`
	// LastTick is the last tick that was enqueued, in UTC, and LastJob the job's
	// id; zero if there was none.
	LastTick time.Time `json:"last_tick,omitzero"`
	LastJob  string    `json:"last_job,omitempty"`
	// NextTick is the first tick after now, in UTC; zero for an entry that is
	// disabled, or can't be read.
	NextTick time.Time `json:"next_tick,omitzero"`
	// Problem is why the entry is not run, as the workers found out; "" if nothing
	// is known of any.
	Problem string `json:"problem,omitempty"`
}

// List returns all entries by name, none if there is none. The error is that of
// Postgres.
func List(ctx context.Context, db *dbpool.Pool) ([]Status, error) {
	query, err := db.Query(ctx, selectAll("clock_timestamp()"))
	if err != nil {
		return nil, fmt.Errorf("scheduler: list: %w", err)
	}
	rows, err := pgx.CollectRows(query, scanRow)
	if err != nil {
		return nil, fmt.Errorf("scheduler: list: %w", err)
	}
	list := make([]Status, len(rows))
	for i := range rows {
		r := &rows[i]
		list[i] = Status{
			Name: r.name, Cron: r.cron, TimeZone: r.zone, Kind: r.kind, Queue: textOf(r.queue), Missed: r.missed, Overlap: r.overlap,
			Enabled: r.enabled, Source: r.source, LastJob: textOf(r.jobID), Problem: textOf(r.problem),
		}
		if r.firedTick != nil {
			list[i].LastTick = r.firedTick.UTC()
		}
		schedule, err := ParseSchedule(r.cron, r.zone)
		if err != nil {
			list[i].Problem = pgtext.Clean(err.Error())
		} else if r.enabled {
			list[i].NextTick = schedule.Next(later(r.now, r.position().since()))
		}
	}
	return list, nil
}
