package cli

import (
	"context"
	"io"
	"log/slog"
	"net/url"
	"strings"
	"testing"

	"github.com/jackc/pgx/v5"

	"github.com/carpool-go/carpool/internal/testservers"
	"github.com/carpool-go/carpool/worker/internal/workertest"
)

// ofJobs are command lines that need Redis.
var ofJobs = [][]string{
	{"enqueue", "pool:validate", "{}"},
	{"enqueue", "pool:validate", "{}", "--unique", "x"},
	{"enqueue", "pool:validate", "{}", "--wait"},
	{"cancel", "nobody"},
	{"archive", "ls"},
	{"archive", "show", "nobody"},
	{"archive", "retry", "--all"},
	{"archive", "delete", "--all"},
	{"status"},
}

// onlyLine fails unless a command that failed has said what was wanted in one line, and
// nothing that is asynq's or secret.
func onlyLine(t *testing.T, what any, stderr string, code int, want ...string) {
	t.Helper()
	stderr = strings.ReplaceAll(stderr, `\"`, `"`) // in a log
	wrong := code != exitFailed || strings.Count(stderr, "\n") != 1
	for _, w := range want {
		wrong = wrong || !strings.Contains(stderr, w)
	}
	for _, not := range []string{"hush", "asynq", "UNKNOWN", "eval", "command error", "waiting for"} {
		wrong = wrong || strings.Contains(stderr, not)
	}
	if wrong {
		t.Errorf("%v: exit code %d, want one line with %q\n%s", what, code, want, stderr)
	}
}

func TestServers_ARedisThatCanNotBeReachedIsSaidInTermsOfItsVariable(t *testing.T) {
	t.Parallel()
	for _, args := range ofJobs {
		t.Run(strings.Join(args, " "), func(t *testing.T) {
			t.Parallel()
			_, stderr, code := (&bundle{new(workertest.Bundle)}).run(t, []string{"REDIS_URL=redis://:hush@127.0.0.1:1/3"}, args...)
			onlyLine(t, args, stderr, code, "worker: REDIS_URL: Redis at 127.0.0.1:1 cannot be reached: ", "connection refused")
		})
	}
	t.Run("Sentinels", func(t *testing.T) {
		t.Parallel()
		_, stderr, code := (&bundle{new(workertest.Bundle)}).run(t, []string{"REDIS_URL=redis-sentinel://:hush@127.0.0.1:1,localhost:1?master=m"}, "archive", "ls")
		onlyLine(t, "Sentinels", stderr, code, "worker: REDIS_URL: Redis cannot be reached by the Sentinels at 127.0.0.1:1, localhost:1: connect: connection refused; one of them must run")
	})
}

func TestServers_ARedisThatRefusesIsSaidAtOnceWithTheWayOut(t *testing.T) {
	t.Parallel()
	b := setup(t)
	host := testservers.ParseURL(t, b.RedisURL).Host
	password, _ := testservers.ParseURL(t, b.RedisURL).User.Password()
	for name, c := range map[string]struct{ url, want string }{
		"a wrong password":   {"redis://:hush@" + host, "the server refuses this user or password: WRONGPASS"},
		"no password":        {"redis://" + host, "the server refuses this user or password: NOAUTH"},
		"a user that isn't":  {"redis://nobody:hush@" + host, "the server refuses this user or password: WRONGPASS"},
		"a database too far": {"redis://:" + password + "@" + host + "/99999", "the server has no database of the number that the URL ends with: ERR DB index is out of range"},
	} {
		for _, args := range append([][]string{{"run"}}, ofJobs...) {
			_, stderr, code := b.run(t, []string{"REDIS_URL=" + c.url}, args...)
			onlyLine(t, name, stderr, code, "REDIS_URL: "+c.want)
		}
	}
}

func TestServers_WatchedTheyAreSaidInOneLineToo(t *testing.T) {
	t.Parallel()
	b := setup(t)
	u := testservers.ParseURL(t, b.DatabaseURL)
	u.Path = "/nowhere"
	for want, env := range map[string]map[string]string{
		"REDIS_URL: Redis at 127.0.0.1:1 cannot be reached: ":                                                        {"REDIS_URL": "redis://:hush@127.0.0.1:1", "DATABASE_URL": b.DatabaseURL},
		"REDIS_URL: the server refuses this user or password: WRONGPASS":                                             {"REDIS_URL": "redis://:hush@" + testservers.ParseURL(t, b.RedisURL).Host},
		"DATABASE_URL: the server has no such database: ":                                                            {"REDIS_URL": b.RedisURL, "DATABASE_URL": u.String()},
		"DATABASE_URL: look at the outbox: dbpool: acquire: failed to connect to `user=u database=app`: 127.0.0.1:1": {"REDIS_URL": b.RedisURL, "DATABASE_URL": "postgres://u:hush@127.0.0.1:1/app?sslmode=prefer"},
	} {
		t.Run(want, func(t *testing.T) {
			t.Parallel()
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			log, ended := workertest.NewLog(), make(chan int, 1)
			go func() { ended <- shop(env).Run(ctx, []string{"status", "--watch"}, nil, io.Discard, log) }()
			log.Wait(t, "\n")
			cancel()
			if code := <-ended; code != 0 {
				t.Errorf("exit code %d", code)
			}
			for line := range strings.Lines(log.String()) {
				if !strings.HasPrefix(line, "shop: ") || len(line) < 15 || !strings.HasPrefix(line[15:], want) {
					t.Errorf("a line is %q, want in it %q", line, want)
				}
			}
			for _, not := range []string{"hush", "asynq", "UNKNOWN", "command error"} {
				if strings.Contains(log.String(), not) {
					t.Errorf("%q is in\n%s", not, log)
				}
			}
		})
	}
}

// ofTables are command lines that need the database.
var ofTables = [][]string{{"run"}, {"migrate"}, {"schedule", "ls"}, {"status"}}

func TestServers_APostgresThatRefusesIsSaidAtOnceWithTheWayOut(t *testing.T) {
	t.Parallel()
	b := setup(t)
	change := func(change func(u *url.URL)) string {
		u := testservers.ParseURL(t, b.DatabaseURL)
		change(u)
		return u.String()
	}
	param := func(name, value string) string { return testservers.WithParam(t, b.DatabaseURL, name, value) }
	for name, c := range map[string]struct {
		url  string
		want []string
	}{
		"a database that isn't":       {change(func(u *url.URL) { u.Path = "/nowhere" }), []string{`database "nowhere" does not exist`, "createdb nowhere"}},
		"a wrong password":            {change(func(u *url.URL) { u.User = url.UserPassword(u.User.Username(), "hush") }), []string{"the server refuses this user or password: "}},
		"an unknown parameter":        {param("foo", "hush"), []string{"the server doesn't take a parameter of the URL: ", `unrecognized configuration parameter "foo"`, "take it out of the URL"}},
		"a parameter's wrong value":   {param("statement_timeout", "soon"), []string{`parameter "statement_timeout"`, "take it out of the URL"}},
		"a parameter not for clients": {param("max_connections", "3"), []string{`parameter "max_connections"`, "take it out of the URL"}},
	} {
		for _, args := range ofTables {
			_, stderr, code := b.run(t, []string{"DATABASE_URL=" + c.url}, args...)
			onlyLine(t, name, stderr, code, append(c.want, "DATABASE_URL: ")...)
		}
	}
}

func TestServers_APostgresThatCanNotBeReachedIsOneLineWithoutRepetition(t *testing.T) {
	t.Parallel()
	b := setup(t)
	for _, args := range ofTables {
		// With sslmode=prefer, pgx tries each address twice.
		_, stderr, code := b.run(t, []string{"DATABASE_URL=postgres://u:hush@127.0.0.1:1/app?sslmode=prefer", "WORKER_STARTUP_TIMEOUT=0s"}, args...)
		onlyLine(t, args, stderr, code, "DATABASE_URL: ", "failed to connect to `user=u database=app`: ", "connection refused")
		if strings.Count(stderr, "connection refused") != 1 {
			t.Errorf("%v: it says it more than once:\n%s", args, stderr)
		}
	}
}

// roleURL makes a role that may log in, and returns the URL of the bundle's database for it.
func (b *bundle) roleURL(t *testing.T, role string) string {
	t.Helper()
	b.Exec(t, "CREATE ROLE "+role+" LOGIN PASSWORD 'hush'")
	u := testservers.ParseURL(t, b.DatabaseURL)
	t.Cleanup(func() {
		conn, err := pgx.Connect(context.Background(), b.DatabaseURL)
		if err == nil {
			_, err = conn.Exec(context.Background(), "DROP OWNED BY "+role+"; DROP ROLE "+role)
			_ = conn.Close(context.Background())
		}
		if err != nil {
			t.Error(err)
		}
	})
	u.User = url.UserPassword(role, "hush")
	return u.String()
}

// grants returns the statements in what a command advises.
func grants(stderr string) []string {
	var list []string
	for part := range strings.SplitSeq(strings.TrimSpace(stderr), "; ") {
		if i := strings.Index(part, "GRANT "); i >= 0 {
			list = append(list, strings.TrimSuffix(part[i:], `"}`))
		}
	}
	return list
}

func TestServers_AMissingPrivilegeIsSaidAtOnceWithTheGrantThatSuffices(t *testing.T) {
	t.Parallel()
	b := setup(t)
	b.Env = append(b.Env, "LOG_FORMAT=text", "LOG_LEVEL=error")
	env := []string{"DATABASE_URL=" + b.roleURL(t, "worker_without_grants")}
	for _, args := range [][]string{{"run"}, {"schedule", "ls"}, {"status"}} {
		_, stderr, code := b.run(t, env, args...)
		onlyLine(t, args, stderr, code, "DATABASE_URL: ", "(SQLSTATE 42501)", `GRANT USAGE ON SCHEMA carpool TO `)
	}
	_, stderr, _ := b.run(t, env, "schedule", "ls")
	for _, grant := range grants(stderr) {
		b.Exec(t, grant)
	}
	for _, args := range [][]string{{"run", "--burst"}, {"schedule", "ls"}, {"status"}, {"schedule", "add", "nightly", "@daily", "carpool:prune"}, {"schedule", "run-now", "nightly"}, {"run", "--burst"}} {
		if _, stderr, code := b.run(t, env, args...); code != 0 {
			t.Errorf("with what was advised, %v: exit code %d\n%s", args, code, stderr)
		}
	}
}

func TestServers_ToMigrateIsGrantedOnTheDatabase(t *testing.T) {
	t.Parallel()
	b := &bundle{&workertest.Bundle{DatabaseURL: testservers.Postgres(t)}}
	env := []string{"DATABASE_URL=" + b.roleURL(t, "migrator_without_grants"), "LOG_FORMAT=text", "LOG_LEVEL=error"}
	_, stderr, code := b.run(t, env, "migrate")
	onlyLine(t, "migrate", stderr, code, "DATABASE_URL: ", "GRANT CREATE ON DATABASE ")
	for _, grant := range grants(stderr) {
		b.Exec(t, grant)
	}
	if _, stderr, code := b.run(t, env, "migrate"); code != 0 {
		t.Errorf("with what was advised: exit code %d\n%s", code, stderr)
	}
	b.Exec(t, `REVOKE CONNECT ON DATABASE `+strings.TrimPrefix(testservers.ParseURL(t, b.DatabaseURL).Path, "/")+` FROM PUBLIC`)
	_, stderr, code = b.run(t, env, "migrate")
	onlyLine(t, "migrate", stderr, code, "DATABASE_URL: ", "GRANT CONNECT ON DATABASE ")
}

func TestMigrate_TakesTheSettingsOfAPoolInTheURL(t *testing.T) {
	t.Parallel()
	b := setup(t)
	env := []string{"DATABASE_URL=" + testservers.WithParam(t, b.DatabaseURL, "pool_max_conns", "3")}
	if _, stderr, code := b.run(t, env, "migrate"); code != 0 {
		t.Errorf("exit code %d\n%s", code, stderr)
	}
}

func TestDatabase_OfACommandIsOneConnectionThatLogsWhereTheCommandDoes(t *testing.T) {
	t.Parallel()
	log := workertest.NewLog()
	url := testservers.Postgres(t)
	in := &invocation{Program: Program{Env: variables(map[string]string{"DATABASE_URL": url})}, stderr: log}
	db, err := databaseSettings{url}.open(in.newLogger(slog.LevelInfo, "json"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := db.Acquire(t.Context()); err != nil { // and not given back
		t.Fatal(err)
	}
	if stats := db.Stats(); stats.PoolSize != 1 {
		t.Errorf("its pool is %+v", stats)
	}
	db.Close()
	log.Wait(t, `"msg":"a connection was not given back before the pool was closed"`)
}
