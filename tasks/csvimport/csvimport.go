// Package csvimport has the kind of job csv:import, which streams a CSV file from the
// web, or from a folder of the worker, into a table of Postgres. It is for services that
// enqueue such jobs: [Import] is the payload, and [Result] what comes of it.
//
// Workers have the kind with the group of package builtin. A group of one's own registers
// [Importer.Handle] with [tasks.RegisterOnce].
package csvimport

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"regexp"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/carpool-go/carpool/tasks"
)

// Import is the payload of csv:import, which imports a CSV file into a table of the schema
// imports.
//
// The first line names the columns; their names are made fit for SQL. The types
// are what every value of the file fits without losing anything: bigint, double
// precision, boolean, date, timestamptz, and else text. An empty field, quoted or
// not, is NULL.
//
// Replacing is atomic: readers see the old table until the new one is there, and
// wait only for the moment in which the two are exchanged. What belonged to the
// old table goes with it: its indexes, comments and grants, save those given by
// ALTER DEFAULT PRIVILEGES IN SCHEMA imports. A table that a view depends on is
// not replaced.
//
// Appending adds rows to a table that has the file's columns, in any order; where
// the file lacks one, its default is taken. Values must fit the table's types as
// soundly as those of a new table: types outside the list above take what Postgres takes
// for them, save what they would round or cut, or keep without its zone. A table that
// doesn't exist is created.
//
// What could be meant in more than one way is refused, with the line; docs/imports.md
// says what a file may look like.
type Import struct {
	// Source is the file's URL: https://…, http://…, or file:///… for a path below the
	// worker's IMPORT_DIR.
	Source string `json:"source" doc:"where the CSV is: https://…, http://…, or file:///… (below IMPORT_DIR)" example:"file:///seattle-weather.csv"`
	// Table is the table's name in the schema imports: small letters, digits and
	// underscores, at most 63.
	Table string `json:"table" doc:"the table, in the schema imports" example:"weather"`
	// Mode is "replace" or "append".
	Mode string `json:"mode" doc:"replace the table, or append to it" example:"replace"`
	// Delimiter is what separates the fields: one ASCII character, and none of letters,
	// digits, quote and line end. "" lets the file show whether it is the comma, the
	// semicolon, the tab or the pipe: the header has one of them outside quotes, and every
	// row agrees. A file that could be read in two ways is refused.
	Delimiter string `json:"delimiter,omitempty" doc:"what separates the fields, one character; the file shows whether it is , ; tab or | if left out"`
	// AllowEmpty takes a file that has a header and no rows. Otherwise such a file neither
	// replaces nor makes a table.
	AllowEmpty bool `json:"allow_empty,omitempty" doc:"take a file without rows, which otherwise neither replaces nor makes a table"`
	// AllowLoss appends values that the table's types keep only in part, as Postgres takes
	// them: rounded, cut, without their zone. Otherwise they are refused.
	AllowLoss bool `json:"allow_loss,omitempty" doc:"append values although the types of the table round or cut them"`
}

// Kind returns "csv:import".
func (Import) Kind() string { return "csv:import" }

// Options returns a timeout of an hour, because a large file may take that long, and a
// retention of a day. The isolation is read committed, because imports into one table at
// once must see each other's.
func (Import) Options() tasks.Options {
	return tasks.Options{Timeout: time.Hour, Retention: 24 * time.Hour, Isolation: pgx.ReadCommitted, SQL: tasks.SQLOperators}
}

const (
	modeReplace = "replace"
	modeAppend  = "append"
)

var (
	tableName = regexp.MustCompile(`^[a-z_][a-z0-9_]{0,62}$`)
	errSource = errors.New("source: must be a URL that begins with https://, http:// or file:///")
)

// Validate returns what is wrong with the form of the fields.
func (p Import) Validate() error {
	u, err := url.Parse(p.Source)
	if err != nil && strings.HasPrefix(strings.ToLower(p.Source), "file:") {
		return errors.New("source: it can't be read as a URL; in a file's name write %25 for %")
	}
	if err != nil {
		return errSource
	}
	switch u.Scheme {
	case "http", "https":
		if u.Hostname() == "" {
			return errSource
		}
	case "file":
		if u.Host != "" || strings.Trim(u.Path, "/") == "" {
			return errors.New("source: a file is named file:///path, with three slashes, below IMPORT_DIR")
		}
		if strings.ContainsAny(p.Source, "?#") {
			return errors.New("source: in a file's name write %23 for # and %3F for ?")
		}
	default:
		return errSource
	}
	if !tableName.MatchString(p.Table) {
		return errors.New("table: must be a plain name of small letters, digits and underscores, at most 63, not beginning with a digit; it is put into the schema imports")
	}
	if p.Mode != modeReplace && p.Mode != modeAppend {
		return errors.New(`mode: must be "replace" or "append"`)
	}
	if p.Delimiter != "" && !isDelimiter(p.Delimiter) {
		return errors.New(`delimiter: must be one ASCII character that is no letter, digit, quote or line end, such as "," or ";" or "\t"`)
	}
	return nil
}

// Result is the result of csv:import.
type Result struct {
	// Table is the full name: imports.weather.
	Table string `json:"table"`
	// Rows is how many rows the file has, without the line that names the columns.
	Rows int64 `json:"rows"`
	// Bytes is the size of the file.
	Bytes int64 `json:"bytes"`
	// Columns are those of the file, in its order.
	Columns []Column `json:"columns"`
}

// Column is a column that a file was imported into.
type Column struct {
	// Name is the column's, made from that in the file.
	Name string `json:"name"`
	// Type is the name of the column's SQL type.
	Type string `json:"type"`
}

// progress is what a running import shows of itself.
type progress struct {
	// Phase is "reading" while types are inferred, then "loading".
	Phase string `json:"phase"`
	Rows  int64  `json:"rows"`
	Bytes int64  `json:"bytes"`
}

// DefaultMaxBytes is the bound on a file from a URL of an [Importer] that sets none: a GiB.
const DefaultMaxBytes = 1 << 30

// Importer runs csv:import. It reads from URLs that the worker lets jobs call (see
// [outbound.Client]), and the zero value from nowhere else.
type Importer struct {
	// Dir is the folder below which file:///… is read; "" refuses all files.
	Dir string
	// MaxBytes is how many bytes a file from a URL may have, unpacked; 0 means
	// [DefaultMaxBytes]. A file below Dir is read where it is, and may have any size.
	MaxBytes int64

	stall time.Duration // 0 = defaultStall
}

// Handle imports the file, or leaves the table as it was. It is a handler for
// [tasks.RegisterOnce].
//
// It reads the file twice, because the types are known at the last row only. The first
// pass takes no connection, and keeps what comes from a URL in a file below TMPDIR. The
// second pass is the transaction of [tasks.Once], so that rows are appended once, however
// often the job is delivered. The memory used is that of the longest row.
//
// An error of the content, or of a source that can't be had, is permanent, and so is a copy
// for which the worker's own disk has no room. After an error of a server in trouble, a
// download that is cut short or a lost database, the job is tried again.
func (i Importer) Handle(ctx context.Context, job *tasks.Job, p Import) (Result, error) {
	// To hold the rows back until the types are known would take memory. To COPY everything
	// as text and cast it on the server would write each row there twice, and hold a
	// connection while the network is waited for.
	src, err := i.open(ctx, p.Source)
	if err != nil {
		return Result{}, err
	}
	defer src.close()
	report := func(phase string, rows, bytes int64) {
		// A progress that can't be shown is no reason to give the import up.
		_ = job.Progress(ctx, progress{phase, rows, bytes})
	}
	inferred, err := src.infer(ctx, p.Delimiter, report)
	if err == nil && p.Mode == modeReplace && inferred.rows == 0 && !p.AllowEmpty {
		err = errNoRows
	}
	if err != nil {
		return Result{}, fmt.Errorf("%s: %w", src.name, err)
	}
	result, err := tasks.Once(ctx, job, func(tx pgx.Tx) (Result, error) {
		l := loader{src: src, sheet: inferred, table: p.Table, allowEmpty: p.AllowEmpty, allowLoss: p.AllowLoss, report: report}
		return l.run(ctx, tx, p.Mode)
	})
	if err != nil {
		return Result{}, fmt.Errorf("%s: %w", src.name, err)
	}
	return result, nil
}

// errNoRows is why a table is neither replaced nor made.
var errNoRows = tasks.Permanent(errors.New(`the file has a header and no rows; the payload's "allow_empty" takes it all the same`))
