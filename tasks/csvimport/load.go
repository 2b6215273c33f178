package csvimport

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"hash/maphash"
	"io"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/jackc/pgerrcode"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgtype"

	"github.com/carpool-go/carpool/internal/sqlstate"
	"github.com/carpool-go/carpool/internal/wait"
	"github.com/carpool-go/carpool/tasks"
)

// loader is the second pass, into the database.
type loader struct {
	src                   *source
	sheet                 *sheet
	table                 string
	allowEmpty, allowLoss bool
	report                func(phase string, rows, bytes int64)
}

// run brings the sheet into the table, within tx. It neither commits nor rolls
// back; after an error, tx must be rolled back.
func (l *loader) run(ctx context.Context, tx pgx.Tx, mode string) (Result, error) {
	columns := make([]Column, len(l.sheet.columns))
	for i := range l.sheet.columns {
		columns[i] = Column{l.sheet.columns[i].name, l.sheet.columns[i].typeName()}
	}
	_, err := tx.Exec(ctx, mayIdle)
	if err != nil {
		return Result{}, l.wordError(ctx, err)
	}
	if mode == modeReplace {
		err = l.replace(ctx, tx, columns)
	} else {
		columns, err = l.append(ctx, tx, columns)
	}
	if err != nil {
		return Result{}, l.wordError(ctx, err)
	}
	return Result{Table: "imports." + l.table, Rows: l.sheet.rows, Bytes: l.sheet.bytes, Columns: columns}, nil
}

// mayIdle lets the transaction be idle for longer than the role's sessions may, which is as
// long as a pause of lockOut, or a Redis that is slow to take the progress. The server still
// ends one whose worker has gone without a word.
const mayIdle = "SET LOCAL idle_in_transaction_session_timeout = '2min'"

func importsTable(name string) string { return pgx.Identifier{"imports", name}.Sanitize() }

// replace loads a table of its own, which nobody else sees or waits for, and
// gives it the name at the end.
func (l *loader) replace(ctx context.Context, tx pgx.Tx, columns []Column) error {
	fresh := "csv_import_" + strings.ToLower(rand.Text())
	if err := createTable(ctx, tx, fresh, columns); err != nil {
		return err
	}
	if err := l.copy(ctx, tx, fresh, columns, nil); err != nil {
		return err
	}
	l.report("exchanging", l.sheet.rows, l.sheet.bytes)
	exists, err := l.lockName(ctx, tx)
	if err != nil {
		return err
	}
	if exists {
		if err := l.lockOut(ctx, tx); err != nil {
			return err
		}
		if _, err := tx.Exec(ctx, "DROP TABLE "+importsTable(l.table)); err != nil {
			return err
		}
	}
	_, err = tx.Exec(ctx, "ALTER TABLE "+importsTable(fresh)+" RENAME TO "+pgx.Identifier{l.table}.Sanitize())
	return err
}

// append adds to the table, and returns the types it has.
func (l *loader) append(ctx context.Context, tx pgx.Tx, columns []Column) ([]Column, error) {
	exists, err := l.exists(ctx, tx)
	if err != nil {
		return nil, err
	}
	if !exists {
		if exists, err = l.lockName(ctx, tx); err != nil {
			return nil, err
		}
	}
	if !exists {
		if l.sheet.rows == 0 && !l.allowEmpty {
			return nil, errNoRows
		}
		if err := createTable(ctx, tx, l.table, columns); err != nil {
			return nil, err
		}
		return columns, l.copy(ctx, tx, l.table, columns, nil)
	}
	// The lock that COPY takes, but before the columns are looked at.
	if _, err := tx.Exec(ctx, "LOCK TABLE "+importsTable(l.table)+" IN ROW EXCLUSIVE MODE"); err != nil {
		return nil, err
	}
	columns, keepers, err := l.match(ctx, tx)
	if err != nil {
		return nil, err
	}
	return columns, l.copy(ctx, tx, l.table, columns, keepers)
}

func createTable(ctx context.Context, tx pgx.Tx, name string, columns []Column) error {
	var sql strings.Builder
	sql.WriteString("CREATE TABLE " + importsTable(name) + " (")
	for i, c := range columns {
		if i > 0 {
			sql.WriteString(", ")
		}
		sql.WriteString(pgx.Identifier{c.Name}.Sanitize() + " " + c.Type)
	}
	_, err := tx.Exec(ctx, sql.String()+")")
	return err
}

// exists reports whether the table's name is taken. It asks the catalog itself:
// to_regclass may still answer from what the session knew before it waited.
func (l *loader) exists(ctx context.Context, tx pgx.Tx) (exists bool, err error) {
	err = tx.QueryRow(ctx, `SELECT EXISTS (SELECT FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
		WHERE n.nspname = 'imports' AND c.relname = $1)`, l.table).Scan(&exists)
	return exists, err
}

// lockName keeps other imports from taking or freeing the table's name before
// the transaction ends, and reports whether there is a table.
func (l *loader) lockName(ctx context.Context, tx pgx.Tx) (exists bool, err error) {
	if _, err := tx.Exec(ctx, "SELECT pg_advisory_xact_lock(hashtextextended('carpool csv:import ' || $1, 0))", l.table); err != nil {
		return false, err
	}
	return l.exists(ctx, tx)
}

// lockOut locks the table against everybody, when nobody uses it. It waits a
// second at a time, with pauses: whoever comes while it waits has to wait too,
// even to read, and it may be waiting for a report that takes an hour.
func (l *loader) lockOut(ctx context.Context, tx pgx.Tx) error {
	var timeout string
	if err := tx.QueryRow(ctx, "SELECT current_setting('lock_timeout')").Scan(&timeout); err != nil {
		return err
	}
	for {
		err := pgx.BeginFunc(ctx, tx, func(savepoint pgx.Tx) error {
			if _, err := savepoint.Exec(ctx, "SET LOCAL lock_timeout = '1s'"); err != nil {
				return err
			}
			_, err := savepoint.Exec(ctx, "LOCK TABLE "+importsTable(l.table)+" IN ACCESS EXCLUSIVE MODE")
			return err
		})
		if e, ok := errors.AsType[*pgconn.PgError](err); !ok || e.Code != pgerrcode.LockNotAvailable {
			if err == nil {
				_, err = tx.Exec(ctx, "SELECT set_config('lock_timeout', $1, true)", timeout)
			}
			return err
		}
		if err := wait.For(ctx, time.Second); err != nil {
			return fmt.Errorf("wait until nobody uses imports.%s: %w", l.table, err)
		}
	}
}

// fitting says which types of a table the inferred ones vouch for. Values for
// other types, text among them, are Postgres' own to judge.
var fitting = map[uint32]typeSet{
	pgtype.Int2OID:        bigint,
	pgtype.Int4OID:        bigint,
	pgtype.Int8OID:        bigint,
	pgtype.Float4OID:      double,
	pgtype.Float8OID:      double,
	pgtype.BoolOID:        boolean,
	pgtype.DateOID:        date,
	pgtype.TimestamptzOID: timestamptz,
}

// match finds the file's columns among the table's and checks that their values
// fit, as far as the first pass has shown it. The keepers, some of them nil, are to be
// asked of each value.
func (l *loader) match(ctx context.Context, tx pgx.Tx) ([]Column, []keeper, error) {
	attributes, err := l.attributes(ctx, tx)
	if err != nil {
		return nil, nil, err
	}
	var names []string
	byName := make(map[string]attribute)
	moneyCents := false
	for _, a := range attributes {
		names = append(names, a.Name)
		byName[a.Name] = a
		if a.OID == moneyOID && !moneyCents { // the locale decides
			if err := tx.QueryRow(ctx, "SELECT '1.25'::money::numeric = 1.25").Scan(&moneyCents); err != nil {
				return nil, nil, err
			}
		}
	}
	columns := make([]Column, len(l.sheet.columns))
	keepers := make([]keeper, len(columns))
	for i := range l.sheet.columns {
		c := &l.sheet.columns[i]
		a, ok := byName[c.name]
		if !ok {
			return nil, nil, tasks.Permanent(fmt.Errorf("imports.%s has no column %q; it has %s", l.table, c.name, strings.Join(names, ", ")))
		}
		columns[i] = Column{c.name, strings.Replace(a.Shown, "timestamp with time zone", "timestamptz", 1)}
		if l.allowLoss {
			continue
		}
		if want, ok := fitting[a.OID]; ok && a.Path == "" {
			if c.used && c.fits&want == 0 {
				return nil, nil, l.notKept(c.misfitLine(want), c.name, a.Shown)
			}
			if want != double && want != timestamptz || a.OID == pgtype.Float8OID {
				continue // there is no more to it
			}
		}
		keepers[i] = keeperOf(a.columnType, moneyCents)
	}
	return columns, keepers, nil
}

// attribute is a column of the table.
type attribute struct {
	Name  string
	Shown string // the type, as SQL has it
	columnType
}

// attributes are the columns of the table in its order, with what their types come to
// behind domains, arrays and ranges.
func (l *loader) attributes(ctx context.Context, tx pgx.Tx) ([]attribute, error) {
	rows, err := tx.Query(ctx, `
		WITH RECURSIVE step AS (
			SELECT attnum, atttypid AS type, atttypmod AS typmod, '' AS path, 0 AS depth
			FROM pg_attribute
			WHERE attrelid = to_regclass($1) AND attnum > 0 AND NOT attisdropped
			UNION ALL
			SELECT s.attnum, inner_type.type, inner_type.typmod, s.path || inner_type.kind, s.depth + 1
			FROM step s
			JOIN pg_type t ON t.oid = s.type
			CROSS JOIN LATERAL (
				SELECT t.typbasetype, t.typtypmod, '' WHERE t.typtype = 'd'
				UNION ALL
				SELECT t.typelem, s.typmod, 'a' FROM pg_type e WHERE e.oid = t.typelem AND e.typarray = t.oid
				UNION ALL -- there is no rngmultitypid before Postgres 14
				SELECT r.rngsubtype, -1, t.typtype::text FROM pg_range r
				WHERE t.oid IN (r.rngtypid, (to_jsonb(r) ->> 'rngmultitypid')::oid)
			) AS inner_type(type, typmod, kind)
		)
		SELECT DISTINCT ON (s.attnum) a.attname, format_type(a.atttypid, a.atttypmod), s.type, s.typmod, t.typtype = 'c', s.path
		FROM step s
		JOIN pg_attribute a ON a.attrelid = to_regclass($1) AND a.attnum = s.attnum
		JOIN pg_type t ON t.oid = s.type
		ORDER BY s.attnum, s.depth DESC`, importsTable(l.table))
	if err != nil {
		return nil, err
	}
	return pgx.CollectRows(rows, func(row pgx.CollectableRow) (a attribute, err error) {
		return a, row.Scan(&a.Name, &a.Shown, &a.OID, &a.Typmod, &a.Composite, &a.Path)
	})
}

// notKept is the error of a value that a column would keep only in part.
func (l *loader) notKept(line int, column, typ string) error {
	return fault(line, "column %q: the value is not what the %s of imports.%s can keep unchanged; the payload's \"allow_loss\" takes it as Postgres does", column, typ, l.table)
}

// copy streams the file's rows into a table. They travel as text, in COPY's own
// format: Postgres reads each value as it stands in the file, whatever the type of
// the column, and nothing is allocated for it here. keepers are those of the columns, or
// nil.
func (l *loader) copy(ctx context.Context, tx pgx.Tx, table string, columns []Column, keepers []keeper) error {
	r, err := l.src.again(ctx, l.sheet.delimiter)
	if err != nil {
		return err
	}
	names := make([]string, len(columns))
	for i, c := range columns {
		names[i] = c.Name
	}
	rows := &rowReader{csv: r, report: l.report, lost: func(i int) error {
		return l.notKept(r.fieldLine(i), columns[i].Name, columns[i].Type)
	}}
	if slices.ContainsFunc(keepers, func(k keeper) bool { return k != nil }) {
		rows.keepers = keepers
	}
	err = copyText(ctx, tx.Conn(), pgx.Identifier{"imports", table}, names, rows)
	if failed := rows.stop(); failed != nil {
		err = failed // what Postgres says then is only that the copy was given up
	}
	if err == nil && r.in.sum.Sum64() == l.sheet.sum {
		return nil
	}
	if err == nil || ctx.Err() == nil && l.changed() {
		return errors.New("the file was changed while it was read")
	}
	return err
}

// copyText is pgx.Conn.CopyFrom for rows that are in COPY's text format already.
// Tracers are told of it as they are of that: the pool counts statements, and
// hears of lost connections, through them.
func copyText(ctx context.Context, conn *pgx.Conn, table pgx.Identifier, columns []string, rows io.Reader) error {
	tracer, traced := conn.Config().Tracer.(pgx.CopyFromTracer)
	if traced {
		ctx = tracer.TraceCopyFromStart(ctx, conn, pgx.TraceCopyFromStartData{TableName: table, ColumnNames: columns})
	}
	quoted := make([]string, len(columns))
	for i, name := range columns {
		quoted[i] = pgx.Identifier{name}.Sanitize()
	}
	tag, err := conn.PgConn().CopyFrom(ctx, rows, "COPY "+table.Sanitize()+" ("+strings.Join(quoted, ", ")+") FROM STDIN")
	if err != nil && ctx.Err() != nil && !errors.Is(err, ctx.Err()) {
		err = fmt.Errorf("%w: %w", context.Cause(ctx), err) // of a write under which the socket was closed pgx says that alone
	}
	if traced {
		tracer.TraceCopyFromEnd(ctx, conn, pgx.TraceCopyFromEndData{CommandTag: tag, Err: err})
	}
	return err
}

// changed reports whether the file is no longer the one that the first pass read.
func (l *loader) changed() bool {
	if _, err := l.src.file.Seek(0, io.SeekStart); err != nil {
		return false
	}
	var sum maphash.Hash
	sum.SetSeed(l.src.seed)
	if _, err := io.Copy(&sum, l.src.file); err != nil {
		return false
	}
	return sum.Sum64() != l.sheet.sum
}

// rowReader is the records after the header, in COPY's text format.
type rowReader struct {
	mu      sync.Mutex // CopyFrom may return while its goroutine still reads
	stopped bool
	csv     *reader
	keepers []keeper // of the columns, some nil; nil if there are none
	lost    func(field int) error
	report  func(phase string, rows, bytes int64)
	begun   bool
	buf     []byte // encoded, from at on not yet read
	at      int
	n       int64
	err     error
}

// Read implements [io.Reader].
func (r *rowReader) Read(p []byte) (int, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.stopped {
		return 0, io.ErrClosedPipe
	}
	if r.at == len(r.buf) {
		r.at, r.buf = 0, r.buf[:0]
		for len(r.buf) < len(p) && r.err == nil {
			r.encodeNext()
		}
	}
	n := copy(p, r.buf[r.at:])
	r.at += n
	if n == 0 {
		return 0, r.err
	}
	return n, nil
}

// stop ends reading and returns the error that ended it, nil if that was the end
// of the file or nothing yet.
func (r *rowReader) stop() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.stopped = true
	if errors.Is(r.err, io.EOF) {
		return nil
	}
	return r.err
}

func (r *rowReader) encodeNext() {
	if !r.begun {
		r.begun = true
		if _, r.err = r.csv.next(); r.err != nil {
			return
		}
	}
	record, err := r.csv.next()
	if err != nil {
		r.err = err
		return
	}
	for i, value := range record {
		if i > 0 {
			r.buf = append(r.buf, '\t')
		}
		if value == "" {
			r.buf = append(r.buf, `\N`...)
		} else {
			if r.keepers != nil && r.keepers[i] != nil && !r.keepers[i](value) {
				r.err = r.lost(i)
				return
			}
			r.buf = appendCopyText(r.buf, value)
		}
	}
	r.buf = append(r.buf, '\n')
	r.n++
	if r.n%reportRows == 0 {
		r.report("loading", r.n, r.csv.in.bytes)
	}
}

// appendCopyText escapes what COPY's text format gives a meaning to.
func appendCopyText(buf []byte, s string) []byte {
	begin := 0
	for i := range len(s) {
		var c byte
		switch s[i] {
		case '\\':
			c = '\\'
		case '\t':
			c = 't'
		case '\n':
			c = 'n'
		case '\r':
			c = 'r'
		default:
			continue
		}
		buf = append(buf, s[begin:i]...)
		buf = append(buf, '\\', c)
		begin = i + 1
	}
	return append(buf, s[begin:]...)
}

// databaseError is an error of Postgres without the values that it quotes.
type databaseError struct {
	text string
	err  error
}

func (e *databaseError) Error() string { return e.text }
func (e *databaseError) Unwrap() error { return e.err }

// copyContext finds row and column in the context of an error of COPY:
// `COPY weather, line 3, column temp: "…"`, in the server's language.
var copyContext = regexp.MustCompile(`^COPY [^,]+, [^,\d]*(\d+)(?:, [^,:]*?([\pL\pM\pN_]+) ?:)?`)

// wordError says what Postgres did not like in words that show no values, names
// the line if it can, and makes what will not go away permanent.
func (l *loader) wordError(ctx context.Context, err error) error {
	e, ok := errors.AsType[*pgconn.PgError](err)
	if !ok {
		return err
	}
	var text string
	switch {
	case e.Code == pgerrcode.DependentObjectsStillExist:
		return tasks.Permanent(&databaseError{fmt.Sprintf("imports.%s can't be replaced, because other objects depend on it (%s); drop them first, or append",
			l.table, strings.ReplaceAll(e.Detail, "\n", "; ")), err})
	case e.Code == pgerrcode.NumericValueOutOfRange:
		text = "the value is out of the range of the column's type"
	case e.Code == pgerrcode.StringDataRightTruncationDataException:
		text = "the value is too long for the column's type"
	case sqlstate.HasClass(e, pgerrcode.DataException):
		text = "the value is not one of the column's type"
	case sqlstate.HasClass(e, pgerrcode.FeatureNotSupported, pgerrcode.IntegrityConstraintViolation,
		pgerrcode.SyntaxErrorOrAccessRuleViolation, pgerrcode.ProgramLimitExceeded):
		text = e.Message // these name no values
	case sqlstate.HasClass(e, pgerrcode.CardinalityViolation, pgerrcode.TriggeredDataChangeViolation,
		pgerrcode.WithCheckOptionViolation, pgerrcode.PLpgSQLError):
		text = "a trigger of the table refuses the row"
	default:
		return &databaseError{fmt.Sprintf("imports.%s: %s (SQLSTATE %s)", l.table, e.Message, e.Code), err}
	}
	text = fmt.Sprintf("imports.%s: %s (SQLSTATE %s)", l.table, text, e.Code)
	if m := copyContext.FindStringSubmatch(e.Where); m != nil {
		if m[2] != "" {
			text = fmt.Sprintf("column %q: %s", m[2], text)
		}
		if row, err := strconv.ParseInt(m[1], 10, 64); err == nil {
			if line := l.lineOf(ctx, row); line > 0 {
				text = fmt.Sprintf("line %d: %s", line, text)
			}
		}
	}
	if e.Code == pgerrcode.UndefinedTable { // the table was dropped meanwhile
		return &databaseError{text, err}
	}
	return tasks.Permanent(&databaseError{text, err})
}

// lineOf is the line on which the nth row begins, 0 if it can't be found.
func (l *loader) lineOf(ctx context.Context, row int64) int {
	r, err := l.src.again(ctx, l.sheet.delimiter)
	if err != nil {
		return 0
	}
	for range row + 1 { // the header is no row
		if _, err := r.next(); err != nil {
			return 0
		}
	}
	return r.fieldLine(0)
}
