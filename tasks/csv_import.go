package tasks

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/url"
	"regexp"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/carpool-go/carpool/outbound"
)

// CSVImport imports a CSV file into a table of the schema imports.
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
// soundly as those of a new table, for types outside the list above as Postgres
// takes them. A table that doesn't exist is created.
type CSVImport struct {
	Source string `json:"source" doc:"where the CSV is: https://…, http://…, or file:///… (below IMPORT_DIR)" example:"file:///seattle-weather.csv"`
	Table  string `json:"table" doc:"the table, in the schema imports" example:"weather"`
	Mode   string `json:"mode" doc:"replace the table, or append to it" example:"replace"`
}

// Kind returns "csv:import".
func (CSVImport) Kind() string { return "csv:import" }

// Options: a large file may take an hour, and the result stays for a day.
func (CSVImport) Options() Options {
	return Options{Timeout: time.Hour, Retention: 24 * time.Hour}
}

const (
	csvReplace = "replace"
	csvAppend  = "append"
)

var (
	csvTableName = regexp.MustCompile(`^[a-z_][a-z0-9_]{0,62}$`)
	errCSVSource = errors.New("source: must be a URL that begins with https://, http:// or file:///")
)

// Validate checks the fields' form.
func (p CSVImport) Validate() error {
	u, err := url.Parse(p.Source)
	if err != nil {
		return errCSVSource
	}
	switch u.Scheme {
	case "http", "https":
		if u.Hostname() == "" {
			return errCSVSource
		}
	case "file":
		if u.Host != "" || strings.Trim(u.Path, "/") == "" {
			return errors.New("source: a file is named file:///path, with three slashes, below IMPORT_DIR")
		}
	default:
		return errCSVSource
	}
	if !csvTableName.MatchString(p.Table) {
		return errors.New("table: must be a plain name of small letters, digits and underscores, at most 63, not beginning with a digit; it is put into the schema imports")
	}
	if p.Mode != csvReplace && p.Mode != csvAppend {
		return errors.New(`mode: must be "replace" or "append"`)
	}
	return nil
}

// CSVImportResult says what was imported.
type CSVImportResult struct {
	// Table is the full name: imports.weather.
	Table string `json:"table"`
	Rows  int64  `json:"rows"`
	// Bytes is the size of the file.
	Bytes int64 `json:"bytes"`
	// Columns are those of the file, in its order.
	Columns []CSVColumn `json:"columns"`
}

// CSVColumn is a column that a file was imported into.
type CSVColumn struct {
	Name string `json:"name"`
	// Type is the name of its SQL type.
	Type string `json:"type"`
}

// csvProgress is what a running import shows of itself.
type csvProgress struct {
	// Phase is "reading" while types are inferred, then "loading".
	Phase string `json:"phase"`
	Rows  int64  `json:"rows"`
	Bytes int64  `json:"bytes"`
}

// CSVImporter runs [CSVImport] jobs. The zero value reads URLs with public
// addresses and no files.
type CSVImporter struct {
	// ImportDir is the folder below which files are read; "" refuses them.
	ImportDir string
	// Outbound guards the requests; nil allows public addresses only.
	Outbound *outbound.Guard

	stall time.Duration // 0 = csvStall
}

// Handle imports the file, or leaves the table as it was.
//
// The file is read twice: types can't be known before its last row, and to hold
// the rows back until then would take memory. The alternative, to COPY
// everything as text and cast it on the server, would write each row there twice
// and hold a connection while the network is waited for. So the first pass takes
// no connection, and keeps what comes from a URL in a file below TMPDIR; the
// memory used is that of the longest row.
//
// What is wrong with the content, and a source that can't be had, is permanent; a
// server in trouble, a download that is cut short and a lost database are not.
//
// The second pass is the transaction of [Once]: rows are appended once, however
// often the job is delivered.
func (i CSVImporter) Handle(ctx context.Context, job *Job, p CSVImport) (CSVImportResult, error) {
	src, err := i.open(ctx, p.Source)
	if err != nil {
		return CSVImportResult{}, err
	}
	defer src.close()
	report := func(phase string, rows, bytes int64) {
		// A progress that can't be shown is no reason to give the import up.
		_ = job.Progress(ctx, csvProgress{phase, rows, bytes})
	}
	sheet, err := src.infer(ctx, report)
	if err != nil {
		return CSVImportResult{}, fmt.Errorf("%s: %w", src.name, err)
	}
	result, err := Once(ctx, job, func(tx pgx.Tx) (CSVImportResult, error) {
		load := csvLoad{src: src, sheet: sheet, table: p.Table, report: report}
		return load.run(ctx, tx, p.Mode)
	})
	if err != nil {
		return CSVImportResult{}, fmt.Errorf("%s: %w", src.name, err)
	}
	return result, nil
}

// csvSheet is what the first pass learns of a file.
type csvSheet struct {
	columns []csvColumn
	rows    int64
	bytes   int64
	sum     uint64
}

// csvReportRows is how many rows go by between two looks at the clock.
const csvReportRows = 1000

// infer reads the file once, to its end.
func (s *csvSource) infer(ctx context.Context, report func(phase string, rows, bytes int64)) (*csvSheet, error) {
	r := newCSVReader(ctx, s.first, s.seed)
	header, err := r.next()
	if errors.Is(err, io.EOF) {
		return nil, csvFault(1, "the file is empty; its first line must name the columns")
	}
	if err != nil {
		return nil, err
	}
	if len(header) > csvMaxColumns {
		return nil, csvFault(r.line, "%d columns, but Postgres allows a table %d", len(header), csvMaxColumns)
	}
	for i, name := range header {
		if err := r.checkText(i, name); err != nil {
			return nil, err
		}
	}
	sheet := &csvSheet{columns: make([]csvColumn, len(header))}
	for i, name := range csvColumnNames(header) {
		sheet.columns[i] = csvColumn{name: name, fits: csvAnyType}
	}
	for {
		record, err := r.next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return nil, err
		}
		sheet.rows++
		if sheet.rows%csvReportRows == 0 {
			report("reading", sheet.rows, r.in.bytes)
		}
		for i, value := range record {
			if value == "" {
				continue
			}
			column := &sheet.columns[i]
			column.used = true
			var types csvTypes
			if column.fits != 0 {
				types = csvTypesOf(value)
				if lost := column.fits &^ types; lost != 0 {
					column.misfit(lost, r.fieldLine(i))
				}
			}
			if types != 0 {
				continue // it is ASCII
			}
			if err := r.checkText(i, value); err != nil {
				return nil, err
			}
		}
	}
	sheet.bytes, sheet.sum = r.in.bytes, r.in.sum.Sum64()
	return sheet, nil
}
