package csvimport

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/jackc/pgx/v5"
	"pgregory.net/rapid"

	"github.com/carpool-go/carpool/internal/testservers"
	"github.com/carpool-go/carpool/tasks"
	"github.com/carpool-go/carpool/tasks/taskstest"
)

// What is kept is taken, and what is lost is refused with its line, although Postgres takes
// it without a word, as it does when allow_loss says so.
func TestAppend_KeepsValuesWholeOrRefusesThem(t *testing.T) {
	t.Parallel()
	kit := taskstest.New(t)
	for _, sql := range []string{
		"CREATE DOMAIN cents AS numeric(5,2)", "CREATE DOMAIN price AS cents CHECK (VALUE > 0)", "CREATE DOMAIN word AS varchar(3)", "CREATE DOMAIN zipped AS int",
		"CREATE TYPE mood AS ENUM ('ok', 'sad')", "CREATE TYPE pair AS (a int, b numeric(5,2))",
	} {
		if _, err := kit.DB.Exec(t.Context(), sql); err != nil {
			t.Fatal(err)
		}
	}
	dir := t.TempDir()
	for n, tc := range []struct {
		typ        string
		kept, lost []string
	}{
		{"real", []string{"16777216", "0.1", "-2.5", "1e10", "20000000", "0.300000012", "-0", "3.4e38"}, []string{"16777217", "0.123456789", "123456789", "3.14159265"}},
		{"double precision", []string{"0.1", "9007199254740992"}, []string{"9007199254740993", "0.12345678901234567890", "1.0000000000000001"}},
		{"numeric", []string{"1.23456789012345678901234567890", "NaN", "1e-20"}, nil},
		{"numeric(5,2)", []string{"123.45", "-123.450", "1.5e1", "1230e-1", "0.00", " 1.5 ", "+1.5", "NaN"}, []string{"1.005", "0.999", "1e-3", "-.001"}},
		{"numeric(5)", []string{"12345", "12.0", "1.2e1"}, []string{"1.5"}},
		{"price", []string{"1.25"}, []string{"1.255"}},
		{"money", []string{"12", "-12.50", "12.500"}, []string{"12.505", "1,234.505"}},
		{"timestamptz(0)", []string{"2024-01-01T10:00:00Z", "2024-01-01 10:00:00.00+02"}, []string{"2024-01-01T10:00:00.6Z"}},
		{"timestamptz(3)", []string{"2024-01-01T10:00:00.123Z"}, []string{"2024-01-01T10:00:00.1234Z"}},
		{"timestamptz", []string{"2024-01-01T10:00:00.123456Z"}, []string{"2024-01-01T10:00:00.1234567Z", "2024-01-01 10:00:00", "today"}},
		{"timestamp", []string{"2024-01-01T10:00:00.123456", "2024-01-01 10:00", "2024-01-01", "infinity"}, []string{"2024-01-01T10:00:00.1234567", "2024-01-01T10:00:00Z", "2024-01-01 10:00:00+02", "01/02/2024 10:00", "now", "2024-01-01 23:59:60"}},
		{"timestamp(1)", []string{"2024-01-01 10:00:00.500"}, []string{"2024-01-01 10:00:00.55"}},
		{"date", []string{"2024-01-01"}, []string{"2024-01-01 10:00:00", "yesterday", "01/02/2024"}},
		{"time", []string{"10:00", "10:00:00.123456", "24:00:00"}, []string{"10:00:00.1234567", "2024-01-01 10:00:00", "10:00:00+02", "10:00:60"}},
		{"time(0)", []string{"10:00:00.0"}, []string{"10:00:00.6"}},
		{"timetz(0)", []string{"10:00:00+02", "10:00:00Z", "10:00:00-08:30"}, []string{"10:00:00.6+02", "10:00:00"}},
		{"interval", []string{"1 day 02:03:04.123456", "1.5 hours", "PT1.5S", "3 mons", "P1Y2M", "1.000000 month", "2 days ago"}, []string{"0.0000001 s", "1.5 months", "0.33 years", "1.0000005 hours", "PT1e-7S"}},
		{"interval(0)", []string{"1 day", "00:00:01.0"}, []string{"00:00:01.6", "0.0001 hours"}},
		{"interval day to hour", nil, []string{"1 day 02:03:04"}},
		{"varchar(3)", []string{"abc", "a ", "äöü"}, []string{"abc ", "äöü  "}},
		{"word", []string{"abc"}, []string{"abc  "}},
		{"char(3)", []string{"a", "abc", "ab ", "äö "}, []string{"a ", "abc  "}},
		{"bpchar", []string{"a  "}, nil},
		{"text", []string{"a  ", " 00501"}, nil},
		{"name", []string{strings.Repeat("x", 63)}, []string{strings.Repeat("x", 64)}},
		{`"char"`, []string{"x"}, []string{"xy"}},
		{"bit(3)", []string{"101"}, nil},
		{"smallint", []string{"-7"}, []string{"007", " 7"}},
		{"zipped", []string{"501"}, []string{"00501"}},
		{"oid", []string{"7"}, []string{"-1", "007"}},
		{"boolean", []string{"true"}, []string{"yes", "1"}},
		{"mood", []string{"ok"}, nil},
		{"uuid", []string{"00000000-0000-0000-0000-000000000001"}, nil},
		{"jsonb", []string{`{"a": 1.10}`}, nil},
		{"bytea", []string{`\x00ff`}, nil},
		{"inet", []string{"10.0.0.1/24"}, nil},
		{"point", []string{"(1.5,-2)"}, []string{"(0.12345678901234567890,1)"}},
		{"box", []string{"(2,2),(1,1)"}, []string{"(2,2),(1,1.00000000000000000001)"}},
		{"real[]", []string{"{}", "{1.5,NULL}", "{{0.1},{0.2}}", "[2:3]={1,2}"}, []string{"{1.5,16777217}", "{{0.1},{3.14159265}}"}},
		{"numeric(5,2)[]", []string{"{1.25,2}"}, []string{"{1.25,1.255}"}},
		{"price[]", []string{"{1.25}"}, []string{"{1.255}"}},
		{"int[]", []string{"{1,2}"}, []string{"{007}"}},
		{"varchar(3)[]", []string{`{a,"b c","",NULL}`}, []string{`{"abc "}`}},
		{"timestamptz(0)[]", []string{`{"2024-01-01 10:00:00+00"}`}, []string{`{"2024-01-01 10:00:00.6+00"}`}},
		{"numrange", []string{"[1.23456789012345678901,2)"}, nil},
		{"int4range", []string{"[1,5)", "empty", "(,5]"}, []string{"[007,8)"}},
		{"tsrange", []string{`["2024-01-01 10:00:00","2024-01-02 10:00:00")`, "[2024-01-01,)"}, []string{`["2024-01-01 10:00:00.1234567","2024-01-02 10:00:00")`, "[2024-01-01T10:00:00Z,)"}},
		{"daterange[]", []string{`{"[2024-01-01,2024-01-05)"}`}, []string{`{"[2024-01-01 10:00:00,2024-01-05)"}`}},
		{"datemultirange", []string{"{[2024-01-01,2024-01-05)}", "{}"}, []string{"{[2024-01-01,2024-01-05),[2024-02-01 10:00:00,)}"}},
		{"pair", nil, []string{"(1,1.255)"}},
	} {
		t.Run(tc.typ, func(t *testing.T) {
			t.Parallel()
			table := fmt.Sprintf("t%d", n)
			if _, err := kit.DB.Exec(t.Context(), "CREATE TABLE imports."+table+" (v "+tc.typ+")"); err != nil {
				t.Fatal(err)
			}
			append := func(value string, allowLoss bool) error {
				content := "v\n\n\"" + strings.ReplaceAll(value, `"`, `""`) + "\"\n"
				if err := os.WriteFile(filepath.Join(dir, table+".csv"), []byte(content), 0o600); err != nil {
					t.Fatal(err)
				}
				_, err := taskstest.Run(t, kit, Importer{Dir: dir}.Handle, Import{Source: "file:///" + table + ".csv", Table: table, Mode: modeAppend, AllowLoss: allowLoss})
				return err
			}
			for _, value := range tc.kept {
				if err := append(value, false); err != nil {
					t.Errorf("%q: %v", value, err)
				}
			}
			for _, value := range tc.lost {
				err := append(value, false)
				if err == nil || !strings.Contains(err.Error(), `line 3: column "v": the value is not what the `) || !strings.Contains(err.Error(), "allow_loss") || !tasks.IsPermanent(err) {
					t.Errorf("%q: error %v, permanent %t", value, err, tasks.IsPermanent(err))
				}
				if err := append(value, true); err != nil {
					t.Errorf("%q, allow_loss: %v", value, err)
				}
			}
			var rows int
			if err := kit.DB.QueryRow(t.Context(), "SELECT count(*) FROM imports."+table).Scan(&rows); err != nil || rows != 2*(len(tc.kept)+len(tc.lost)) {
				t.Errorf("%d rows, error %v", rows, err)
			}
		})
	}
}

// Postgres itself says whether a value is the same with a type's modifier as without.
func TestKeepers_AgreeWithPostgres(t *testing.T) {
	t.Parallel()
	conn, err := pgx.Connect(t.Context(), testservers.Postgres(t))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close(context.WithoutCancel(t.Context())) })
	clock := rapid.StringMatching(`[01][0-9]:[0-5][0-9]:[0-5][0-9](\.[0-9]{1,6})?`)
	number := rapid.StringMatching(`-?[0-9]{1,5}(\.[0-9]{0,7})?([eE][-+]?[0-3])?`)
	types := []struct {
		name, same string // same is SQL with $1::text for the value
		values     *rapid.Generator[string]
	}{
		{"numeric(12,3)", "$1::numeric(12,3) = $1::numeric", number},
		{"numeric(12,0)", "$1::numeric(12,0) = $1::numeric", number},
		{"time(2)", "$1::time(2) = $1::time", clock},
		{"timestamp(4)", "$1::timestamp(4) = $1::timestamp", rapid.Map(clock, func(s string) string { return "2024-02-29 " + s })},
		{"interval(1)", "$1::interval(1) = $1::interval", clock},
		{"varchar(3)", "$1::varchar(3) = $1 OR char_length(rtrim($1)) > 3", rapid.StringMatching(`[aä ]{1,3} {0,2}[aä]?`)},
		// As short as can be; with as many digits as the value has, more is kept.
		{"real", "$1::real::text::numeric = $1::numeric", rapid.StringMatching(`-?[1-9][0-9]{0,3}(\.[0-9]{1,2})?`)},
	}
	var columns []string
	for _, typ := range types {
		columns = append(columns, pgx.Identifier{typ.name}.Sanitize()+" "+typ.name)
	}
	if _, err := conn.Exec(t.Context(), "CREATE SCHEMA imports; CREATE TABLE imports.t ("+strings.Join(columns, ", ")+")"); err != nil {
		t.Fatal(err)
	}
	tx, err := conn.Begin(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	attributes, err := (&loader{table: "t"}).attributes(t.Context(), tx)
	if err != nil {
		t.Fatal(err)
	}
	rapid.Check(t, func(r *rapid.T) {
		for i, typ := range types {
			value := typ.values.Draw(r, typ.name)
			var same bool
			if err := tx.QueryRow(t.Context(), "SELECT "+strings.ReplaceAll(typ.same, "$1", "$1::text"), value).Scan(&same); err != nil {
				r.Fatalf("%s of %q: %v", typ.name, value, err)
			}
			if kept := keeperOf(attributes[i].columnType, false)(value); kept != same {
				r.Errorf("%s keeps %q: %t; Postgres says %t", typ.name, value, kept, same)
			}
		}
	})
}
