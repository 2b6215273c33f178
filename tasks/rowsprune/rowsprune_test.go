package rowsprune_test

import (
	"context"
	"errors"
	"log/slog"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/jackc/pgx/v5"

	"github.com/carpool-go/carpool/dbpool"
	"github.com/carpool-go/carpool/tasks"
	"github.com/carpool-go/carpool/tasks/rowsprune"
	"github.com/carpool-go/carpool/tasks/taskstest"
)

type prunes struct{ *taskstest.Kit }

func newPrunes(t testing.TB, sql ...string) prunes {
	t.Helper()
	p := prunes{taskstest.New(t)}
	p.exec(t, sql...)
	return p
}

func (p prunes) exec(t testing.TB, sql ...string) {
	t.Helper()
	for _, s := range sql {
		if _, err := p.DB.Exec(t.Context(), s); err != nil {
			t.Fatalf("%s: %v", s, err)
		}
	}
}

// run runs a job on a worker whose operator has listed the payload's table.
func (p prunes) run(t testing.TB, payload rowsprune.Prune) (rowsprune.Result, error) {
	t.Helper()
	listed := payload.Table
	if !strings.Contains(listed, ".") {
		listed = "public." + listed
	}
	return taskstest.Run(t, p.Kit, pruner(t, listed).Handle, payload)
}

func pruner(t testing.TB, list string) rowsprune.Pruner {
	t.Helper()
	tables, err := rowsprune.ParseTables(list)
	if err != nil {
		t.Fatal(err)
	}
	return rowsprune.Pruner{Tables: tables}
}

// ids are those of the rows that are left.
func (p prunes) ids(t testing.TB, table string) string {
	t.Helper()
	var ids string
	if err := p.DB.QueryRow(t.Context(), "SELECT coalesce(string_agg(id::text, ' ' ORDER BY id), '') FROM "+table).Scan(&ids); err != nil {
		t.Fatal(err)
	}
	return ids
}

func (p prunes) count(t testing.TB, table string) (n int) {
	t.Helper()
	if err := p.DB.QueryRow(t.Context(), "SELECT count(*) FROM "+table).Scan(&n); err != nil {
		t.Fatal(err)
	}
	return n
}

func want[T any](t testing.TB, what string, got, want T) {
	t.Helper()
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("%s (-want +got):\n%s", what, diff)
	}
}

// start runs f in a goroutine; its result is to be received.
func start(f func() error) <-chan error {
	done := make(chan error, 1)
	go func() { done <- f() }()
	return done
}

func TestPrune_DeletesWhatIsOlderInBatches(t *testing.T) {
	t.Parallel()
	for _, typ := range []string{"timestamptz", "timestamp", "date"} {
		for name, index := range map[string]string{"by index": "CREATE INDEX ON events (at, id)", "by heap": "CREATE INDEX ON events (id, at)"} {
			t.Run(typ+" "+name, func(t *testing.T) {
				t.Parallel()
				p := newPrunes(t,
					"CREATE TABLE events (id int, at "+typ+")",
					index,
					// 1 to 25 are 30 days old and more.
					"INSERT INTO events SELECT i, now() - (55 - i) * interval '1 day' - interval '1 hour' FROM generate_series(1, 50) i ORDER BY random()",
					"INSERT INTO events VALUES (101, NULL), (102, 'infinity'), (103, '-infinity')",
				)
				result, err := p.run(t, rowsprune.Prune{Table: "events", Column: "at", OlderThan: "30d", Batch: 10})
				if err != nil {
					t.Fatal(err)
				}
				// A day is old when it has ended.
				first, deleted := 26, int64(26)
				if typ == "date" && p.ids(t, "events")[:2] == "25" {
					first, deleted = 25, 25
				}
				want(t, "result", result, rowsprune.Result{Deleted: deleted, Batches: 3})
				var left []string
				for i := first; i <= 50; i++ {
					left = append(left, strconv.Itoa(i))
				}
				want(t, "rows left", p.ids(t, "events"), strings.Join(left, " ")+" 101 102")

				result, err = p.run(t, rowsprune.Prune{Table: "public.events", Column: "at", OlderThan: "30d"})
				if err != nil {
					t.Fatal(err)
				}
				want(t, "result of another run", result, rowsprune.Result{})
			})
		}
	}
}

func TestPrune_TheBoundaryIsExact(t *testing.T) {
	t.Parallel()
	p := newPrunes(t,
		"CREATE TABLE a (id int, at timestamptz)",
		"CREATE TABLE b (id int, at timestamp DEFAULT now())",
		"CREATE TABLE c (id int, at date)",
		"INSERT INTO a VALUES (1, now() - interval '1 hour'), (2, now() - interval '59 minutes')",
		"INSERT INTO b VALUES (1, now() - interval '1 hour'), (2, now() - interval '59 minutes')",
		"INSERT INTO c SELECT i, (now() - interval '48 hours')::date + i FROM generate_series(-1, 1) i",
	)
	for table, age := range map[string]string{"a": "1h", "b": "60m", "c": "1d24h"} {
		if _, err := p.run(t, rowsprune.Prune{Table: table, Column: "at", OlderThan: age}); err != nil {
			t.Fatal(err)
		}
	}
	want(t, "timestamptz", p.ids(t, "a"), "2")
	want(t, "timestamp", p.ids(t, "b"), "2")
	want(t, "date", p.ids(t, "c"), "0 1")
}

func TestPrune_WhateverTheSessionsSettingsAre(t *testing.T) {
	t.Parallel()
	for _, index := range []string{"(at)", "(id)"} {
		p := prunes{taskstest.New(t)}
		conn, err := pgx.Connect(t.Context(), p.DatabaseURL)
		if err != nil {
			t.Fatal(err)
		}
		for _, setting := range []string{"datestyle = 'SQL, DMY'", "timezone = 'Asia/Kolkata'"} {
			if _, err := conn.Exec(t.Context(), "DO $$ BEGIN EXECUTE format('ALTER DATABASE %I SET "+strings.ReplaceAll(setting, "'", "''")+"', current_database()); END $$"); err != nil {
				t.Fatal(err)
			}
		}
		if err := conn.Close(t.Context()); err != nil {
			t.Fatal(err)
		}
		p.exec(t, "CREATE TABLE e (id int, at timestamptz)", "CREATE INDEX ON e "+index,
			"INSERT INTO e SELECT i, now() - i * interval '25 hours' FROM generate_series(1, 100) i",
			"CREATE TABLE f AS SELECT id, at::timestamp FROM e", "CREATE INDEX ON f "+index)
		for _, table := range []string{"e", "f"} {
			result, err := p.run(t, rowsprune.Prune{Table: table, Column: "at", OlderThan: "250h", Batch: 7})
			if err != nil {
				t.Fatal(err)
			}
			want(t, "deleted", result.Deleted, 91)
		}
	}
}

func TestPrune_NamesAreTakenLiterally(t *testing.T) {
	t.Parallel()
	p := newPrunes(t,
		`CREATE SCHEMA "A; %t"`,
		`CREATE TABLE "A; %t"."select %c ' \ é" (id int, "%y at" timestamptz DEFAULT '2000-01-01')`,
		`INSERT INTO "A; %t"."select %c ' \ é" VALUES (1)`,
		`CREATE TABLE "Events" (id int, "At" date DEFAULT '2000-01-01')`, `INSERT INTO "Events" VALUES (1)`,
		`CREATE TABLE events (id int, at date DEFAULT '2000-01-01')`, `INSERT INTO events VALUES (1)`,
	)
	for _, payload := range []rowsprune.Prune{
		{Table: `A; %t.select %c ' \ é`, Column: "%y at", OlderThan: "1d"},
		{Table: "Events", Column: "At", OlderThan: "1d"},
	} {
		result, err := p.run(t, payload)
		if err != nil {
			t.Fatal(err)
		}
		want(t, "deleted", result.Deleted, 1)
	}
	want(t, "another table's rows", p.count(t, "events"), 1)
}

func TestPrune_PartitionsAndHeirs(t *testing.T) {
	t.Parallel()
	p := newPrunes(t,
		"CREATE TABLE events (id int, at timestamptz) PARTITION BY RANGE (at)",
		"CREATE TABLE old PARTITION OF events FOR VALUES FROM ('2000-01-01') TO ('2010-01-01')",
		"CREATE TABLE older PARTITION OF events FOR VALUES FROM ('1990-01-01') TO ('2000-01-01') PARTITION BY LIST (id)",
		"CREATE TABLE older_1 PARTITION OF older DEFAULT",
		"CREATE TABLE now PARTITION OF events DEFAULT",
		"INSERT INTO events SELECT i, '1999-12-20'::timestamptz + i * interval '1 day' FROM generate_series(1, 20) i",
		"INSERT INTO events SELECT i, now() FROM generate_series(21, 25) i",
		"CREATE INDEX ON old (at)",
		"CREATE TABLE base (id int, at date)", "CREATE TABLE heir () INHERITS (base)",
		"INSERT INTO base VALUES (1, '2000-01-01')", "INSERT INTO heir VALUES (2, '2000-01-01'), (3, now())",
	)
	result, err := p.run(t, rowsprune.Prune{Table: "events", Column: "at", OlderThan: "30d", Batch: 4})
	if err != nil {
		t.Fatal(err)
	}
	want(t, "deleted", result.Deleted, 20)
	want(t, "rows left", p.ids(t, "events"), "21 22 23 24 25")
	result, err = p.run(t, rowsprune.Prune{Table: "base", Column: "at", OlderThan: "30d"})
	if err != nil {
		t.Fatal(err)
	}
	want(t, "deleted from base and heir", result.Deleted, 2)
	want(t, "rows left", p.ids(t, "base"), "3")
}

// A table of more than one stretch of pages.
func TestPrune_ALargeTableWithoutAnIndex(t *testing.T) {
	t.Parallel()
	p := newPrunes(t,
		"CREATE TABLE events (id int, at timestamptz, fill text)",
		"ALTER TABLE events ALTER fill SET STORAGE PLAIN",
		// One row a page.
		"INSERT INTO events SELECT i, now() - CASE WHEN i % 3 = 0 THEN interval '1 day' ELSE '9 days' END, repeat('x', 5000) FROM generate_series(1, 2100) i",
	)
	result, err := p.run(t, rowsprune.Prune{Table: "events", Column: "at", OlderThan: "2d", Batch: 500})
	if err != nil {
		t.Fatal(err)
	}
	want(t, "result", result, rowsprune.Result{Deleted: 1400, Batches: 4})
	want(t, "rows left", p.count(t, "events"), 700)
}

func TestPrune_WaitsForNoRowThatOthersHaveLocked(t *testing.T) {
	t.Parallel()
	for _, index := range []string{"(at)", "(id)"} {
		p := newPrunes(t, "CREATE TABLE events (id int, at timestamptz DEFAULT '2000-01-01')", "CREATE INDEX ON events "+index,
			"INSERT INTO events SELECT generate_series(1, 20)")
		tx, err := p.DB.Begin(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if _, err := tx.Exec(t.Context(), "SELECT FROM events WHERE id IN (3, 4, 11) FOR UPDATE"); err != nil {
			t.Fatal(err)
		}
		result, err := p.run(t, rowsprune.Prune{Table: "events", Column: "at", OlderThan: "1d", Batch: 2})
		if err != nil {
			t.Fatal(err)
		}
		want(t, "deleted, left", [2]int64{result.Deleted, result.Left}, [2]int64{17, 3})
		want(t, "rows left", p.ids(t, "events"), "3 4 11")
		if err := tx.Rollback(t.Context()); err != nil {
			t.Fatal(err)
		}
		if result, err = p.run(t, rowsprune.Prune{Table: "events", Column: "at", OlderThan: "1d", Batch: 2}); err != nil {
			t.Fatal(err)
		}
		want(t, "result of the next run", result, rowsprune.Result{Deleted: 3, Batches: 2})
	}
}

func TestPrune_InterruptedItGoesOnWhereItWas(t *testing.T) {
	t.Parallel()
	for _, index := range []string{"(at)", "(id)"} {
		p := newPrunes(t, "CREATE TABLE events (id int, at timestamptz DEFAULT '2000-01-01')", "CREATE INDEX ON events "+index,
			"INSERT INTO events SELECT generate_series(1, 1000)")
		payload := rowsprune.Prune{Table: "events", Column: "at", OlderThan: "1d", Batch: 10}
		ctx, cancel := context.WithCancel(t.Context())
		var shown []string
		job := &tasks.Job{DB: p.DB, Log: slog.New(slog.DiscardHandler), WriteResult: func(b []byte) error {
			shown = append(shown, string(b))
			if len(shown) == 3 {
				cancel()
			}
			return errors.New("Redis is away") // so that each one is tried
		}}
		_, err := pruner(t, "public.events").Handle(ctx, job, payload)
		if !errors.Is(err, context.Canceled) || tasks.IsPermanent(err) {
			t.Fatalf("error %v, permanent %t; want that it was cancelled", err, tasks.IsPermanent(err))
		}
		want(t, "progress", shown, []string{
			`{"progress":{"deleted":10,"batches":1}}`, `{"progress":{"deleted":20,"batches":2}}`, `{"progress":{"deleted":30,"batches":3}}`,
		})
		want(t, "rows left", p.count(t, "events"), 970)
		result, err := p.run(t, payload)
		if err != nil {
			t.Fatal(err)
		}
		want(t, "result of the second run", result, rowsprune.Result{Deleted: 970, Batches: 97})
	}
}

func TestPrune_SeveralAtOnceShareTheRows(t *testing.T) {
	t.Parallel()
	for _, index := range []string{"(at)", "(id)"} {
		p := newPrunes(t, "CREATE TABLE events (id int, at timestamptz)", "CREATE INDEX ON events "+index,
			"INSERT INTO events SELECT i, '2000-01-01'::timestamptz + i / 10 * interval '1 s' FROM generate_series(1, 5000) i",
			"INSERT INTO events VALUES (0, now())")
		var all []<-chan error
		results := make([]rowsprune.Result, 4)
		for n := range results {
			all = append(all, start(func() (err error) {
				results[n], err = p.run(t, rowsprune.Prune{Table: "events", Column: "at", OlderThan: "1d", Batch: 50})
				return err
			}))
		}
		var deleted int64
		for n, done := range all {
			if err := <-done; err != nil {
				t.Fatal(err)
			}
			deleted += results[n].Deleted
		}
		want(t, "deleted by all", deleted, 5000)
		want(t, "rows left", p.ids(t, "events"), "0")
	}
}

func TestPrune_GivesWayToOthersBetweenBatches(t *testing.T) {
	t.Parallel()
	p := newPrunes(t, "CREATE TABLE events (id int, at timestamptz DEFAULT '2000-01-01')", "INSERT INTO events SELECT generate_series(1, 500)")
	cfg := dbpool.DefaultConfig(p.DatabaseURL)
	cfg.Size, cfg.MaxOverflow, cfg.Logger = 1, 0, slog.New(slog.DiscardHandler)
	one, err := dbpool.Open(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(one.Close)
	p.DB = one
	done := start(func() error {
		_, err := p.run(t, rowsprune.Prune{Table: "events", Column: "at", OlderThan: "1d", Batch: 1})
		return err
	})
	between := 0
	for n := 500; n > 0; {
		if n = p.count(t, "events"); n > 0 && n < 500 {
			between++
		}
	}
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	if between < 10 {
		t.Errorf("others had the only connection %d times while 500 batches ran", between)
	}
}

func TestPrune_RowsThatAreNeededStay(t *testing.T) {
	t.Parallel()
	const fk = `prune public.orders: ERROR: update or delete on table "orders" violates foreign key constraint "items_order_id_fkey" on table "items" (SQLSTATE 23503)`
	for _, index := range []string{"(at)", "(at2)"} {
		p := newPrunes(t, "CREATE TABLE orders (id int PRIMARY KEY, at timestamptz, at2 date)", "CREATE INDEX ON orders "+index,
			"INSERT INTO orders SELECT i, '2000-01-01'::timestamptz + i % 1000 * interval '1 s' FROM generate_series(918273001, 918273030) i",
			"CREATE TABLE items (order_id int REFERENCES orders)", "INSERT INTO items VALUES (918273025)")
		_, err := p.run(t, rowsprune.Prune{Table: "orders", Column: "at", OlderThan: "1d", Batch: 10})
		if err == nil || err.Error() != fk || !tasks.IsPermanent(err) {
			t.Errorf("error %v, permanent %t; want %s", err, tasks.IsPermanent(err), fk)
		}
		want(t, "rows left", p.count(t, "orders"), 10)
	}
}

func TestPrune_TriggersThatKeepRows(t *testing.T) {
	t.Parallel()
	for _, index := range []string{"(at)", "(id)"} {
		p := newPrunes(t, "CREATE TABLE events (id int, at timestamptz DEFAULT '2000-01-01')", "CREATE INDEX ON events "+index,
			"INSERT INTO events SELECT generate_series(1, 30)",
			"CREATE FUNCTION keep() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN IF OLD.id > 5 THEN RETURN NULL; END IF; RETURN OLD; END $$",
			"CREATE TRIGGER keep BEFORE DELETE ON events FOR EACH ROW EXECUTE FUNCTION keep()")
		result, err := p.run(t, rowsprune.Prune{Table: "events", Column: "at", OlderThan: "1d", Batch: 10})
		if err != nil {
			t.Fatal(err)
		}
		want(t, "deleted, left", [2]int64{result.Deleted, result.Left}, [2]int64{5, 25})

		p.exec(t, "CREATE OR REPLACE FUNCTION keep() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 's3cret %', OLD.id; END $$")
		_, err = p.run(t, rowsprune.Prune{Table: "events", Column: "at", OlderThan: "1d"})
		if err == nil || !tasks.IsPermanent(err) || err.Error() != "prune public.events: a trigger refuses to delete a row (SQLSTATE P0001)" {
			t.Errorf("error %v, permanent %t", err, tasks.IsPermanent(err))
		}
	}
}

func TestPrune_WhatIsNotThereIsAPermanentError(t *testing.T) {
	t.Parallel()
	p := newPrunes(t, `CREATE TABLE events (id int, at timestamptz, "time" time, word text, gone date)`, "ALTER TABLE events DROP gone",
		"CREATE VIEW v AS SELECT * FROM events", "CREATE MATERIALIZED VIEW m AS SELECT * FROM events",
		// What a rule makes of a view looks like a table to who deletes from it.
		"CREATE RULE v AS ON DELETE TO v DO INSTEAD DELETE FROM events", "CREATE SEQUENCE s", "CREATE TYPE c AS (at date)",
		"CREATE INDEX i ON events (at)",
		"CREATE FOREIGN DATA WRAPPER w", "CREATE SERVER r FOREIGN DATA WRAPPER w", "CREATE FOREIGN TABLE f (id int, at timestamptz) SERVER r",
		"CREATE TABLE parts (id int, at timestamptz) PARTITION BY LIST (id)", "CREATE FOREIGN TABLE part PARTITION OF parts DEFAULT SERVER r")
	for _, tc := range []struct{ table, column, wanted string }{
		{"nowhere", "at", `prune public.nowhere: there is no table "nowhere" in the schema "public"`},
		{"x.events", "at", `there is no table "events" in the schema "x"`},
		{"Events", "at", `there is no table "Events"`},
		{"events; DROP TABLE events", "at", `there is no table "events; DROP TABLE events"`},
		{"v", "at", "it is not a table that has its rows in this database"},
		{"m", "at", "it is not a table"},
		{"s", "last_value", "it is not a table"},
		{"c", "at", "it is not a table"},
		{"i", "at", "it is not a table"},
		{"f", "at", "it is not a table that has its rows in this database"},
		{"parts", "at", `its partition "public"."part" is not in this database`},
		{"events", "when", `there is no column "when"`},
		{"events", "gone", `there is no column "gone"`},
		{"events", "ctid", `there is no column "ctid"`},
		{"events", "word", `column "word" is text; it must be timestamptz, timestamp or date`},
		{"events", "time", `column "time" is time without time zone; it must be`},
	} {
		_, err := p.run(t, rowsprune.Prune{Table: tc.table, Column: tc.column, OlderThan: "1d"})
		if err == nil || !strings.Contains(err.Error(), tc.wanted) || !tasks.IsPermanent(err) {
			t.Errorf("%s.%s: error %v, permanent %t; want %q", tc.table, tc.column, err, tasks.IsPermanent(err), tc.wanted)
		}
	}
}

func TestPrune_PayloadIsValidated(t *testing.T) {
	t.Parallel()
	valid := rowsprune.Prune{Table: "s.t", Column: "at", OlderThan: "30d", Batch: 1000}
	for _, tc := range []struct {
		change func(*rowsprune.Prune)
		wanted string
	}{
		{func(*rowsprune.Prune) {}, ""},
		{func(p *rowsprune.Prune) { p.Table = "t" }, ""},
		{func(p *rowsprune.Prune) { p.Batch = 0 }, ""},
		{func(p *rowsprune.Prune) { p.Batch = 50000 }, ""},
		{func(p *rowsprune.Prune) { p.OlderThan = "1d12h" }, ""},
		{func(p *rowsprune.Prune) { p.OlderThan = "90m" }, ""},
		{func(p *rowsprune.Prune) { p.OlderThan = "1h30m" }, ""},
		{func(p *rowsprune.Prune) { p.OlderThan = "36500d" }, ""},
		{func(p *rowsprune.Prune) { p.OlderThan = "0d1ms" }, ""},
		{func(p *rowsprune.Prune) { p.Table = "" }, "table: "},
		{func(p *rowsprune.Prune) { p.Table = "s." }, "table: "},
		{func(p *rowsprune.Prune) { p.Table = ".t" }, "table: "},
		{func(p *rowsprune.Prune) { p.Table = "a.b.c" }, "table: "},
		{func(p *rowsprune.Prune) { p.Table = `s."t"` }, "table: "},
		{func(p *rowsprune.Prune) { p.Table = "t\x00" }, "table: "},
		{func(p *rowsprune.Prune) { p.Table = strings.Repeat("x", 64) }, "table: "},
		{func(p *rowsprune.Prune) { p.Table = "pg_catalog.pg_class" }, "table: "},
		{func(p *rowsprune.Prune) { p.Table = "pg_toast.x" }, "table: "},
		{func(p *rowsprune.Prune) { p.Table = "information_schema.tables" }, "table: "},
		{func(p *rowsprune.Prune) { p.Table = "carpool.jobs_done" }, "table: the schema is carpool's own"},
		{func(p *rowsprune.Prune) { p.Table = "Carpool.jobs_done" }, ""}, // which is another one
		{func(p *rowsprune.Prune) { p.Table = "a,b.c" }, "table: "},
		{func(p *rowsprune.Prune) { p.Table = " a.b" }, "table: "},
		{func(p *rowsprune.Prune) { p.Table = "a. b" }, "table: "},
		{func(p *rowsprune.Prune) { p.Column = "" }, "column: "},
		{func(p *rowsprune.Prune) { p.Column = "t.at" }, "column: "},
		{func(p *rowsprune.Prune) { p.Column = `"at"` }, "column: "},
		{func(p *rowsprune.Prune) { p.OlderThan = "" }, "older_than: "},
		{func(p *rowsprune.Prune) { p.OlderThan = "30" }, "older_than: "},
		{func(p *rowsprune.Prune) { p.OlderThan = "30 days" }, "older_than: "},
		{func(p *rowsprune.Prune) { p.OlderThan = "0d" }, "older_than: "},
		{func(p *rowsprune.Prune) { p.OlderThan = "0s" }, "older_than: "},
		{func(p *rowsprune.Prune) { p.OlderThan = "-1h" }, "older_than: "},
		{func(p *rowsprune.Prune) { p.OlderThan = "1d-25h" }, "older_than: "},
		{func(p *rowsprune.Prune) { p.OlderThan = "1h1d" }, "older_than: "},
		{func(p *rowsprune.Prune) { p.OlderThan = "36501d" }, "older_than: "},
		{func(p *rowsprune.Prune) { p.OlderThan = "999999999999d" }, "older_than: "},
		{func(p *rowsprune.Prune) { p.OlderThan = "2562047h" }, ""},
		{func(p *rowsprune.Prune) { p.OlderThan = "36500d2562047h" }, "older_than: "},
		{func(p *rowsprune.Prune) { p.Batch = -1 }, "batch: "},
		{func(p *rowsprune.Prune) { p.Batch = 50001 }, "batch: "},
	} {
		p := valid
		tc.change(&p)
		if err := p.Validate(); (err == nil) != (tc.wanted == "") || err != nil && !strings.HasPrefix(err.Error(), tc.wanted) {
			t.Errorf("%+v: %v, want %q", p, err, tc.wanted)
		}
	}
}

func TestPrune_WorksOnTheTablesThatAreListedAndNoOther(t *testing.T) {
	t.Parallel()
	p := newPrunes(t, `CREATE SCHEMA "App"`)
	tables := []string{`public.events`, `public."Events"`, `"App".events`, `"App"."Log ins; é"`}
	for _, table := range tables {
		p.exec(t, "CREATE TABLE "+table+" (id int, at date)")
	}
	for _, tc := range []struct{ list, table, refused string }{
		{"", "events", `this worker prunes no tables; set PRUNE_ALLOW to those it may delete rows of, such as "public.events"`},
		{" , ", "App.events", `this worker prunes no tables; set PRUNE_ALLOW to those it may delete rows of, such as "App.events"`},
		{"public.events", "events", ""},
		{"public.events", "public.events", ""},
		{"App.x,public.events , ", "events", ""},
		{"public.events", "Events", `"public.Events" is not in PRUNE_ALLOW, the tables that this worker may delete rows of; add it there, spelt the same`},
		{"public.events", "App.events", `"App.events" is not in PRUNE_ALLOW, `},
		{"app.events", "App.events", `"App.events" is not in PRUNE_ALLOW, `},
		{"App.events", "events", `"public.events" is not in PRUNE_ALLOW, `},
		{"public.events", "App.Log ins; é", `"App.Log ins; é" is not in PRUNE_ALLOW, `},
		{"public.events,App.Log ins; é", "App.Log ins; é", ""},
		{"public.events", "x.a\nb", `"x.a\nb" is not in PRUNE_ALLOW, `},
	} {
		for _, table := range tables {
			p.exec(t, "TRUNCATE "+table, "INSERT INTO "+table+" VALUES (1, '2000-01-01')")
		}
		payload := rowsprune.Prune{Table: tc.table, Column: "at", OlderThan: "1d"}
		if err := payload.Validate(); err != nil {
			t.Errorf("%q: %v", tc.table, err)
		}
		_, err := taskstest.Run(t, p.Kit, pruner(t, tc.list).Handle, payload)
		rows := 0
		for _, table := range tables {
			rows += p.count(t, table)
		}
		if tc.refused == "" {
			if err != nil || rows != len(tables)-1 {
				t.Errorf("%q with PRUNE_ALLOW=%s: %d of %d rows are left, error %v", tc.table, tc.list, rows, len(tables), err)
			}
			continue
		}
		if err == nil || !strings.HasPrefix(err.Error(), tc.refused) || !tasks.IsPermanent(err) || rows != len(tables) {
			t.Errorf("%q with PRUNE_ALLOW=%s: %d of %d rows are left, error %v, permanent %t; want %q",
				tc.table, tc.list, rows, len(tables), err, tasks.IsPermanent(err), tc.refused)
		}
	}
}

func TestParseTables_NamesEveryEntryThatIsWrong(t *testing.T) {
	t.Parallel()
	long := strings.Repeat("x", 64)
	for list, faults := range map[string][]string{
		"":                              nil,
		"a.b":                           nil,
		" a.b ,c.d e,":                  nil,
		"a.b,c":                         {`"c" is no schema.table`},
		"carpool.jobs_done":             {`"carpool.jobs_done": the schema is carpool's own`},
		"carpool.webhook_deliveries":    {`"carpool.webhook_deliveries": the schema is carpool's own`},
		"pg_catalog.pg_class":           {`"pg_catalog.pg_class": the schema is Postgres' own`},
		"a.b,x,carpool.kinds,a.b.c":     {`"x" is no schema.table`, `"carpool.kinds": the schema is carpool's`, `"a.b.c": it must be schema.table`},
		`public."Events"`:               {`"public.\"Events\"": it must be schema.table, each name at most 63 bytes and spelt as in the catalog, without quotes`},
		"a." + long:                     {`"a.` + long + `": it must be schema.table`},
		"a. b":                          {`"a. b": it must be`},
		"a.":                            {`"a.": it must be`},
		".b":                            {`".b": it must be`},
		strings.Repeat("secret ", 1000): {`"secret secret`},
	} {
		tables, err := rowsprune.ParseTables(list)
		if (err == nil) != (faults == nil) {
			t.Errorf("%q: %v", list, err)
			continue
		}
		if err == nil {
			continue
		}
		parts := strings.Split(err.Error(), "; ")
		if len(parts) != len(faults) || len(err.Error()) > 1000 {
			t.Errorf("%q: %v\nwant %d faults", list, err, len(faults))
			continue
		}
		for i, want := range faults {
			if !strings.HasPrefix(parts[i], want) {
				t.Errorf("%q: fault %d is %q, want %q", list, i+1, parts[i], want)
			}
		}
		// Of a list that is wrong, nothing counts.
		if diff := cmp.Diff(rowsprune.Tables{}, tables, cmp.AllowUnexported(rowsprune.Tables{})); diff != "" {
			t.Errorf("%q: %s", list, diff)
		}
	}
}
