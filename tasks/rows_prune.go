package tasks

import (
	"context"
	"errors"
	"fmt"
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgtype"

	"github.com/carpool-go/carpool/dbpool"
)

// RowsPrune deletes the rows of a table that are older than a given age, in
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
type RowsPrune struct {
	Table     string `json:"table" doc:"schema.table, or a table of the schema public" example:"carpool.webhook_deliveries"`
	Column    string `json:"column" doc:"a timestamptz, timestamp or date column that tells a row's age" example:"delivered_at"`
	OlderThan string `json:"older_than" doc:"the age: days and Go's units, such as 30d, 1d12h or 90m" example:"30d"`
	Batch     int    `json:"batch,omitempty" doc:"rows a transaction, 1 to 50000; 1000 if left out" example:"1000"`
}

const (
	pruneBatch    = 1000
	pruneMaxBatch = 50_000
)

// Kind returns "rows:prune".
func (RowsPrune) Kind() string { return "rows:prune" }

// Options: the first run on a large table may take an hour, and the result stays
// for a day.
func (RowsPrune) Options() Options {
	return Options{Timeout: time.Hour, Retention: 24 * time.Hour}
}

// Validate checks the fields' form. That the table and the column are there is
// checked when the job runs.
func (p RowsPrune) Validate() error {
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
	if _, err := parseAge(p.OlderThan); err != nil {
		return fmt.Errorf("older_than: %w", err)
	}
	if p.Batch < 0 || p.Batch > pruneMaxBatch {
		return fmt.Errorf("batch: must be 1 to %d; left out, it is %d", pruneMaxBatch, pruneBatch)
	}
	return nil
}

// tableName splits the table's name; a name of three parts has a table with a
// dot, which isIdentifier refuses.
func (p RowsPrune) tableName() (schema, table string) {
	schema, table, ok := strings.Cut(p.Table, ".")
	if !ok {
		return "public", p.Table
	}
	return schema, table
}

func isIdentifier(s string) bool {
	return s != "" && len(s) <= maxIdentifier && !strings.ContainsAny(s, ".\"\x00")
}

var ageDays = regexp.MustCompile(`^(\d{1,6})d(.*)$`)

// parseAge reads a Go duration that may begin with days of 24 hours. It must be
// above zero.
func parseAge(s string) (time.Duration, error) {
	bad := errors.New("must be an age above zero, such as 30d, 1d12h or 90m")
	const day = 24 * time.Hour
	var days, rest time.Duration
	if m := ageDays.FindStringSubmatch(s); m != nil {
		n, err := strconv.Atoi(m[1])
		if err != nil || n > 100*365 {
			return 0, errors.New("must be at most 36500d")
		}
		days, s = time.Duration(n)*day, m[2]
		if s == "" {
			s = "0"
		}
	}
	rest, err := time.ParseDuration(s)
	if err != nil || rest < 0 || days+rest <= 0 {
		return 0, bad
	}
	return days + rest, nil
}

// RowsPruneResult says what was deleted.
type RowsPruneResult struct {
	Deleted int64 `json:"deleted"`
	// Batches is how many transactions deleted something.
	Batches int64 `json:"batches"`
	// Left is how many old rows were passed over, because somebody else had
	// locked them. The next run takes them.
	Left int64 `json:"left,omitempty"`
}

// HandleRowsPrune deletes the rows. Between two batches it gives its connection
// back, so that whoever waits for the pool comes first. It waits for no row that
// others have locked, and says how many it left.
//
// A table or column that isn't there or isn't suitable, a missing privilege
// (SELECT, UPDATE for the locks, and DELETE), and rows that a foreign key still
// needs, are permanent errors; batches deleted before stay deleted.
func HandleRowsPrune(ctx context.Context, job *Job, p RowsPrune) (RowsPruneResult, error) {
	var result RowsPruneResult
	age, err := parseAge(p.OlderThan)
	if err != nil {
		return result, Permanent(fmt.Errorf("older_than: %w", err))
	}
	prune := rowsPrune{
		db: job.DB, column: p.Column, batch: p.Batch,
		done: func(deleted int64) {
			result.Deleted += deleted
			result.Batches++
			// A progress that can't be shown is no reason to stop.
			_ = job.Progress(ctx, result)
		},
	}
	if prune.batch == 0 {
		prune.batch = pruneBatch
	}
	schema, table := p.tableName()
	tables, err := prune.find(ctx, schema, table, age)
	for i := 0; err == nil && i < len(tables); i++ {
		walk := prune.alongHeap
		if tables[i].Indexed {
			walk = prune.alongIndex
		}
		var left int64
		left, err = walk(ctx, tables[i])
		result.Left += left
	}
	if err != nil {
		return result, pruneError(p, err)
	}
	return result, nil
}

func pruneError(p RowsPrune, err error) error {
	wrapped := fmt.Errorf("prune %s: %w", p.Table, err)
	e, ok := errors.AsType[*pgconn.PgError](err)
	if !ok {
		return wrapped
	}
	switch class := e.Code[:2]; {
	case e.Code == "42P01": // a partition that was dropped meanwhile
		return wrapped
	case class == "23", class == "42": // integrity constraints; access and definitions
		return Permanent(wrapped)
	case class == "P0": // its text is the trigger's own, and may quote the row
		return Permanent(&databaseError{fmt.Sprintf("prune %s: a trigger refuses to delete a row (SQLSTATE %s)", p.Table, e.Code), err})
	}
	return wrapped
}

// rowsPrune is one run.
type rowsPrune struct {
	db     *dbpool.Pool
	column string
	typ    string // the column's
	cutoff string // the first value of the column, as text, that is not old
	batch  int
	done   func(deleted int64) // is called after each batch
}

// prunedTable is a table that has rows of its own: the one that was named, or one
// of its partitions or heirs.
type prunedTable struct {
	Name    pgx.Identifier
	Kind    string // pg_class.relkind
	Indexed bool   // the column leads an index
}

// find looks the table and its column up, and the tables that have its rows.
func (p *rowsPrune) find(ctx context.Context, schema, table string, age time.Duration) ([]prunedTable, error) {
	var oid, typ uint32
	var kind string
	err := p.db.QueryRow(ctx, `
		SELECT c.oid, c.relkind::text, coalesce(a.atttypid, 0), coalesce(format_type(a.atttypid, NULL), '')
		FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
		LEFT JOIN pg_attribute a ON a.attrelid = c.oid AND a.attname = $3 AND a.attnum > 0 AND NOT a.attisdropped
		WHERE n.nspname = $1 AND c.relname = $2`, schema, table, p.column).Scan(&oid, &kind, &typ, &p.typ)
	switch {
	case errors.Is(err, pgx.ErrNoRows):
		return nil, Permanent(fmt.Errorf("there is no table %q in the schema %q", table, schema))
	case err != nil:
		return nil, err
	case kind != "r" && kind != "p":
		return nil, Permanent(errors.New("it is not a table"))
	case typ == 0:
		return nil, Permanent(fmt.Errorf("there is no column %q", p.column))
	case typ != pgtype.TimestamptzOID && typ != pgtype.TimestampOID && typ != pgtype.DateOID:
		return nil, Permanent(fmt.Errorf("column %q is %s; it must be timestamptz, timestamp or date", p.column, p.typ))
	}
	err = p.db.QueryRow(ctx, "SELECT "+isoText("(now() - make_interval(secs => $1))::"+p.typ), age.Seconds()).Scan(&p.cutoff)
	if err != nil {
		return nil, err
	}

	rows, err := p.db.Query(ctx, `
		WITH RECURSIVE family AS (
			SELECT $1::oid AS oid UNION SELECT i.inhrelid FROM pg_inherits i JOIN family f ON i.inhparent = f.oid
		)
		SELECT ARRAY[n.nspname::text, c.relname::text], c.relkind::text, EXISTS (
			SELECT FROM pg_index x JOIN pg_attribute a ON a.attrelid = x.indrelid AND a.attnum = x.indkey[0]
			JOIN pg_class i ON i.oid = x.indexrelid JOIN pg_am m ON m.oid = i.relam
			WHERE x.indrelid = c.oid AND a.attname = $2 AND x.indisvalid AND x.indpred IS NULL AND m.amname = 'btree'
		)
		FROM family f JOIN pg_class c ON c.oid = f.oid JOIN pg_namespace n ON n.oid = c.relnamespace
		WHERE c.relkind <> 'p' ORDER BY 1`, oid, p.column)
	if err != nil {
		return nil, err
	}
	tables, err := pgx.CollectRows(rows, pgx.RowToStructByPos[prunedTable])
	if err != nil {
		return nil, err
	}
	for _, t := range tables {
		if t.Kind != "r" {
			return nil, Permanent(fmt.Errorf("its partition %s is not in this database; prune it where it is", t.Name.Sanitize()))
		}
	}
	return tables, nil
}

// isoText turns a date or time into text that every session reads as the same
// value, whatever its DateStyle is. JSON has it so.
func isoText(expr string) string { return "to_jsonb(" + expr + ") #>> '{}'" }

// alongIndex deletes the oldest rows first, and returns how many of the table's
// old rows are left. Each batch begins at the value that the last one came to:
// what is deleted stays in the index while any older transaction runs, and to walk
// over all of it for each batch takes quadratic time (ten times as long for 500
// batches, beside a long report).
func (p *rowsPrune) alongIndex(ctx context.Context, t prunedTable) (left int64, err error) {
	sql := p.sql(t, `
		WITH old AS MATERIALIZED (
			SELECT t.ctid AS at, t.%c AS age FROM ONLY %t t WHERE t.%c < $1::%y AND t.%c >= $2::%y
			ORDER BY t.%c LIMIT $3 FOR UPDATE SKIP LOCKED
		), gone AS (
			DELETE FROM ONLY %t WHERE ctid = ANY(ARRAY(SELECT at FROM old)) AND %c < $1::%y RETURNING 1
		)
		SELECT (SELECT count(*) FROM old), (SELECT count(*) FROM gone),
			(SELECT `+isoText("max(age)")+` FROM old)`)
	from := "-infinity"
	for {
		var found, deleted int64
		var last *string
		if err := p.db.QueryRow(ctx, sql, p.cutoff, from, p.batch).Scan(&found, &deleted, &last); err != nil {
			return 0, err
		}
		if deleted > 0 {
			p.done(deleted)
			from = *last
		}
		// Found and not deleted: a trigger keeps them.
		if found < int64(p.batch) || deleted == 0 {
			break
		}
	}
	err = p.db.QueryRow(ctx, p.sql(t, "SELECT count(*) FROM ONLY %t WHERE %c < $1::%y"), p.cutoff).Scan(&left)
	return left, err
}

// pruneStretch is how many pages of 8 kB alongHeap looks at in one statement.
const pruneStretch = 2048

// alongHeap deletes rows in the order in which they lie, stretch by stretch, so
// that a table without a suitable index is read but once, and each statement is
// short even where old rows are rare. It returns how many old rows are left.
func (p *rowsPrune) alongHeap(ctx context.Context, t prunedTable) (left int64, err error) {
	var pages int64
	err = p.db.QueryRow(ctx, "SELECT pg_relation_size($1::text::regclass) / current_setting('block_size')::int",
		t.Name.Sanitize()).Scan(&pages)
	if err != nil {
		return 0, err
	}
	const old = "FROM ONLY %t WHERE %c < $1::%y AND ctid >= $2::text::tid AND ctid < $3::text::tid"
	remove := p.sql(t, "DELETE FROM ONLY %t WHERE %c < $1::%y AND ctid = ANY(ARRAY(SELECT ctid "+old+" LIMIT $4 FOR UPDATE SKIP LOCKED))")
	count := p.sql(t, "SELECT count(*) "+old)
	for page := int64(0); page < pages; {
		begin, end := fmt.Sprintf("(%d,0)", page), fmt.Sprintf("(%d,0)", page+pruneStretch)
		tag, err := p.db.Exec(ctx, remove, p.cutoff, begin, end, p.batch)
		if err != nil {
			return 0, err
		}
		if deleted := tag.RowsAffected(); deleted > 0 {
			p.done(deleted)
			if deleted == int64(p.batch) {
				continue // there may be more in this stretch
			}
		}
		var kept int64
		if err := p.db.QueryRow(ctx, count, p.cutoff, begin, end).Scan(&kept); err != nil {
			return 0, err
		}
		left += kept
		page += pruneStretch
	}
	return left, nil
}

// sql fills in what can't be a parameter: %t the table, %c the column, %y its type.
func (p *rowsPrune) sql(t prunedTable, sql string) string {
	return strings.NewReplacer("%t", t.Name.Sanitize(), "%c", pgx.Identifier{p.column}.Sanitize(), "%y", p.typ).Replace(sql)
}
