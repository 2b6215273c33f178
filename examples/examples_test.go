// Package examples_test runs the examples as a person would.
package examples_test

import (
	"bytes"
	"context"
	"errors"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/carpool-go/carpool/internal/testservers"
	"github.com/carpool-go/carpool/tasks"
	"github.com/carpool-go/carpool/tasks/taskstest"
)

func TestMain(m *testing.M) { taskstest.Main(m) }

func TestExamples_CommitOneJobAndRollBackAnother(t *testing.T) {
	t.Parallel()
	for _, example := range []struct {
		name    string
		program func(*testing.T) string
		args    []string
	}{
		{"python", python, []string{"python/enqueue.py"}},
		{"node", node, []string{"node/enqueue.js"}},
		{"psql", psql, []string{"psql/enqueue.sh"}},
		{"go", func(t *testing.T) string { return find(t, "go") }, []string{"run", "./go"}},
	} {
		t.Run(example.name, func(t *testing.T) {
			t.Parallel()
			program := example.program(t)
			kit := taskstest.New(t)
			kinds, err := tasks.NewSet(orders{})
			if err != nil {
				t.Fatal(err)
			}
			if err := tasks.RecordKinds(t.Context(), kit.DB, kinds); err != nil {
				t.Fatal(err)
			}
			out := run(t, producer(t, kit), program, example.args...)

			const id = `([0-9a-f-]{36})`
			said := regexp.MustCompile(`^committed ` + id + `\nrolled back ` + id + `\n$`).FindStringSubmatch(out)
			if said == nil {
				t.Fatalf("it prints %q", out)
			}
			rows, err := kit.DB.Query(t.Context(), `SELECT id || ' ' || kind || ' ' || queue || ' ' || payload FROM carpool.outbox`)
			if err != nil {
				t.Fatal(err)
			}
			got, err := pgx.CollectRows(rows, pgx.RowTo[string])
			if err != nil {
				t.Fatal(err)
			}
			want := said[1] + ` order:book low {"number": "A-17", "net_cents": 1000}`
			if len(got) != 1 || got[0] != want {
				t.Errorf("the outbox has\n%q, want\n%q", got, want)
			}
		})
	}
}

// The SQL that docs/render.md has for services in other languages, as their drivers send it.
func TestRender_EachServicesSQLEnqueues(t *testing.T) {
	t.Parallel()
	kit := taskstest.New(t)
	kinds, err := tasks.NewSet(orders{})
	if err != nil {
		t.Fatal(err)
	}
	if err := tasks.RecordKinds(t.Context(), kit.DB, kinds); err != nil {
		t.Fatal(err)
	}
	conn, err := pgx.Connect(t.Context(), producer(t, kit))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(context.Background())
	page, err := os.ReadFile("../docs/render.md")
	if err != nil {
		t.Fatal(err)
	}
	const payload = `{"number": "A-17", "net_cents": 1000}`
	statements := regexp.MustCompile(`"(SELECT carpool\.enqueue\([^"]*)"`).FindAllStringSubmatch(string(page), -1)
	for i, m := range statements {
		sql, args := m[1], []any{payload}
		sql = strings.NewReplacer("%s::jsonb", "$1::jsonb", ":payload", "$1", "%s", "$2").Replace(sql)
		if strings.Contains(sql, "$2") {
			args = append(args, "low")
		}
		var id, got string
		if err := conn.QueryRow(t.Context(), sql, args...).Scan(&id); err != nil {
			t.Errorf("%s: %v", sql, err)
			continue
		}
		if err := kit.DB.QueryRow(t.Context(), "SELECT payload FROM carpool.outbox WHERE id = $1", id).Scan(&got); err != nil || got != payload {
			t.Errorf("statement %d has enqueued %s, error %v", i, got, err)
		}
	}
	if len(statements) != 5 {
		t.Errorf("%d statements were found", len(statements))
	}
}

// orders is the group of the kind that the examples enqueue, as examples/own has it.
type orders struct{}

func (orders) Register(s *tasks.Set) {
	tasks.Register(s, func(context.Context, *tasks.Job, order) (any, error) { return nil, nil })
}

type order struct {
	Number   string `json:"number"`
	NetCents int64  `json:"net_cents"`
}

func (order) Kind() string           { return "order:book" }
func (order) Options() tasks.Options { return tasks.Options{} }
func (order) Validate() error        { return nil }

// producer makes a role that has only what the README grants, with a password
// that must be encoded in a URL, and returns the URL for it.
func producer(t *testing.T, kit *taskstest.Kit) string {
	t.Helper()
	u := testservers.ParseURL(t, kit.DatabaseURL)
	role, password := "example_"+strings.Trim(u.Path, "/"), `p:/?#[]@%\20 é`
	grants := []string{"CREATE ROLE " + role + " LOGIN PASSWORD '" + password + "'"}
	readme, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(readme)) {
		if strings.HasPrefix(line, "GRANT ") {
			grants = append(grants, strings.Replace(line, "TO producer;", "TO "+role, 1))
		}
	}
	if len(grants) != 3 {
		t.Fatalf("the README has %d grants, want 2", len(grants)-1)
	}
	for _, sql := range grants {
		if _, err := kit.DB.Exec(t.Context(), sql); err != nil {
			t.Fatalf("%s: %v", sql, err)
		}
	}
	t.Cleanup(func() {
		for _, sql := range []string{"DROP OWNED BY " + role, "DROP ROLE " + role} {
			if _, err := kit.DB.Exec(context.Background(), sql); err != nil {
				t.Error(err)
			}
		}
	})
	u.User = url.UserPassword(role, password)
	return u.String()
}

// run runs an example to its end and returns what it printed.
func run(t *testing.T, databaseURL, program string, args ...string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute) // go run compiles
	defer cancel()
	cmd := exec.CommandContext(ctx, program, args...)
	cmd.Env = append(os.Environ(), "DATABASE_URL="+databaseURL, "PATH="+filepath.Dir(program)+":"+os.Getenv("PATH"))
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	cmd.WaitDelay = 10 * time.Second
	if err := cmd.Run(); err != nil {
		t.Fatalf("%v\n%s", errors.Join(err, ctx.Err()), errs.String())
	}
	return out.String()
}

const install = "./scripts/test.sh installs what is missing"

// find finds a program on PATH. Without it the test fails: an example that
// nobody runs is worth nothing.
func find(t *testing.T, program string) string {
	t.Helper()
	path, err := exec.LookPath(program)
	if err != nil {
		t.Fatalf("%v; %s", err, install)
	}
	return path
}

// python finds a Python that has psycopg2. Debian's package is for Debian's
// Python, which need not be the first on PATH.
func python(t *testing.T) string {
	t.Helper()
	for _, program := range []string{"python3", "/usr/bin/python3"} {
		if path, err := exec.LookPath(program); err == nil && exec.Command(path, "-c", "import psycopg2").Run() == nil {
			return path
		}
	}
	t.Fatalf("there is no Python with psycopg2; %s", install)
	return ""
}

func node(t *testing.T) string {
	t.Helper()
	if _, err := os.Stat("node/node_modules/pg"); err != nil {
		t.Fatalf("%v; %s", err, install)
	}
	return find(t, "node")
}

// psql is for a script that calls it: it returns the shell.
func psql(t *testing.T) string {
	t.Helper()
	find(t, "psql")
	return find(t, "bash")
}
