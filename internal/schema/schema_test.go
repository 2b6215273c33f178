package schema

import (
	"context"
	"errors"
	"log/slog"
	"net/url"
	"strings"
	"testing"

	"github.com/jackc/pgerrcode"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/carpool-go/carpool/internal/testservers"
)

func TestMain(m *testing.M) { testservers.Main(m) }

// migrateTo brings a database to an older version.
func migrateTo(t *testing.T, databaseURL string, version int64) *pgx.Conn {
	t.Helper()
	db, provider, err := open(databaseURL)
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	if _, err := db.ExecContext(t.Context(), makeSchema); err != nil {
		t.Fatal(err)
	}
	if _, err := provider.UpTo(t.Context(), version); err != nil {
		t.Fatal(err)
	}
	conn, err := pgx.Connect(t.Context(), databaseURL)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close(context.Background()) })
	return conn
}

// A database of an older version has rows that are larger than payloads may be, and roles
// with rights of their own.
func TestMigrate_TheLimitOnPayloadsComesToWhatIsThere(t *testing.T) {
	t.Parallel()
	databaseURL := testservers.Postgres(t)
	conn := migrateTo(t, databaseURL, 5)
	exec := func(conn *pgx.Conn, sql string) {
		t.Helper()
		if _, err := conn.Exec(t.Context(), sql); err != nil {
			t.Fatalf("%s: %v", sql, err)
		}
	}
	u, err := url.Parse(databaseURL)
	if err != nil {
		t.Fatal(err)
	}
	name := strings.Trim(u.Path, "/")
	producer, worker := "producer_"+name, "worker_"+name
	for _, sql := range []string{
		"CREATE ROLE " + producer + " LOGIN PASSWORD 'x'", "CREATE ROLE " + worker + " LOGIN PASSWORD 'x'",
		"GRANT USAGE ON SCHEMA carpool TO " + producer + ", " + worker,
		"GRANT EXECUTE ON FUNCTION carpool.enqueue TO " + producer,
		"GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA carpool TO " + worker,
		`INSERT INTO carpool.kinds VALUES ('note:take', '[{"name": "text", "type": "string"}]', now())`,
		"SELECT carpool.enqueue('note:take', jsonb_build_object('text', repeat('x', 2000000)))",
		"INSERT INTO carpool.schedules (name, cron, kind, payload) VALUES ('large', '@daily', 'note:take', jsonb_build_object('text', repeat('x', 2000000)))",
	} {
		exec(conn, sql)
	}
	t.Cleanup(func() {
		for _, sql := range []string{"DROP OWNED BY " + producer + ", " + worker, "DROP ROLE " + producer + ", " + worker} {
			if _, err := conn.Exec(context.Background(), sql); err != nil {
				t.Error(err)
			}
		}
	})
	if err := Migrate(t.Context(), databaseURL, slog.New(slog.DiscardHandler)); err != nil {
		t.Fatal(err)
	}

	as := func(role string) *pgx.Conn {
		t.Helper()
		u.User = url.UserPassword(role, "x")
		conn, err := pgx.Connect(t.Context(), u.String())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = conn.Close(context.Background()) })
		return conn
	}
	var size int
	if err := conn.QueryRow(t.Context(), "SELECT payload_size FROM carpool.outbox").Scan(&size); err != nil || size != 2_000_012 {
		t.Errorf("the row that was there has the size %d, %v", size, err)
	}
	exec(as(worker), "UPDATE carpool.settings SET value = 1000000 WHERE name = 'max_payload' AND value = 1048576")
	// What is large may go on with its life, but for its payload.
	exec(conn, "UPDATE carpool.outbox SET problem = 'it is large'")
	exec(conn, "UPDATE carpool.schedules SET enabled = false, problem = 'it is large'")

	producing := as(producer)
	for _, c := range []struct {
		conn *pgx.Conn
		sql  string
		code string
	}{
		{producing, "SELECT carpool.enqueue('note:take', jsonb_build_object('text', repeat('x', 999988)))", ""},
		{producing, "SELECT carpool.enqueue('note:take', jsonb_build_object('text', repeat('x', 999989)))", pgerrcode.InvalidParameterValue},
		{producing, "SELECT * FROM carpool.settings", pgerrcode.InsufficientPrivilege},
		{producing, "CREATE TEMP TABLE mine (kind text, payload text)", ""},
		{producing, "CREATE TRIGGER mine BEFORE INSERT ON mine FOR EACH ROW EXECUTE FUNCTION carpool.limit_payload()", pgerrcode.InsufficientPrivilege},
		{conn, "UPDATE carpool.outbox SET payload = payload", pgerrcode.InvalidParameterValue},
		{conn, "UPDATE carpool.schedules SET payload = payload", pgerrcode.InvalidParameterValue},
	} {
		_, err := c.conn.Exec(t.Context(), c.sql)
		e, refused := errors.AsType[*pgconn.PgError](err)
		switch {
		case c.code == "" && err != nil, c.code != "" && (!refused || e.Code != c.code):
			t.Errorf("%s: %v", c.sql, err)
		case c.code == pgerrcode.InvalidParameterValue && (!strings.HasPrefix(e.Message, "note:take payload: ") ||
			!strings.HasSuffix(e.Message, " bytes are more than the limit of 1000000, which MAX_PAYLOAD sets") || e.Hint == ""):
			t.Errorf("%s: it is said so: %s; %s", c.sql, e.Message, e.Hint)
		}
	}
}

func TestMigrations_GoDownAgain(t *testing.T) {
	t.Parallel()
	databaseURL := testservers.Postgres(t)
	migrateTo(t, databaseURL, newest())
	db, provider, err := open(databaseURL)
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	if _, err := provider.DownTo(t.Context(), 0); err != nil {
		t.Fatal(err)
	}
	if _, err := provider.Up(t.Context()); err != nil {
		t.Error(err)
	}
}

// newOwner makes a role that owns nothing, and returns the URL with which it logs in.
func newOwner(t *testing.T, conn *pgx.Conn, databaseURL string) (as, role string) {
	t.Helper()
	u, err := url.Parse(databaseURL)
	if err != nil {
		t.Fatal(err)
	}
	role = "owner_" + strings.Trim(u.Path, "/")
	if _, err := conn.Exec(t.Context(), "CREATE ROLE "+role+" LOGIN PASSWORD 'x' IN ROLE carpool_operator"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		for _, sql := range []string{"DROP OWNED BY " + role + " CASCADE", "DROP ROLE " + role} {
			if _, err := conn.Exec(context.Background(), sql); err != nil {
				t.Error(err)
			}
		}
	})
	u.User = url.UserPassword(role, "x")
	return u.String(), role
}

func TestMigrate_NeedsNoRightToMakeSchemasThatAreThere(t *testing.T) {
	t.Parallel()
	databaseURL := testservers.Postgres(t)
	migrateTo(t, testservers.Postgres(t), newest()) // which makes the role of operators for all databases
	log := slog.New(slog.DiscardHandler)
	admin, err := pgx.Connect(t.Context(), databaseURL)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = admin.Close(context.Background()) })
	as, role := newOwner(t, admin, databaseURL)
	if err := Migrate(t.Context(), as, log); err == nil {
		t.Fatal("a role without the right to create schemas has migrated an empty database, so the test proves nothing")
	}
	for _, schema := range []string{"carpool", "imports"} {
		if _, err := admin.Exec(t.Context(), "CREATE SCHEMA "+schema+" AUTHORIZATION "+role); err != nil {
			t.Fatal(err)
		}
	}
	for _, when := range []string{"first", "when all is up to date"} {
		if err := Migrate(t.Context(), as, log); err != nil {
			t.Errorf("%s: %v", when, err)
		}
	}
}

func TestMigrate_TablesWithoutTheirVersionsSayTheWayOut(t *testing.T) {
	t.Parallel()
	databaseURL := testservers.Postgres(t)
	conn := migrateTo(t, databaseURL, newest())
	if _, err := conn.Exec(t.Context(), "TRUNCATE carpool.schema_version"); err != nil { // as pg_dump --schema-only leaves it
		t.Fatal(err)
	}
	err := Migrate(t.Context(), databaseURL, slog.New(slog.DiscardHandler))
	if err == nil || !strings.Contains(err.Error(), "pg_dump --data-only") || !strings.Contains(err.Error(), "DROP SCHEMA") {
		t.Errorf("the error is %v, want the way out", err)
	}
}
