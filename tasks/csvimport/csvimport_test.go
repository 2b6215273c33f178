package csvimport_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"runtime/metrics"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/jackc/pgx/v5"
	"pgregory.net/rapid"

	"github.com/carpool-go/carpool/dbpool"
	"github.com/carpool-go/carpool/internal/testservers"
	"github.com/carpool-go/carpool/tasks"
	"github.com/carpool-go/carpool/tasks/csvimport"
	"github.com/carpool-go/carpool/tasks/taskstest"
)

// imports is an importer with a folder of its own, on a database of its own.
type imports struct {
	*taskstest.Kit
	csvimport.Importer
}

func newImports(t testing.TB) *imports {
	t.Helper()
	kit := taskstest.New(t)
	kit.OutboundAllow = "127.0.0.1"
	return &imports{kit, csvimport.Importer{Dir: t.TempDir()}}
}

func (i *imports) write(t testing.TB, name, content string) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(i.Dir, name), []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
}

// run imports a text into the table t.
func (i *imports) run(t testing.TB, mode, content string) (csvimport.Result, error) {
	t.Helper()
	return i.runWith(t, csvimport.Import{Mode: mode}, content)
}

// runWith imports a text into the table t, as p says.
func (i *imports) runWith(t testing.TB, p csvimport.Import, content string) (csvimport.Result, error) {
	t.Helper()
	i.write(t, "t.csv", content)
	p.Source, p.Table = "file:///t.csv", "t"
	return taskstest.Run(t, i.Kit, i.Handle, p)
}

func (i *imports) runFrom(t testing.TB, mode, source string) (csvimport.Result, error) {
	t.Helper()
	return taskstest.Run(t, i.Kit, i.Handle, csvimport.Import{Source: source, Table: "t", Mode: mode})
}

func (i *imports) exec(t testing.TB, sql string) {
	t.Helper()
	if _, err := i.DB.Exec(t.Context(), sql); err != nil {
		t.Fatalf("%s: %v", sql, err)
	}
}

// rows returns a query's rows, their values as text, NULL as "NULL".
func (i *imports) rows(t testing.TB, sql string) []string {
	t.Helper()
	rows, err := i.DB.Query(t.Context(), sql, pgx.QueryExecModeSimpleProtocol)
	if err != nil {
		t.Fatalf("%s: %v", sql, err)
	}
	defer rows.Close()
	var all []string
	for rows.Next() {
		var fields []string
		for _, v := range rows.RawValues() {
			if v == nil {
				fields = append(fields, "NULL")
			} else {
				fields = append(fields, string(v))
			}
		}
		all = append(all, strings.Join(fields, "|"))
	}
	if err := rows.Err(); err != nil {
		t.Fatalf("%s: %v", sql, err)
	}
	return all
}

// table is all there is to know of imports.t, and of what an import might leave
// behind in its schema.
func (i *imports) table(t testing.TB) []string {
	t.Helper()
	all := i.rows(t, `SELECT relname, relkind FROM pg_class WHERE relnamespace = 'imports'::regnamespace ORDER BY 1`)
	all = append(all, i.rows(t, `SELECT attname, format_type(atttypid, atttypmod) FROM pg_attribute
		WHERE attrelid = to_regclass('imports.t') AND attnum > 0 ORDER BY attnum`)...)
	if len(all) > 0 {
		all = append(all, i.rows(t, `SELECT t::text FROM imports.t ORDER BY 1`)...)
	}
	return all
}

func types(r csvimport.Result) string {
	var all []string
	for _, c := range r.Columns {
		all = append(all, c.Name+" "+c.Type)
	}
	return strings.Join(all, ", ")
}

func want[T any](t testing.TB, what string, got, want T) {
	t.Helper()
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("%s (-want +got):\n%s", what, diff)
	}
}

func TestImport_SeattleWeather(t *testing.T) {
	t.Parallel()
	i := newImports(t)
	i.Dir = "../../dev/data"
	result, err := i.runFrom(t, "replace", "file:///seattle-weather.csv")
	if err != nil {
		t.Fatal(err)
	}
	want(t, "result", result, csvimport.Result{
		Table: "imports.t", Rows: 1461, Bytes: 48219, Columns: []csvimport.Column{
			{"date", "date"},
			{"precipitation", "double precision"},
			{"temp_max", "double precision"},
			{"temp_min", "double precision"},
			{"wind", "double precision"},
			{"weather", "text"},
		},
	})
	want(t, "a day", i.rows(t, `SELECT * FROM imports.t WHERE date = '2012-01-02'`), []string{"2012-01-02|10.9|10.6|2.8|4.5|rain"})
	want(t, "count", i.rows(t, `SELECT count(*), min(date), max(date) FROM imports.t`), []string{"1461|2012-01-01|2015-12-31"})
}

func TestImport_Airports(t *testing.T) {
	t.Parallel()
	i := newImports(t)
	i.Dir = "testdata"
	result, err := i.runFrom(t, "replace", "file:///airports.csv")
	if err != nil {
		t.Fatal(err)
	}
	want(t, "types", types(result), "iata text, name text, city text, state text, country text, latitude double precision, longitude double precision")
	want(t, "an airport", i.rows(t, `SELECT * FROM imports.t WHERE iata = 'DBN'`), []string{`DBN|W. H. "Bud" Barron|Dublin|GA|USA|32.56445806|-82.98525556`})
}

func TestImport_InfersTypesFromTheWholeFile(t *testing.T) {
	t.Parallel()
	i := newImports(t)
	var b strings.Builder
	b.WriteString("\uFEFFid,ZIP,price,active,day,at,\"Big, ID\",empty,late,id\r\n")
	for n := range 5000 {
		fmt.Fprintf(&b, "%d,%05d,%d.50,%t,2024-02-29,2024-02-29T12:00:00+01:00,9007199254740993,\"\",%d,\r\n", n, 501+n, n, n%2 == 0, n)
	}
	b.WriteString(`7,00501,,,,,1.5,,"n/a, sorry",0`)
	result, err := i.run(t, "replace", b.String())
	if err != nil {
		t.Fatal(err)
	}
	want(t, "types", types(result), "id bigint, zip text, price double precision, active boolean, day date, at timestamptz, big_id text, empty text, late text, id_2 bigint")
	want(t, "rows", result.Rows, 5001)
	want(t, "the last row", i.rows(t, `SELECT * FROM imports.t WHERE id_2 = 0`), []string{"7|00501|NULL|NULL|NULL|NULL|1.5|NULL|n/a, sorry|0"})
	want(t, "the first row", i.rows(t, `SELECT id, zip, price, active, day, at AT TIME ZONE 'UTC', big_id, empty, late, id_2 FROM imports.t WHERE id = 0 AND id_2 IS NULL`), []string{"0|00501|0.5|t|2024-02-29|2024-02-29 11:00:00|9007199254740993|NULL|0|NULL"})
}

// Whatever text is in a well-formed file, the import succeeds, and each cell can
// be told from the table again.
func TestImport_EveryCellIsRecoveredFromItsColumn(t *testing.T) {
	t.Parallel()
	i := newImports(t)
	anyText := rapid.OneOf(
		rapid.String(),
		rapid.StringOfN(rapid.SampledFrom([]rune("01259.-+eETZ:/ \\\"\t\r\n,")), 0, 25, -1),
		rapid.SampledFrom([]string{"", "NULL", `\N`, `\.`, "00501", "NaN", "-0", "1e5", "Infinity", "now", "2012-02-30", "9007199254740993", "true", "t"}),
	)
	typed := []*rapid.Generator[string]{
		anyText,
		rapid.Map(rapid.Int64(), func(n int64) string { return strconv.FormatInt(n, 10) }),
		rapid.Map(rapid.Int64Range(-9, 9), func(n int64) string { return strconv.FormatInt(n, 10) }),
		rapid.Map(rapid.Float64(), func(f float64) string { return strconv.FormatFloat(f, 'g', -1, 64) }),
		rapid.Map(rapid.Float64Range(-99, 99), func(f float64) string { return strconv.FormatFloat(f, 'f', 2, 64) }),
		rapid.StringMatching(`-?(0|[1-9][0-9]{0,20})?(\.[0-9]{1,20})?([eE][-+]?[0-9]{1,3})?`),
		rapid.StringMatching(`(true|false|TRUE|False)`),
		rapid.StringMatching(`[0-9]{4}-(0[0-9]|1[0-2])-[0-3][0-9]`),
		rapid.StringMatching(`[0-9]{4}-(0[1-9]|1[0-2])-[0-2][1-9][T ][0-2][0-9]:[0-5][0-9]:[0-5][0-9](\.[0-9]{1,7})?(Z|[-+][01][0-9](:?[0-5][0-9])?)`),
	}
	rapid.Check(t, func(r *rapid.T) {
		width := rapid.IntRange(1, 5).Draw(r, "width")
		var gens []*rapid.Generator[string]
		for range width {
			gen := rapid.SampledFrom(typed).Draw(r, "kind")
			if rapid.Bool().Draw(r, "sparse") {
				gen = rapid.OneOf(gen, rapid.Just(""))
			}
			if rapid.IntRange(0, 3).Draw(r, "dirty") == 0 {
				gen = rapid.OneOf(gen, gen, gen, anyText)
			}
			gens = append(gens, gen)
		}
		var file strings.Builder
		delimiter := rapid.SampledFrom([]string{",", ";", "\t", "|", " ", "\x01", "-"}).Draw(r, "delimiter")
		ends := rapid.SampledFrom([][]string{{"\n", "\r\n", "\r\r\n"}, {"\r"}}).Draw(r, "line ends")
		line := func(cells []string) {
			for n, cell := range cells {
				if n > 0 {
					file.WriteString(delimiter)
				}
				// The first of all may be like the beginning of something else.
				if file.Len() == 0 || rapid.Bool().Draw(r, "quoted") || strings.ContainsAny(cell, "\"\r\n"+delimiter) || len(cells) == 1 {
					cell = `"` + strings.ReplaceAll(cell, `"`, `""`) + `"`
				}
				file.WriteString(cell)
			}
			file.WriteString(rapid.SampledFrom(ends).Draw(r, "end"))
		}
		clean := func(s string) string {
			return strings.ReplaceAll(strings.ToValidUTF8(s, ""), "\x00", "")
		}
		header := make([]string, width)
		for n := range header {
			header[n] = clean(rapid.String().Draw(r, "header"))
		}
		line(header)
		var records [][]string
		for range rapid.IntRange(0, 8).Draw(r, "height") {
			record := make([]string, width)
			for n := range record {
				record[n] = clean(gens[n].Draw(r, "cell"))
			}
			line(record)
			records = append(records, record)
		}

		result, err := i.runWith(t, csvimport.Import{Mode: "replace", Delimiter: delimiter, AllowEmpty: true}, file.String())
		if err != nil {
			r.Fatalf("%q: %v", file.String(), err)
		}
		var got [][]*string
		var columns []string
		for _, c := range result.Columns {
			columns = append(columns, pgx.Identifier{c.Name}.Sanitize()+"::text")
		}
		rows, err := i.DB.Query(t.Context(), "SELECT ARRAY["+strings.Join(columns, ", ")+"] FROM imports.t ORDER BY ctid")
		if err != nil {
			r.Fatal(err)
		}
		if got, err = pgx.CollectRows(rows, pgx.RowTo[[]*string]); err != nil {
			r.Fatal(err)
		}
		if len(got) != len(records) {
			r.Fatalf("%d rows, want %d", len(got), len(records))
		}
		for y, record := range records {
			for x, cell := range record {
				if !recovered(result.Columns[x].Type, cell, got[y][x]) {
					r.Errorf("%q became %s in a %s column", cell, show(got[y][x]), result.Columns[x].Type)
				}
			}
		}
	})
}

func show(s *string) string {
	if s == nil {
		return "NULL"
	}
	return strconv.Quote(*s)
}

func recovered(typ, cell string, got *string) bool {
	if cell == "" || got == nil {
		return cell == "" && got == nil
	}
	switch typ {
	case "double precision":
		a, err1 := strconv.ParseFloat(cell, 64)
		b, err2 := strconv.ParseFloat(*got, 64)
		return err1 == nil && err2 == nil && a == b && math.Signbit(a) == math.Signbit(b)
	case "boolean":
		return strings.ToLower(cell) == *got
	case "timestamptz":
		a, b := instant(cell), instant(*got)
		return !a.IsZero() && a.Equal(b)
	default:
		return cell == *got
	}
}

func instant(s string) time.Time {
	s, bc := strings.CutSuffix(s, " BC")
	for _, zone := range []string{"Z07:00", "Z0700", "Z07"} {
		if at, err := time.Parse("2006-01-02T15:04:05.999999999"+zone, s[:10]+"T"+s[11:]); err == nil {
			if bc {
				at = at.AddDate(1-2*at.Year(), 0, 0)
			}
			return at
		}
	}
	return time.Time{}
}

func TestImport_ContentThatIsWrongIsOneErrorThatNamesTheLine(t *testing.T) {
	t.Parallel()
	i := newImports(t)
	if _, err := i.run(t, "replace", "a,b\n1,old\n"); err != nil {
		t.Fatal(err)
	}
	before := i.table(t)
	const secret = "s3cret"
	many := "c" + strings.Repeat(",c", 1600)
	for _, tc := range []struct{ name, content, wanted string }{
		{"empty", "", "line 1: the file is empty"},
		{"blank lines only", "\n\n\r\n", "line 1: the file is empty"},
		{"a row too short", "a,b\n1,2\ns3cret\n", "line 3: 1 fields, but the header has 2"},
		{"a row too long", "a,b\n1,2\n\"x\ny\",2\n1,s3cret,3\n", "line 5: 3 fields, but the header has 2"},
		{"a bare quote", "a,b\n1,s3\"cret\n", "line 2: a quote in a field that does not begin with one"},
		{"text after a quote", "a,b\n1,2\n\"s3cret\"x,2\n", "line 3: text after a field's closing quote"},
		{"text after a quote, further down", "a,b\n1,\"x\ny\nz\"x\n", "line 4: text after a field's closing quote; a quote within a field is written twice (in the record that begins on line 2)"},
		{"a quote that is not closed", "a,b\n1,2\n\"s3cret,2\n3,4\n", "line 3: the quote that begins a field here is never closed"},
		{"not UTF-8", "a,b\n1,2\n1,s3cret\xff\n", "line 3: field 2 is not UTF-8"},
		{"not UTF-8, in a header", "a,\xe9t\xe9\n", "line 1: field 2 is not UTF-8"},
		{"not UTF-8, in a field of two lines", "a,b\n1,\"s3cret\n\xc3\x28\"\n", "line 3: field 2 is not UTF-8"},
		{"UTF-16", "\xff\xfea\x00,\x00b\x00\n\x00", "line 1: the file is no CSV, but looks like UTF-16; save it as UTF-8"},
		{"a NUL byte", "a,b\n1,2\n3,s3cret\x00\n", "line 3: field 2 has a NUL byte"},
		{"too many columns", many, "line 1: 1601 columns, but Postgres allows a table 1600"},
		{"a record that does not end", "a,b\n1,2\n3,\"" + strings.Repeat("s3cret ", 2<<20), "line 3: the record that begins here is longer than 8 MiB"},
		{"a header that does not end", strings.Repeat("s3cret ", 2<<20), "line 1: the record that begins here is longer than 8 MiB"},
		{"a line of commas", "a,b\n" + strings.Repeat(",", 1<<20), "line 2: 1048577 fields, but the header has 2"},
		{"a row that is too wide for a page", many[2:] + "\n" + strings.Repeat("1.5,", 1599) + "1.5\n", "imports.t: row is too big"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			for _, mode := range []string{"replace", "append"} {
				_, err := i.run(t, mode, tc.content)
				if mode == "append" && strings.Contains(tc.wanted, "row is too big") {
					continue // it has other columns
				}
				if err == nil || !strings.Contains(err.Error(), tc.wanted) || !tasks.IsPermanent(err) {
					t.Errorf("error %v, permanent %t; want a permanent one with %q", err, tasks.IsPermanent(err), tc.wanted)
				} else if strings.Contains(err.Error(), secret) || strings.Count(err.Error(), "line ") > 2 {
					t.Errorf("error %q shows the content", err)
				}
				want(t, "table", i.table(t), before)
			}
		})
	}
}

func TestImport_LongRecordsWithinTheBoundAreTaken(t *testing.T) {
	t.Parallel()
	i := newImports(t)
	long := strings.Repeat(`a,"",b`+"\n", (8<<20)/7-10) // a field of commas, quotes and newlines
	if _, err := i.run(t, "replace", "a,b\n1,\""+long+"\"\n2,x\n"); err != nil {
		t.Fatal(err)
	}
	want(t, "length", i.rows(t, "SELECT length(b) FROM imports.t ORDER BY a"), []string{strconv.Itoa(len(strings.ReplaceAll(long, `""`, `"`))), "1"})
}

func TestImport_FilesOnlyBelowImportDir(t *testing.T) {
	t.Parallel()
	i := newImports(t)
	outside := filepath.Join(t.TempDir(), "outside.csv")
	for _, err := range []error{
		os.WriteFile(outside, []byte("a\n1\n"), 0o600),
		os.MkdirAll(filepath.Join(i.Dir, "sub dir", "deep"), 0o700),
		os.WriteFile(filepath.Join(i.Dir, "sub dir", "in.csv"), []byte("a\n1\n"), 0o600),
		os.WriteFile(filepath.Join(i.Dir, "data#2?100%.csv"), []byte("a\n1\n"), 0o600),
		os.Symlink(outside, filepath.Join(i.Dir, "absolute.csv")),
		os.Symlink("../"+filepath.Base(filepath.Dir(outside))+"/outside.csv", filepath.Join(i.Dir, "relative.csv")),
		os.Symlink(filepath.Dir(outside), filepath.Join(i.Dir, "folder")),
		os.Symlink("sub dir/in.csv", filepath.Join(i.Dir, "inside.csv")),
		os.Symlink("/dev/zero", filepath.Join(i.Dir, "device.csv")),
		exec.Command("mkfifo", filepath.Join(i.Dir, "fifo.csv")).Run(),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	for source, wanted := range map[string]string{
		"file:///sub%20dir/in.csv":             "",
		"file:///inside.csv":                   "",
		"file:///sub%20dir/deep/../in.csv":     "",
		"file:///missing.csv":                  "there is no such file below IMPORT_DIR",
		"file:///absolute.csv":                 "below IMPORT_DIR: path escapes",
		"file:///relative.csv":                 "below IMPORT_DIR",
		"file:///folder/outside.csv":           "below IMPORT_DIR: path escapes",
		"file:///device.csv":                   "below IMPORT_DIR: path escapes",
		"file:///../../etc/passwd":             "below IMPORT_DIR",
		"file:///%2e%2e/%2e%2e/etc/passwd":     "below IMPORT_DIR",
		"file://" + outside:                    "there is no such file below IMPORT_DIR",
		"file:///sub%20dir":                    "not a regular file",
		"file:///fifo.csv":                     "not a regular file",
		"file:///inside.csv/x":                 "below IMPORT_DIR",
		"file:///missing.csv?token=s3cret":     "source: in a file's name write %23 for # and %3F for ?",
		"file:///missing%3F%23.csv":            "file:///missing%3F%23.csv: there is no such file",
		"file:///data%232%3F100%25.csv":        "",
		"file:///" + strings.Repeat("x", 5000): "below IMPORT_DIR",
	} {
		_, err := i.runFrom(t, "replace", source)
		if wanted == "" {
			if err != nil {
				t.Errorf("%s: %v", source, err)
			}
			continue
		}
		if err == nil || !strings.Contains(err.Error(), wanted) || !tasks.IsPermanent(err) || strings.Contains(err.Error(), "s3cret") {
			t.Errorf("%.80s: error %.300v, permanent %t; want a permanent one with %q", source, err, tasks.IsPermanent(err), wanted)
		}
	}

	i.Dir = ""
	_, err := i.runFrom(t, "replace", "file:///sub%20dir/in.csv")
	if err == nil || !strings.Contains(err.Error(), "IMPORT_DIR") || !tasks.IsPermanent(err) {
		t.Errorf("without IMPORT_DIR: %v", err)
	}
	i.Dir = filepath.Join(t.TempDir(), "gone")
	_, err = i.runFrom(t, "replace", "file:///x.csv")
	if err == nil || !strings.Contains(err.Error(), "IMPORT_DIR") || !tasks.IsPermanent(err) {
		t.Errorf("without the folder: %v", err)
	}
}

func TestImport_SourcesThatCannotBeHad(t *testing.T) {
	t.Parallel()
	i := newImports(t)
	if _, err := i.run(t, "replace", "a,b\n1,old\n"); err != nil {
		t.Fatal(err)
	}
	before := i.table(t)
	mux := http.NewServeMux()
	mux.HandleFunc("/status/{code}", func(w http.ResponseWriter, r *http.Request) {
		code, _ := strconv.Atoi(r.PathValue("code"))
		w.WriteHeader(code)
	})
	mux.HandleFunc("/cut", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Length", "1000")
		_, _ = io.WriteString(w, "a,b\n1,2\n\"3,")
	})
	mux.HandleFunc("/reset", func(w http.ResponseWriter, _ *http.Request) {
		_, _ = io.WriteString(w, "a,b\n1,2\n3")
		_ = http.NewResponseController(w).Flush()
		panic(http.ErrAbortHandler)
	})
	mux.HandleFunc("/to-loopback", func(w http.ResponseWriter, r *http.Request) {
		_, port, _ := strings.Cut(r.Host, ":")
		http.Redirect(w, r, "http://127.0.0.2:"+port+"/ok?token=s3cret", http.StatusFound)
	})
	mux.HandleFunc("/to-nowhere", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Location", "http://[s3cret/")
		w.WriteHeader(http.StatusFound)
	})
	mux.HandleFunc("/round", func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, "/s3cret/round", http.StatusFound) })
	mux.HandleFunc("/to-name", func(w http.ResponseWriter, r *http.Request) {
		http.Redirect(w, r, "http://s3cret.invalid/", http.StatusFound)
	})
	mux.HandleFunc("/to-scheme", func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, "s3cret:x", http.StatusFound) })
	server := httptest.NewServer(http.StripPrefix("/s3cret", mux))
	t.Cleanup(server.Close)
	closed := httptest.NewServer(mux)
	closed.Close()
	// A path may be as secret as a query.
	base := strings.Replace(server.URL, "http://", "http://user:s3cret@", 1) + "/s3cret"

	for _, tc := range []struct {
		source, wanted string
		permanent      bool
	}{
		{base + "/status/404?token=s3cret", server.URL + ": the server answered 404 Not Found", true},
		{base + "/status/403", "answered 403", true},
		{base + "/status/410", "answered 410", true},
		{base + "/status/204", "answered 204", true},
		{base + "/status/500?token=s3cret", "answered 500", false},
		{base + "/status/503", "answered 503", false},
		{base + "/status/429", "answered 429", false},
		{base + "/status/408", "answered 408", false},
		{base + "/cut?token=s3cret", "after line 2: the server's answer was cut short", false},
		{base + "/reset", "after line 2: the server's answer was cut short", false},
		{base + "/to-loopback?token=s3cret", "127.0.0.2", true},
		{base + "/to-nowhere", "a redirect leads to a URL that can't be read", true},
		{base + "/to-name", server.URL + ": the host's name can't be resolved", false},
		{base + "/to-scheme", "redirect", true},
		{base + "/round", "redirect", true},
		{strings.Replace(base, "127.0.0.1", "127.0.0.2", 1) + "/ok?token=s3cret", "127.0.0.2", true},
		{"http://10.0.0.1/s3cret.csv", "10.0.0.1", true},
		{"http://[::1]/x.csv", "::1", true},
		{"http://169.254.169.254/s3cret", "169.254.169.254", true},
		{strings.Replace(closed.URL, "http://", "http://user:s3cret@", 1) + "/s3cret.csv?token=s3cret", "refused", false},
		{"http://user:s3cret@nowhere.invalid/s3cret.csv?token=s3cret", "http://nowhere.invalid: the host's name can't be resolved", false},
		{"http://" + strings.Repeat("x", 5000) + ".invalid/", "http://xxx", false},
	} {
		_, err := i.runFrom(t, "replace", tc.source)
		if err == nil || !strings.Contains(err.Error(), tc.wanted) || tasks.IsPermanent(err) != tc.permanent {
			t.Errorf("%s: error %v, permanent %t; want %q, permanent %t", tc.source, err, tasks.IsPermanent(err), tc.wanted, tc.permanent)
		} else if _, ok := errors.AsType[net.Error](err); ok || errors.Is(err, io.ErrUnexpectedEOF) {
			t.Errorf("error %v could be taken for a lost connection to the database", err)
		} else if strings.Contains(err.Error(), "s3cret") || strings.Contains(err.Error(), "user") || len(err.Error()) > 500 {
			t.Errorf("error %q shows what is secret in the URL, or too much of it", err)
		}
	}
	want(t, "table", i.table(t), before)
}

// What a server sends in the place of HTTP may be anything, and so may what it sends amid it.
func TestImport_ErrorsShowNothingOfWhatTheServerSent(t *testing.T) {
	t.Parallel()
	i := newImports(t)
	const chunked = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n8\r\na,b\n1,2\n\r\n"
	const noHTTP, cut = "the server's answer is not valid HTTP", "the server's answer was cut short"
	for answer, wanted := range map[string]string{
		"s3cret":                                                                noHTTP,
		"SSH-2.0-s3cret\r\n":                                                    noHTTP,
		"HTTP/1.1 s3cret\r\n\r\n":                                               noHTTP,
		"HTTP/s3cret 200 OK\r\n\r\n":                                            noHTTP,
		"HTTP/1.1 200 OK\r\ns3cret\r\n\r\n":                                     noHTTP,
		"HTTP/1.1 200 OK\r\nContent-Length: s3cret\r\n\r\n":                     noHTTP,
		"HTTP/1.1 200 OK\r\nTransfer-Encoding: s3cret\r\n\r\n":                  noHTTP,
		"HTTP/1.1 302 Found\r\nLocation: http://[s3cret\r\n\r\n":                "a redirect leads to a URL that can't be read",
		"HTTP/1.1 404 s3cret\r\n\r\n":                                           "the server answered 404 Not Found",
		"HTTP/1.1 200 OK\r\nX: s3cret":                                          "the server closed the connection before it had answered",
		chunked + "s3cret\r\n":                                                  "after line 2: " + noHTTP,
		chunked + "3;" + strings.Repeat("s3cret", 2000) + "\r\n":                "after line 2: " + noHTTP,
		chunked + "0\r\ns3cret\r\n\r\n":                                         "after line 2: " + noHTTP,
		chunked + "0\r\nX: s3cret":                                              "after line 2: " + noHTTP,
		chunked + "ff\r\ns3cret":                                                "after line 2: " + cut,
		"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\n\r\ns3cret s3cret s3cret": "after line 0: " + noHTTP,
	} {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = l.Close() })
		go func() {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			_, _ = conn.Read(make([]byte, 4096))
			_, _ = io.WriteString(conn, answer)
			_ = conn.Close()
		}()
		_, err = i.runFrom(t, "replace", "http://"+l.Addr().String()+"/x.csv")
		if err == nil || !strings.Contains(err.Error(), wanted) || strings.Contains(err.Error(), "s3") || strings.Contains(err.Error(), "x.csv") {
			t.Errorf("%.80q: error %v; want %q", answer, err, wanted)
		}
	}
	want(t, "table", len(i.table(t)), 0)
}

func TestImport_ReadsAURLOnce(t *testing.T) {
	t.Parallel()
	i := newImports(t)
	var requests sync.Map
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if _, again := requests.LoadOrStore(r.URL.String(), true); again {
			w.WriteHeader(http.StatusGone)
			return
		}
		if user, password, _ := r.BasicAuth(); user != "u" || password != "p" || r.URL.RawQuery != "q=1" {
			w.WriteHeader(http.StatusForbidden)
			return
		}
		_, _ = io.WriteString(w, "a,b\n1,x\n2,y\n")
	}))
	t.Cleanup(server.Close)
	result, err := i.runFrom(t, "replace", strings.Replace(server.URL, "http://", "http://u:p@", 1)+"/x.csv?q=1")
	if err != nil {
		t.Fatal(err)
	}
	want(t, "rows, bytes", [2]int64{result.Rows, result.Bytes}, [2]int64{2, 12})
	want(t, "table", i.table(t), []string{"t|r", "a|bigint", "b|text", "(1,x)", "(2,y)"})
}

func TestImport_ThePoolHearsOfItsStatements(t *testing.T) {
	t.Parallel()
	i := newImports(t)
	var log bytes.Buffer // of a pool that only this goroutine uses
	cfg := dbpool.DefaultConfig(i.DatabaseURL)
	cfg.Echo, cfg.Logger = true, slog.New(slog.NewTextHandler(&log, nil))
	pool, err := dbpool.Open(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	i.DB = pool
	_, err = i.run(t, "append", "a\ns3cret\n")
	pool.Close()
	if err != nil {
		t.Fatal(err)
	}
	if got := log.String(); !strings.Contains(got, `COPY \"imports\".\"t\"`) || strings.Contains(got, "s3cret") {
		t.Errorf("the pool's echo: %s", got)
	}
}

func TestImport_HoldsNoConnectionWhileItReads(t *testing.T) {
	t.Parallel()
	i := newImports(t)
	sent, proceed := make(chan struct{}), make(chan struct{})
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		_, _ = io.WriteString(w, "a,b\n1,x\n")
		_ = http.NewResponseController(w).Flush()
		close(sent)
		<-proceed
	}))
	t.Cleanup(server.Close)
	done := start(func() error { _, err := i.runFrom(t, "replace", server.URL); return err })
	<-sent
	want(t, "connections checked out", i.DB.Stats().CheckedOut, 0)
	close(proceed)
	if err := <-done; err != nil {
		t.Fatal(err)
	}
}

// start runs f in a goroutine; its result is to be received.
func start(f func() error) <-chan error {
	done := make(chan error, 1)
	go func() { done <- f() }()
	return done
}

func TestImport_AFileThatChangesBetweenThePassesIsRefused(t *testing.T) {
	t.Parallel()
	for name, changed := range map[string]string{
		"grown":              "a,b\n1,x\n2,y\n3,z\n",
		"other rows":         "a,b\n1,x\n7,y\n",
		"a value misfits":    "a,b\n1,x\nx,y\n",
		"ragged":             "a,b\n1,x\n2\n",
		"gone":               "",
		"cut":                "a,b\n1,x\n",
		"quoted without end": "a,b\n1,x\n\"",
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			i := newImports(t)
			if _, err := i.run(t, "replace", "a,b\n1,old\n"); err != nil {
				t.Fatal(err)
			}
			before := i.table(t)
			// The pool has nothing to lend until the first pass is over.
			var held []pgx.Tx
			release := func() {
				for _, tx := range held {
					_ = tx.Rollback(context.WithoutCancel(t.Context()))
				}
			}
			defer release()
			for range 10 {
				tx, err := i.DB.Begin(t.Context())
				if err != nil {
					t.Fatal(err)
				}
				held = append(held, tx)
			}
			done := start(func() error { _, err := i.run(t, "replace", "a,b\n1,x\n2,y\n"); return err })
			testservers.Eventually(t, "the import waits for a connection", func() bool { return i.DB.Stats().Waiting > 0 })
			i.write(t, "t.csv", changed)
			release()
			err := <-done
			if err == nil || !strings.Contains(err.Error(), "changed while it was read") || tasks.IsPermanent(err) {
				t.Errorf("error %v, permanent %t; want that the file was changed, not permanent", err, tasks.IsPermanent(err))
			}
			want(t, "table", i.table(t), before)
		})
	}
}

func TestImport_ReadersSeeTheOldTableOrTheNewOne(t *testing.T) {
	t.Parallel()
	i := newImports(t)
	if _, err := i.run(t, "replace", "old\n"+strings.Repeat("1\n", 1000)); err != nil {
		t.Fatal(err)
	}
	tx, err := i.DB.Begin(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	count := func(q interface {
		QueryRow(context.Context, string, ...any) pgx.Row
	},
	) (n int) {
		if err := q.QueryRow(t.Context(), "SELECT count(*) FROM imports.t", pgx.QueryExecModeExec).Scan(&n); err != nil {
			t.Error(err)
		}
		return n
	}
	want(t, "rows in a reader's transaction", count(tx), 1000)
	done := start(func() error {
		_, err := i.run(t, "replace", "new\n"+strings.Repeat("x\n", 2000))
		return err
	})
	testservers.Eventually(t, "the import has loaded and waits for the reader", func() bool {
		return len(i.rows(t, `SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query LIKE 'LOCK TABLE%' AND datname = current_database()`)) == 1
	})
	want(t, "rows for the reader that was there", count(tx), 1000)
	want(t, "rows for one that comes now", count(i.DB), 1000)
	if err := tx.Commit(t.Context()); err != nil {
		t.Fatal(err)
	}
	for seen := 0; seen != 2000; {
		if seen = count(i.DB); seen != 1000 && seen != 2000 {
			t.Fatalf("a reader saw %d rows", seen)
		}
	}
	if err := <-done; err != nil {
		t.Fatal(err)
	}
}

func TestImport_WaitsForAReaderLongerThanTheRolesSessionsMayBeIdle(t *testing.T) {
	t.Parallel()
	i := newImports(t)
	if _, err := i.run(t, "replace", "old\n1\n"); err != nil {
		t.Fatal(err)
	}
	i.exec(t, `DO $$ BEGIN EXECUTE format('ALTER ROLE CURRENT_USER IN DATABASE %I SET idle_in_transaction_session_timeout = %L', current_database(), '200ms'); END $$`)
	reader, err := i.DB.Begin(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, sql := range []string{"SET LOCAL idle_in_transaction_session_timeout = 0", "SELECT FROM imports.t"} {
		if _, err := reader.Exec(t.Context(), sql); err != nil {
			t.Fatal(err)
		}
	}
	cfg := dbpool.DefaultConfig(i.DatabaseURL)
	cfg.Logger = slog.New(slog.DiscardHandler)
	if i.DB, err = dbpool.Open(t.Context(), cfg); err != nil {
		t.Fatal(err)
	}
	defer i.DB.Close()
	want(t, "the setting", i.rows(t, "SHOW idle_in_transaction_session_timeout"), []string{"200ms"})
	done := start(func() error { _, err := i.run(t, "replace", "new\n2\n3\n"); return err })
	testservers.Eventually(t, "the import has waited once, and pauses in its transaction", func() bool {
		return len(i.rows(t, `SELECT 1 FROM pg_stat_activity WHERE state = 'idle in transaction' AND datname = current_database()
			AND state_change < clock_timestamp() - interval '500ms' AND query LIKE 'rollback to%'`)) == 1
	})
	if err := reader.Rollback(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	want(t, "rows", i.rows(t, "SELECT count(*) FROM imports.t"), []string{"2"})
}

func TestImport_ManyAtOnceIntoOneTable(t *testing.T) {
	t.Parallel()
	for _, isolation := range []string{"read committed", "serializable"} { // of the database's sessions
		for mode, wanted := range map[string]int{"replace": 500, "append": 6 * 500} {
			t.Run(mode+", "+isolation, func(t *testing.T) {
				t.Parallel()
				i := newImports(t)
				i.exec(t, "DO $$ BEGIN EXECUTE format('ALTER DATABASE %I SET default_transaction_isolation = %L', current_database(), '"+isolation+"'); END $$")
				i.write(t, "t.csv", "a\n"+strings.Repeat("1\n", 500))
				var all []<-chan error
				for range 6 {
					all = append(all, start(func() error { _, err := i.runFrom(t, mode, "file:///t.csv"); return err }))
				}
				for _, done := range all {
					if err := <-done; err != nil {
						t.Error(err)
					}
				}
				want(t, "rows", i.rows(t, "SELECT count(*) FROM imports.t"), []string{strconv.Itoa(wanted)})
				want(t, "tables", len(i.rows(t, "SELECT 1 FROM pg_class WHERE relnamespace = 'imports'::regnamespace")), 1)
			})
		}
	}
}

func TestImport_WhatOthersDependOnIsNotReplaced(t *testing.T) {
	t.Parallel()
	i := newImports(t)
	if _, err := i.run(t, "replace", "a\n1\n"); err != nil {
		t.Fatal(err)
	}
	i.exec(t, "CREATE VIEW imports.v AS SELECT a FROM imports.t")
	before := i.table(t)
	_, err := i.run(t, "replace", "a\n2\n")
	if err == nil || !tasks.IsPermanent(err) || !strings.Contains(err.Error(), "view imports.v depends on table imports.t") {
		t.Errorf("error %v, permanent %t", err, tasks.IsPermanent(err))
	}
	want(t, "table", i.table(t), before)

	_, err = taskstest.Run(t, i.Kit, i.Handle, csvimport.Import{Source: "file:///t.csv", Table: "v", Mode: "replace"})
	if err == nil || !tasks.IsPermanent(err) || !strings.Contains(err.Error(), `"v" is not a table`) {
		t.Errorf("a view: error %v, permanent %t", err, tasks.IsPermanent(err))
	}
}

func TestImport_AppendsToColumnsByName(t *testing.T) {
	t.Parallel()
	i := newImports(t)
	result, err := i.run(t, "append", "id,price,name\n1,1.5,x\n")
	if err != nil {
		t.Fatal(err)
	}
	want(t, "types when the table is new", types(result), "id bigint, price double precision, name text")
	result, err = i.run(t, "append", "Name,ID,price\n007,2,3\n2024-01-01,3,\n")
	if err != nil {
		t.Fatal(err)
	}
	want(t, "types are the table's", types(result), "name text, id bigint, price double precision")
	if _, err := i.run(t, "append", "price,name\n,\n"); err != nil {
		t.Fatal(err)
	}
	want(t, "table", i.table(t), []string{
		"t|r", "id|bigint", "price|double precision", "name|text",
		"(,,)", "(1,1.5,x)", "(2,3,007)", "(3,,2024-01-01)",
	})
}

func TestImport_AFileWithoutRowsIsAppendedToATableButMakesNone(t *testing.T) {
	t.Parallel()
	i := newImports(t)
	_, err := i.run(t, "append", "a,b\n")
	if err == nil || !strings.Contains(err.Error(), "no rows") || !tasks.IsPermanent(err) {
		t.Errorf("error %v, permanent %t", err, tasks.IsPermanent(err))
	}
	want(t, "tables", len(i.table(t)), 0)
	if _, err := i.runWith(t, csvimport.Import{Mode: "append", AllowEmpty: true}, "a,b\n"); err != nil {
		t.Fatal(err)
	}
	if _, err := i.run(t, "append", "b,a\n"); err != nil {
		t.Fatal(err)
	}
	want(t, "table", i.table(t), []string{"t|r", "a|text", "b|text"})
}

func TestImport_AppendsWhatPostgresTakesForOtherTypes(t *testing.T) {
	t.Parallel()
	i := newImports(t)
	i.exec(t, `CREATE TABLE imports.t (id int GENERATED BY DEFAULT AS IDENTITY, u uuid, n numeric, j jsonb, s varchar(3), at timestamptz, made date DEFAULT '2020-01-01')`)
	result, err := i.run(t, "append", "u,n,j,s,at\n"+`00000000-0000-0000-0000-000000000001,12345678901234567890.5,"{""a"": 1}",é€x,2024-01-01T00:00:00Z`+"\n")
	if err != nil {
		t.Fatal(err)
	}
	want(t, "types", types(result), "u uuid, n numeric, j jsonb, s character varying(3), at timestamptz")
	want(t, "row", i.rows(t, "SELECT id, u, n, j, s, at AT TIME ZONE 'UTC', made FROM imports.t"), []string{`1|00000000-0000-0000-0000-000000000001|12345678901234567890.5|{"a": 1}|é€x|2024-01-01 00:00:00|2020-01-01`})
}

func TestImport_AppendedValuesMustFit(t *testing.T) {
	t.Parallel()
	i := newImports(t)
	i.exec(t, `CREATE DOMAIN whole AS int`)
	i.exec(t, `CREATE TABLE imports.t (id int UNIQUE, big bigint, d double precision, b boolean, day date, at timestamptz, s varchar(5) NOT NULL DEFAULT '', pos int CHECK (pos > 0), gen int GENERATED ALWAYS AS (1) STORED, u uuid, zip whole)`)
	i.exec(t, `CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN IF NEW.s = 'nope' THEN RAISE EXCEPTION 'no %', NEW.big; END IF; RETURN NEW; END $$`)
	i.exec(t, `CREATE TRIGGER refuse BEFORE INSERT ON imports.t FOR EACH ROW EXECUTE FUNCTION refuse()`)
	i.exec(t, `INSERT INTO imports.t VALUES (1)`)
	before := i.table(t)
	const secret = "918273645"
	for _, tc := range []struct{ content, wanted string }{
		{"id,x\n2,3\n", `imports.t has no column "x"; it has id, big, d, b, day, at, s, pos, gen, u, zip`},
		{"big\n1\n2\n918273645.5\n3.5\n", `line 4: column "big": the value is not what the bigint of imports.t can keep unchanged`},
		{"big\n0918273645\n", `line 2: column "big"`},
		{"d\n1\n0918273645\n", `line 3: column "d": the value is not what the double precision`},
		{"d\n9182736450000000001\n", `line 2: column "d"`},
		{"zip\n0918273645\n", `line 2: column "zip"`},
		{"d\nNaN\n", `line 2: column "d"`},
		{"b\ntrue\n1\n", `line 3: column "b"`},
		{"day\n2024-01-01T00:00:00Z\n", `line 2: column "day"`},
		{"day\ntomorrow\n", `line 2: column "day"`},
		{"at\n2024-01-01\n", `line 2: column "at"`},
		{"at\n2024-01-01 10:00:00\n", `line 2: column "at"`},
		{"id\n918273645000\n", `line 2: column "id": imports.t: the value is out of the range of the column's type (SQLSTATE 22003)`},
		{"id,s\n5,x\n\"6\",\"918273645\"\n", `line 3: column "s": imports.t: the value is too long for the column's type`},
		{"s,u\nx,\n\"y\nz\",\n\nw,918273645\n", `line 6: column "u": imports.t: the value is not one of the column's type`},
		{"id,big\n918273645,1\n918273645,2\n", `line 3: imports.t: duplicate key value violates unique constraint "t_id_key"`},
		{"id,s\n7,\n", `null value in column "s"`},
		{"pos\n1\n-918273645\n", `line 3: imports.t: new row for relation "t" violates check constraint "t_pos_check"`},
		{"gen\n918273645\n", `column "gen" is a generated column`},
		{"s,big\nx,1\nnope,918273645\n", `a trigger of the table refuses the row (SQLSTATE P0001)`},
	} {
		_, err := i.run(t, "append", tc.content)
		if err == nil || !strings.Contains(err.Error(), tc.wanted) || !tasks.IsPermanent(err) {
			t.Errorf("%q: error %v, permanent %t; want a permanent one with %q", tc.content, err, tasks.IsPermanent(err), tc.wanted)
		} else if strings.Contains(err.Error(), secret) {
			t.Errorf("error %q shows the content", err)
		}
		want(t, "table", i.table(t), before)
	}
}

func TestImport_KilledInTheMiddleItIsTriedAgain(t *testing.T) {
	t.Parallel()
	i := newImports(t)
	i.exec(t, `CREATE TABLE imports.t (a bigint)`)
	i.exec(t, `CREATE FUNCTION stop() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN IF NEW.a = 50000 THEN PERFORM pg_advisory_lock(1); END IF; RETURN NEW; END $$`)
	i.exec(t, `CREATE TRIGGER stop BEFORE INSERT ON imports.t FOR EACH ROW EXECUTE FUNCTION stop()`)
	i.exec(t, `INSERT INTO imports.t VALUES (-1)`)
	before := i.table(t)
	var b strings.Builder
	b.WriteString("a\n")
	for n := range 100_000 {
		fmt.Fprintln(&b, n)
	}
	lock, err := i.DB.Begin(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = lock.Rollback(context.WithoutCancel(t.Context())) }()
	if _, err := lock.Exec(t.Context(), "SELECT pg_advisory_xact_lock(1)"); err != nil {
		t.Fatal(err)
	}
	inTheMiddle := func() bool {
		return len(i.rows(t, `SELECT 1 FROM pg_stat_activity WHERE wait_event = 'advisory' AND query LIKE 'COPY%' AND datname = current_database()`)) == 1
	}

	done := start(func() error { _, err := i.run(t, "append", b.String()); return err })
	testservers.Eventually(t, "the import is in the middle of its COPY", inTheMiddle)
	i.exec(t, `SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE wait_event = 'advisory' AND query LIKE 'COPY%' AND datname = current_database()`)
	if err := <-done; err == nil || tasks.IsPermanent(err) {
		t.Errorf("backend killed: error %v, permanent %t; want one that is not permanent", err, tasks.IsPermanent(err))
	}
	want(t, "table", i.table(t), before)

	ctx, cancel := context.WithCancel(t.Context())
	done = start(func() error {
		_, err := i.Handle(ctx, &tasks.Job{DB: i.DB, Log: slog.New(slog.DiscardHandler)}, csvimport.Import{Source: "file:///t.csv", Table: "t", Mode: "append"})
		return err
	})
	testservers.Eventually(t, "the import is in the middle of its COPY", inTheMiddle)
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) || tasks.IsPermanent(err) {
		t.Errorf("job cancelled: error %v, permanent %t; want that it was cancelled", err, tasks.IsPermanent(err))
	}
	want(t, "table", i.table(t), before)

	if err := lock.Rollback(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := i.runFrom(t, "append", "file:///t.csv"); err != nil {
		t.Fatal(err)
	}
	want(t, "rows in the end", i.rows(t, "SELECT count(*) FROM imports.t"), []string{"100001"})
}

func TestImport_KilledBeforeTheExchangeItLeavesTheOldTable(t *testing.T) {
	t.Parallel()
	i := newImports(t)
	if _, err := i.run(t, "replace", "old\n1\n"); err != nil {
		t.Fatal(err)
	}
	before := i.table(t)
	reader, err := i.DB.Begin(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = reader.Rollback(context.WithoutCancel(t.Context())) }()
	if _, err := reader.Exec(t.Context(), "SELECT FROM imports.t"); err != nil {
		t.Fatal(err)
	}
	done := start(func() error { _, err := i.run(t, "replace", "new\nx\n"); return err })
	testservers.Eventually(t, "the import has loaded and is killed", func() bool {
		return len(i.rows(t, `SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE query LIKE 'LOCK TABLE%' AND datname = current_database()`)) == 1
	})
	if err := <-done; err == nil || tasks.IsPermanent(err) {
		t.Errorf("error %v, permanent %t; want one that is not permanent", err, tasks.IsPermanent(err))
	}
	want(t, "table", i.table(t), before)
}

func TestImport_ShowsItsProgress(t *testing.T) {
	t.Parallel()
	i := newImports(t)
	i.write(t, "t.csv", "a\n"+strings.Repeat("1\n", 2000))
	var shown []string
	job := &tasks.Job{
		DB: i.DB, Log: slog.New(slog.DiscardHandler),
		WriteResult: func(b []byte) error { shown = append(shown, string(b)); return errors.New("Redis is away") },
	}
	if _, err := i.Handle(t.Context(), job, csvimport.Import{Source: "file:///t.csv", Table: "t", Mode: "replace"}); err != nil {
		t.Fatal(err)
	}
	// None could be written, so each was tried.
	want(t, "progress", shown, []string{
		`{"progress":{"phase":"reading","rows":1000,"bytes":4002}}`,
		`{"progress":{"phase":"reading","rows":2000,"bytes":4002}}`,
		`{"progress":{"phase":"loading","rows":1000,"bytes":4002}}`,
		`{"progress":{"phase":"loading","rows":2000,"bytes":4002}}`,
		`{"progress":{"phase":"exchanging","rows":2000,"bytes":4002}}`,
	})
}

func TestImport_PayloadIsValidated(t *testing.T) {
	t.Parallel()
	valid := csvimport.Import{Source: "https://example.com/x.csv", Table: "t", Mode: "replace"}
	for _, tc := range []struct {
		change func(*csvimport.Import)
		wanted string
	}{
		{func(*csvimport.Import) {}, ""},
		{func(p *csvimport.Import) { p.Source = "HTTP://example.com/x.csv" }, ""},
		{func(p *csvimport.Import) { p.Source = "file:///x.csv" }, ""},
		{func(p *csvimport.Import) { p.Table = strings.Repeat("x", 63) }, ""},
		{func(p *csvimport.Import) { p.Mode = "append" }, ""},
		{func(p *csvimport.Import) { p.Source = "" }, "source: "},
		{func(p *csvimport.Import) { p.Source = "x.csv" }, "source: "},
		{func(p *csvimport.Import) { p.Source = "ftp://s3cret/x.csv" }, "source: "},
		{func(p *csvimport.Import) { p.Source = "https:///x.csv" }, "source: "},
		{func(p *csvimport.Import) { p.Source = "https://:80/s3cret" }, "source: "},
		{func(p *csvimport.Import) { p.Source = "https://s3cret:s3cret@exa mple/" }, "source: "},
		{func(p *csvimport.Import) { p.Source = "file://x.csv" }, "source: "},
		{func(p *csvimport.Import) { p.Source = "file:x.csv" }, "source: "},
		{func(p *csvimport.Import) { p.Source = "file:///" }, "source: "},
		{func(p *csvimport.Import) { p.Source = "file:///data%232.csv" }, ""},
		{func(p *csvimport.Import) { p.Source = "file:///data#2.csv" }, "source: in a file's name write %23 for # and %3F for ?"},
		{func(p *csvimport.Import) { p.Source = "file:///data.csv#" }, "source: in a file's name write %23"},
		{func(p *csvimport.Import) { p.Source = "FILE:///data?3.csv" }, "source: in a file's name write %23"},
		{func(p *csvimport.Import) { p.Source = "file:///data.csv?" }, "source: in a file's name write %23"},
		{func(p *csvimport.Import) { p.Source = "file:///100%.csv" }, "source: it can't be read as a URL; in a file's name write %25 for %"},
		{func(p *csvimport.Import) { p.Source = "https://example.com/x?a=b#c" }, ""},
		{func(p *csvimport.Import) { p.Delimiter = ";" }, ""},
		{func(p *csvimport.Import) { p.Delimiter = "\t" }, ""},
		{func(p *csvimport.Import) { p.Delimiter = "\x01" }, ""},
		{func(p *csvimport.Import) { p.Delimiter = ",," }, "delimiter: must be one ASCII character"},
		{func(p *csvimport.Import) { p.Delimiter = "§" }, "delimiter: must be one ASCII character"},
		{func(p *csvimport.Import) { p.Delimiter = "\"" }, "delimiter: must be one ASCII character"},
		{func(p *csvimport.Import) { p.Delimiter = "\n" }, "delimiter: must be one ASCII character"},
		{func(p *csvimport.Import) { p.Delimiter = "\x00" }, "delimiter: must be one ASCII character"},
		{func(p *csvimport.Import) { p.Delimiter = "x" }, "delimiter: must be one ASCII character"},
		{func(p *csvimport.Import) { p.Delimiter = "0" }, "delimiter: must be one ASCII character"},
		{func(p *csvimport.Import) { p.Table = "" }, "table: "},
		{func(p *csvimport.Import) { p.Table = "Weather" }, "table: "},
		{func(p *csvimport.Import) { p.Table = "1t" }, "table: "},
		{func(p *csvimport.Import) { p.Table = "public.t" }, "table: "},
		{func(p *csvimport.Import) { p.Table = `t"; DROP TABLE x; --` }, "table: "},
		{func(p *csvimport.Import) { p.Table = strings.Repeat("x", 64) }, "table: "},
		{func(p *csvimport.Import) { p.Table = "t\n" }, "table: "},
		{func(p *csvimport.Import) { p.Mode = "" }, "mode: "},
		{func(p *csvimport.Import) { p.Mode = "Replace" }, "mode: "},
	} {
		p := valid
		tc.change(&p)
		err := p.Validate()
		if (err == nil) != (tc.wanted == "") || err != nil && (!strings.HasPrefix(err.Error(), tc.wanted) || strings.Contains(err.Error(), "s3cret")) {
			t.Errorf("%+v: %v, want %q", p, err, tc.wanted)
		}
	}
}

// Not parallel, so that no other test's memory is counted.
func TestImport_ThreeMillionCellsWithinFlatMemory(t *testing.T) {
	const rows, most = 300_000, 16 << 20
	i := newImports(t)
	const block = 1000
	var lines strings.Builder
	for n := range block {
		fmt.Fprintf(&lines, "%d,00501,12.5,true,2024-02-29,2024-02-29T12:00:00Z,\"Smith, J\",,1,7\n", n)
	}
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		_, _ = io.WriteString(w, "id,zip,price,active,day,at,name,empty,late,n\n")
		for range rows/block - 1 {
			if _, err := io.WriteString(w, lines.String()); err != nil {
				return
			}
		}
		_, _ = io.WriteString(w, strings.TrimSuffix(lines.String(), "7\n")+"last\n")
	}))
	t.Cleanup(server.Close)

	stop := make(chan struct{})
	highest := make(chan uint64)
	runtime.GC() // what other tests have left isn't this one's
	sample := []metrics.Sample{{Name: "/memory/classes/heap/objects:bytes"}}
	metrics.Read(sample)
	before := sample[0].Value.Uint64()
	go func() {
		var most uint64
		tick := time.NewTicker(10 * time.Millisecond)
		defer tick.Stop()
		for {
			select {
			case <-tick.C:
				metrics.Read(sample)
				most = max(most, sample[0].Value.Uint64())
			case <-stop:
				highest <- most
				return
			}
		}
	}()
	result, err := i.runFrom(t, "replace", server.URL)
	close(stop)
	heap := max(<-highest, before) - before
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%d rows, %d MiB; the heap grew by %d MiB at most, from %d", result.Rows, result.Bytes>>20, heap>>20, before>>20)
	if heap > most {
		t.Errorf("the heap grew by %d MiB for a file of %d MiB; want at most %d", heap>>20, result.Bytes>>20, most>>20)
	}
	want(t, "types", types(result), "id bigint, zip text, price double precision, active boolean, day date, at timestamptz, name text, empty text, late bigint, n text")
	want(t, "rows", i.rows(t, "SELECT count(*), sum(id), count(empty) FROM imports.t"), []string{fmt.Sprintf("%d|%d|0", rows, rows*(block-1)/2)})
	left, _ := filepath.Glob(filepath.Join(os.TempDir(), "carpool-import-*"))
	want(t, "files left behind", left, nil)
}

func TestImport_ResultAsJSON(t *testing.T) {
	t.Parallel()
	data, err := json.Marshal(csvimport.Result{Table: "imports.t", Rows: 1, Bytes: 2, Columns: []csvimport.Column{{"a", "bigint"}}})
	if err != nil {
		t.Fatal(err)
	}
	want(t, "JSON", string(data), `{"table":"imports.t","rows":1,"bytes":2,"columns":[{"name":"a","type":"bigint"}]}`)
}
