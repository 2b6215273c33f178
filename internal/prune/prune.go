// Package prune deletes the old rows of a table, in batches that are short
// transactions of their own.
package prune

import (
	"context"
	"errors"
	"fmt"
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/jackc/pgerrcode"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgtype"

	"github.com/carpool-go/carpool/dbpool"
	"github.com/carpool-go/carpool/internal/sqlstate"
)

// Run is one run over a table. Between two batches it gives its connection back, so
// that whoever waits for the pool comes first. It waits for no row that others have
// locked. All fields but Batch are required.
type Run struct {
	DB *dbpool.Pool
	// Schema and Table name the table, as in the catalog.
	Schema, Table string
	// Column tells a row's age: a timestamptz, timestamp or date.
	Column string
	// OlderThan is the age from which on rows are deleted, by the database's clock
	// when the run begins.
	OlderThan time.Duration
	// Batch is how many rows are deleted at a time; 0 means [DefaultBatch].
	Batch int
	// Deleted is called after each batch that deleted rows, with their number.
	Deleted func(rows int64)

	typ    string // the column's
	cutoff string // the first value of the column, as text, that is not old
}

// DefaultBatch is how many rows a run that doesn't say deletes at a time.
const DefaultBatch = 1000

// PermanentError is an error that a further run would meet too.
type PermanentError struct{ err error }

func (e *PermanentError) Error() string { return e.err.Error() }
func (e *PermanentError) Unwrap() error { return e.err }

// Do deletes the rows and returns how many old rows are left because others had
// locked them.
//
// A table or column that isn't there or isn't suitable, a missing privilege
// (SELECT, UPDATE for the locks, and DELETE), and rows that a foreign key or a
// trigger keeps, are a [PermanentError]; batches deleted before stay deleted. The
// other errors are the database's.
func (r Run) Do(ctx context.Context) (left int64, err error) {
	if r.Batch == 0 {
		r.Batch = DefaultBatch
	}
	tables, err := r.find(ctx)
	for i := 0; err == nil && i < len(tables); i++ {
		walk := r.alongHeap
		if tables[i].Indexed {
			walk = r.alongIndex
		}
		var kept int64
		kept, err = walk(ctx, tables[i])
		left += kept
	}
	return left, classify(err)
}

// classify makes those errors of Postgres permanent that are.
func classify(err error) error {
	e, ok := errors.AsType[*pgconn.PgError](err)
	if !ok {
		return err
	}
	switch {
	case e.Code == pgerrcode.UndefinedTable: // a partition that was dropped meanwhile
	case sqlstate.HasClass(e, pgerrcode.IntegrityConstraintViolation, pgerrcode.SyntaxErrorOrAccessRuleViolation):
		return &PermanentError{err}
	case sqlstate.HasClass(e, pgerrcode.PLpgSQLError): // its text is the trigger's own, and may quote the row
		return &PermanentError{&triggerError{e}}
	}
	return err
}

// triggerError is the error of a trigger without its text.
type triggerError struct{ err *pgconn.PgError }

func (e *triggerError) Error() string {
	return fmt.Sprintf("a trigger refuses to delete a row (SQLSTATE %s)", e.err.Code)
}
func (e *triggerError) Unwrap() error { return e.err }

// table is one that has rows of its own: the one that was named, or one of its
// partitions or heirs.
type table struct {
	Name    pgx.Identifier
	Kind    string // pg_class.relkind
	Indexed bool   // the column leads an index
}

// find looks the table and its column up, and the tables that have its rows.
func (r *Run) find(ctx context.Context) ([]table, error) {
	var oid, typ uint32
	var kind string
	err := r.DB.QueryRow(ctx, `
		SELECT c.oid, c.relkind::text, coalesce(a.atttypid, 0), coalesce(format_type(a.atttypid, NULL), '')
		FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
		LEFT JOIN pg_attribute a ON a.attrelid = c.oid AND a.attname = $3 AND a.attnum > 0 AND NOT a.attisdropped
		WHERE n.nspname = $1 AND c.relname = $2`, r.Schema, r.Table, r.Column).Scan(&oid, &kind, &typ, &r.typ)
	switch {
	case errors.Is(err, pgx.ErrNoRows):
		return nil, &PermanentError{fmt.Errorf("there is no table %q in the schema %q", r.Table, r.Schema)}
	case err != nil:
		return nil, err
	case kind != "r" && kind != "p":
		return nil, &PermanentError{errors.New("it is not a table that has its rows in this database")}
	case typ == 0:
		return nil, &PermanentError{fmt.Errorf("there is no column %q", r.Column)}
	case typ != pgtype.TimestamptzOID && typ != pgtype.TimestampOID && typ != pgtype.DateOID:
		return nil, &PermanentError{fmt.Errorf("column %q is %s; it must be timestamptz, timestamp or date", r.Column, r.typ)}
	}
	err = r.DB.QueryRow(ctx, "SELECT "+isoText("(now() - make_interval(secs => $1))::"+r.typ), r.OlderThan.Seconds()).Scan(&r.cutoff)
	if err != nil {
		return nil, err
	}

	rows, err := r.DB.Query(ctx, `
		WITH RECURSIVE family AS (
			SELECT $1::oid AS oid UNION SELECT i.inhrelid FROM pg_inherits i JOIN family f ON i.inhparent = f.oid
		)
		SELECT ARRAY[n.nspname::text, c.relname::text], c.relkind::text, EXISTS (
			SELECT FROM pg_index x JOIN pg_attribute a ON a.attrelid = x.indrelid AND a.attnum = x.indkey[0]
			JOIN pg_class i ON i.oid = x.indexrelid JOIN pg_am m ON m.oid = i.relam
			WHERE x.indrelid = c.oid AND a.attname = $2 AND x.indisvalid AND x.indpred IS NULL AND m.amname = 'btree'
		)
		FROM family f JOIN pg_class c ON c.oid = f.oid JOIN pg_namespace n ON n.oid = c.relnamespace
		WHERE c.relkind <> 'p' ORDER BY 1`, oid, r.Column)
	if err != nil {
		return nil, err
	}
	tables, err := pgx.CollectRows(rows, pgx.RowToStructByPos[table])
	if err != nil {
		return nil, err
	}
	for _, t := range tables {
		if t.Kind != "r" {
			return nil, &PermanentError{fmt.Errorf("its partition %s is not in this database; prune it where it is", t.Name.Sanitize())}
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
func (r *Run) alongIndex(ctx context.Context, t table) (left int64, err error) {
	sql := r.sql(t, `
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
		if err := r.DB.QueryRow(ctx, sql, r.cutoff, from, r.Batch).Scan(&found, &deleted, &last); err != nil {
			return 0, err
		}
		if deleted > 0 {
			r.Deleted(deleted)
			from = *last
		}
		// Found and not deleted: a trigger keeps them.
		if found < int64(r.Batch) || deleted == 0 {
			break
		}
	}
	err = r.DB.QueryRow(ctx, r.sql(t, "SELECT count(*) FROM ONLY %t WHERE %c < $1::%y"), r.cutoff).Scan(&left)
	return left, err
}

// stretch is how many pages of 8 kB alongHeap looks at in one statement.
const stretch = 2048

// alongHeap deletes rows in the order in which they lie, stretch by stretch, so
// that a table without a suitable index is read but once, and each statement is
// short even where old rows are rare. It returns how many old rows are left.
func (r *Run) alongHeap(ctx context.Context, t table) (left int64, err error) {
	var pages int64
	err = r.DB.QueryRow(ctx, "SELECT pg_relation_size($1::text::regclass) / current_setting('block_size')::int",
		t.Name.Sanitize()).Scan(&pages)
	if err != nil {
		return 0, err
	}
	const old = "FROM ONLY %t WHERE %c < $1::%y AND ctid >= $2::text::tid AND ctid < $3::text::tid"
	remove := r.sql(t, "DELETE FROM ONLY %t WHERE %c < $1::%y AND ctid = ANY(ARRAY(SELECT ctid "+old+" LIMIT $4 FOR UPDATE SKIP LOCKED))")
	count := r.sql(t, "SELECT count(*) "+old)
	for page := int64(0); page < pages; {
		begin, end := fmt.Sprintf("(%d,0)", page), fmt.Sprintf("(%d,0)", page+stretch)
		tag, err := r.DB.Exec(ctx, remove, r.cutoff, begin, end, r.Batch)
		if err != nil {
			return 0, err
		}
		if deleted := tag.RowsAffected(); deleted > 0 {
			r.Deleted(deleted)
			if deleted == int64(r.Batch) {
				continue // there may be more in this stretch
			}
		}
		var kept int64
		if err := r.DB.QueryRow(ctx, count, r.cutoff, begin, end).Scan(&kept); err != nil {
			return 0, err
		}
		left += kept
		page += stretch
	}
	return left, nil
}

// sql fills in what can't be a parameter: %t the table, %c the column, %y its type.
func (r *Run) sql(t table, sql string) string {
	return strings.NewReplacer("%t", t.Name.Sanitize(), "%c", pgx.Identifier{r.Column}.Sanitize(), "%y", r.typ).Replace(sql)
}

var ageDays = regexp.MustCompile(`^(\d{1,6})d(.*)$`)

// ParseAge reads a Go duration that may begin with days of 24 hours. It must be
// above zero.
func ParseAge(s string) (time.Duration, error) {
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
