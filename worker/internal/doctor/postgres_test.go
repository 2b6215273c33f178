package doctor

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/carpool-go/carpool/internal/servers"
	"github.com/carpool-go/carpool/internal/testservers"
)

// database makes a database with carpool's tables, on the shared server, and a role of its
// own that may do nothing there.
func database(t *testing.T, role string) (url, asRole string) {
	t.Helper()
	url = testservers.Postgres(t)
	migrate(t, url)
	exec(t, url, "CREATE ROLE "+role+" LOGIN PASSWORD 'hush'")
	t.Cleanup(func() { exec(t, url, "DROP OWNED BY "+role, "DROP ROLE "+role) })
	return url, as(t, url, role)
}

// statements are those of a way out, without what leads to them and what follows.
func statements(wayOut string) []string {
	_, after, found := strings.Cut(wayOut, "migrated: ")
	if !found {
		after = wayOut
	}
	list := strings.Split(after, "; ")
	return slices.DeleteFunc(list, func(s string) bool { return !strings.HasPrefix(s, "GRANT ") && !strings.HasPrefix(s, "ALTER ") })
}

func TestExamine_ADatabaseWithoutTablesIsAFailure(t *testing.T) {
	t.Parallel()
	url := testservers.Postgres(t)
	findings := examine(t, databaseOnly(t, url))
	require(t, findings, "postgres tables", Failure, "the database lacks carpool's tables", "migrate")
	migrate(t, url)
	requireOK(t, examine(t, databaseOnly(t, url)), "postgres tables")
	exec(t, url, "DELETE FROM carpool.schema_version WHERE version_id = (SELECT max(version_id) FROM carpool.schema_version)")
	require(t, examine(t, databaseOnly(t, url)), "postgres tables", Failure, "or their newest form", "migrate")
}

func TestExamine_NamesTheGrantsThatARoleLacksAndTheySuffice(t *testing.T) {
	t.Parallel()
	url, asRole := database(t, "doctor_grants")
	c := databaseOnly(t, asRole)
	findings := examine(t, c)
	require(t, findings, "postgres tables", Failure, "the role may not see which migrations", "postgres grants")
	f := require(t, findings, "postgres grants", Failure, "INSERT", `GRANT USAGE ON SCHEMA carpool TO "doctor_grants"`)
	imports := require(t, findings, "postgres grants", Warning, "csv:import", `GRANT USAGE, CREATE ON SCHEMA imports TO "doctor_grants"`)
	exec(t, url, append(statements(f.WayOut), statements(imports.WayOut)...)...)
	requireOK(t, examine(t, c), "postgres tables", "postgres grants", "postgres role")

	for lacking, grant := range map[string]string{
		"DELETE ON carpool.outbox":                         "GRANT DELETE ON carpool.outbox",
		"EXECUTE ON FUNCTION carpool.begin_run(text,text)": "GRANT EXECUTE ON FUNCTION carpool.begin_run",
		"EXECUTE ON FUNCTION carpool.run_key(text,text)":   "GRANT EXECUTE ON FUNCTION carpool.run_key",
	} {
		exec(t, url, "REVOKE "+lacking+" FROM doctor_grants, PUBLIC")
		f := require(t, examine(t, c), "postgres grants", Failure, strings.TrimPrefix(grant, "GRANT "), grant)
		if got := statements(f.WayOut); len(got) != 1 {
			t.Errorf("the way out is %q", got)
		}
		exec(t, url, statements(f.WayOut)...)
		requireOK(t, examine(t, c), "postgres grants")
	}
}

func TestExamine_ASuperuserIsAWarning(t *testing.T) {
	t.Parallel()
	url := testservers.Postgres(t)
	require(t, examine(t, databaseOnly(t, url)), "postgres role", Warning, "is a superuser", "docs/security.md")
}

func TestExamine_FindsSessionsThatBeginWrongAndTheWayOutMendsThem(t *testing.T) {
	t.Parallel()
	url, asRole := database(t, "doctor_session")
	name := strings.Trim(testservers.ParseURL(t, url).Path, "/")
	exec(t, url, "GRANT USAGE ON SCHEMA carpool TO doctor_session", "GRANT SELECT ON ALL TABLES IN SCHEMA carpool TO doctor_session")
	for set, want := range map[string]struct {
		value  string
		result Result
		says   string
	}{
		"default_transaction_isolation":       {"'serializable'", Warning, "is serializable"},
		"default_transaction_read_only":       {"on", Failure, "is on: the worker can write nothing"},
		"statement_timeout":                   {"'5s'", Warning, "is 5s: it ends what jobs do before their own timeouts, which for "},
		"idle_in_transaction_session_timeout": {"'1s'", Warning, "is 1s: it ends"},
		"lock_timeout":                        {"'200ms'", Warning, "is 200ms"},
		"idle_session_timeout":                {"'10min'", Warning, "is 10m0s"},
		"synchronous_commit":                  {"off", Warning, "is off"},
	} {
		exec(t, url, "ALTER ROLE doctor_session SET "+set+" = "+want.value)
		f := require(t, examine(t, databaseOnly(t, asRole)), "postgres session", want.result, set+" "+want.says, `ALTER ROLE "doctor_session" IN DATABASE "`+name+`" SET `+set)
		sql, _, _ := strings.Cut(f.WayOut, ", and ")
		exec(t, url, statements(sql)...)
		for _, f := range examine(t, databaseOnly(t, asRole)) {
			if strings.HasPrefix(f.Says, set) {
				t.Errorf("after its way out there is still %+v", f)
			}
		}
	}
	inURL := testservers.WithParam(t, asRole, "statement_timeout", "1000")
	require(t, examine(t, databaseOnly(t, inURL)), "postgres session", Warning, "statement_timeout is 1s", "take statement_timeout out of DATABASE_URL")
	exec(t, url, "ALTER DATABASE "+name+" SET session_replication_role = replica")
	require(t, examine(t, databaseOnly(t, asRole)), "postgres session", Failure, "the triggers of carpool's tables don't run", "SET session_replication_role = 'origin'")
}

func TestExamine_FindsAPostgresThatIsSetWrong(t *testing.T) {
	t.Parallel()
	pg := startPostgres(t, servers.PostgresConfig{Settings: map[string]string{"max_connections": "20", "autovacuum": "off"}})
	c := databaseOnly(t, pg.URL())
	findings := examine(t, c)
	require(t, findings, "postgres session", Warning, "fsync is off", "fsync = on")
	require(t, findings, "postgres session", Warning, "autovacuum is off", "autovacuum = on")
	require(t, findings, "postgres connections", Failure, "1 instances of 11 connections, and as many again during a deploy, are 22, but the server has 17", "")
	c.Pool.Size, c.Pool.MaxOverflow = 4, 1
	requireOK(t, examine(t, c), "postgres connections")

	others := make([]func(), 0, 13)
	for range 13 {
		others = append(others, hold(t, pg.URL()))
	}
	testservers.Eventually(t, "the others are counted", func() bool {
		for _, f := range Examine(t.Context(), c) {
			if f.Check == "postgres connections" && f.Result == Warning && strings.Contains(f.Says, "are in use by all") {
				return true
			}
		}
		return false
	})
	for _, end := range others {
		end()
	}
	exec(t, pg.URL(), "CREATE ROLE few LOGIN PASSWORD 'hush' CONNECTION LIMIT 3")
	c.Pool.URL = as(t, pg.URL(), "few")
	require(t, examine(t, c), "postgres connections", Failure, "but the server has 3", "")
}

func TestExamine_AStandbyIsAFailure(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "pg")
	if err := os.Chmod(filepath.Dir(filepath.Dir(dir)), 0o755); err != nil { //nolint:gosec // the server's user must get there
		t.Fatal(err)
	}
	pg, err := servers.StartPostgres(t.Context(), servers.PostgresConfig{Dir: dir})
	if err != nil {
		t.Fatal(err)
	}
	migrate(t, pg.URL())
	if err := pg.Stop(); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "data", "standby.signal"), nil, 0o644); err != nil { //nolint:gosec // the server's user reads it
		t.Fatal(err)
	}
	pg, err = servers.StartPostgres(t.Context(), servers.PostgresConfig{Dir: dir})
	if err != nil {
		t.Fatal(err)
	}
	defer pg.Stop()
	require(t, examine(t, databaseOnly(t, pg.URL())), "postgres role", Failure, "the server is a standby", "target_session_attrs=read-write")
}

func TestPostgresVersion_AnOldOneIsAFailure(t *testing.T) {
	t.Parallel()
	old, oldest := &report{check: "postgres"}, &report{check: "postgres"}
	old.postgresVersion(postgresVersion{"12.22", 120022})
	oldest.postgresVersion(postgresVersion{"13.0", 130000})
	require(t, old.findings, "postgres", Failure, "Postgres 12.22 is older than 13", "upgrade it")
	if len(oldest.findings) > 0 {
		t.Errorf("%+v", oldest.findings)
	}
}
