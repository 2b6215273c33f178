package csvimport_test

import (
	"context"
	"fmt"
	"strings"
	"testing"

	"github.com/jackc/pgx/v5"

	"github.com/carpool-go/carpool/tasks"
	"github.com/carpool-go/carpool/tasks/csvimport"
)

// Of a file that both take, the importer and Postgres' own COPY make the same rows. Either
// may refuse what the other takes.
func FuzzImport_AgreesWithCOPY(f *testing.F) {
	const delimiters = ",;\t|^ "
	for _, files := range oddFiles() {
		for _, file := range files {
			if len(file.content) < 1000 {
				for n := range delimiters {
					if n == 0 || strings.Contains(file.content, delimiters[n:n+1]) {
						f.Add([]byte(file.content), byte(n))
					}
				}
			}
		}
	}
	i := newImports(f)
	conn, err := pgx.Connect(f.Context(), i.DatabaseURL)
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() { _ = conn.Close(context.Background()) })
	f.Fuzz(func(t *testing.T, data []byte, n byte) {
		file, delimiter := string(data), delimiters[int(n)%len(delimiters):][:1]
		result, err := i.runWith(t, csvimport.Import{Mode: "replace", Delimiter: delimiter, AllowEmpty: true}, file)
		if err != nil {
			if !tasks.IsPermanent(err) {
				t.Fatalf("error %v is not permanent", err)
			}
			return
		}
		// COPY has no sep= and no BOM, its header is the very first line, and before Postgres
		// 18 a line of \. is its end.
		header := strings.TrimLeft(strings.TrimPrefix(file, "\uFEFF"), "\r\n")
		if strings.HasPrefix(strings.ToLower(strings.Trim(header, `"`)), "sep=") || strings.Contains(file, `\.`) {
			return
		}
		copied, err := copyCSV(t.Context(), conn, header, delimiter, len(result.Columns))
		if err != nil {
			return
		}
		var columns []string
		for _, c := range result.Columns {
			columns = append(columns, pgx.Identifier{c.Name}.Sanitize()+"::text")
		}
		rows, err := i.DB.Query(t.Context(), "SELECT ARRAY["+strings.Join(columns, ", ")+"] FROM imports.t ORDER BY ctid")
		if err != nil {
			t.Fatal(err)
		}
		imported, err := pgx.CollectRows(rows, pgx.RowTo[[]*string])
		if err != nil {
			t.Fatal(err)
		}
		if len(imported) != len(copied) || int64(len(copied)) != result.Rows {
			t.Fatalf("%d rows, said to be %d; COPY has %d", len(imported), result.Rows, len(copied))
		}
		for y := range copied {
			for x, cell := range copied[y] {
				got, text := imported[y][x], ""
				if cell != nil {
					text = *cell
				}
				if !recovered(result.Columns[x].Type, text, got) {
					t.Errorf("row %d, column %d: COPY has %s; it became %s in a %s column", y+1, x+1, show(cell), show(got), result.Columns[x].Type)
				}
			}
		}
	})
}

// copyCSV returns the rows that COPY makes of a file with a header, as text.
func copyCSV(ctx context.Context, conn *pgx.Conn, file, delimiter string, width int) ([][]*string, error) {
	tx, err := conn.Begin(ctx)
	if err != nil {
		return nil, err
	}
	defer func() { _ = tx.Rollback(context.WithoutCancel(ctx)) }()
	names := make([]string, width)
	for n := range names {
		names[n] = fmt.Sprintf("c%d", n)
	}
	if _, err := tx.Exec(ctx, "CREATE TEMP TABLE copied ("+strings.Join(names, " text, ")+" text)"); err != nil {
		return nil, err
	}
	_, err = conn.PgConn().CopyFrom(ctx, strings.NewReader(file),
		fmt.Sprintf("COPY copied FROM STDIN (FORMAT csv, HEADER, DELIMITER '%s', FORCE_NULL (%s))", delimiter, strings.Join(names, ", ")))
	if err != nil {
		return nil, err
	}
	rows, err := tx.Query(ctx, "SELECT ARRAY["+strings.Join(names, ", ")+"] FROM copied ORDER BY ctid", pgx.QueryExecModeExec)
	if err != nil {
		return nil, err
	}
	return pgx.CollectRows(rows, pgx.RowTo[[]*string])
}
