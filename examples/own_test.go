package examples_test

import (
	"bytes"
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/carpool-go/carpool/internal/testservers"
)

// giveUp bounds what takes seconds when all is well, a build among it.
const giveUp = 2 * time.Minute

func TestOwn_ItsTaskRunsWithItsSettingFromCommandLineAndSQL(t *testing.T) {
	t.Parallel()
	databaseURL, redisURL := testservers.Postgres(t), testservers.Redis(t)
	shop := &shop{program: buildShop(t), env: []string{"DATABASE_URL=" + databaseURL, "REDIS_URL=" + redisURL, "SHOP_TAX_PERCENT=7"}}
	shop.run(t, "migrate")
	run(t, databaseURL, find(t, "psql"), "-X", "-q", "-v", "ON_ERROR_STOP=1", "-f", "own/schema.sql", databaseURL)

	if kinds := shop.run(t, "kinds"); !strings.Contains(kinds, "\norder:book ") ||
		!strings.Contains(kinds, `shop enqueue order:book '{"number": "A-17", "net_cents": 1000}'`) || !strings.Contains(kinds, "csv:import ") {
		t.Errorf("shop kinds prints\n%s", kinds)
	}
	if config := shop.run(t, "config"); !regexp.MustCompile(`(?m)^SHOP_TAX_PERCENT +7$`).MatchString(config) {
		t.Errorf("shop config prints\n%s", config)
	}

	for tax, want := range map[string]string{
		"a fifth": "shop: SHOP_TAX_PERCENT is not a whole number",
		"190":     "shop: SHOP_TAX_PERCENT is 190, which is not from 0 to 100",
	} {
		out, err := shop.command("run", "--shop-tax-percent", tax).CombinedOutput()
		exit, ok := errors.AsType[*exec.ExitError](err)
		if !ok || exit.ExitCode() != 2 || !strings.HasPrefix(string(out), want) {
			t.Errorf("with a tax of %s shop run ends with %v, want exit code 2 and %q; it prints\n%s", tax, err, want, out)
		}
	}

	worker := shop.command("run")
	var log bytes.Buffer
	worker.Stdout, worker.Stderr = &log, &log
	if err := worker.Start(); err != nil {
		t.Fatal(err)
	}
	stopped := false
	t.Cleanup(func() {
		if !stopped {
			_ = worker.Process.Kill()
			_ = worker.Wait()
		}
		if t.Failed() {
			t.Logf("shop run logged:\n%s", log.String())
		}
	})

	// The id, and then the result.
	printed := shop.run(t, "enqueue", "order:book", `{"number": "A-17", "net_cents": 1000}`, "--wait")
	first, ok := strings.CutSuffix(printed, "\n{\"total_cents\":1070}\n")
	if !ok {
		t.Fatalf("shop enqueue prints %q", printed)
	}

	db, err := pgx.Connect(t.Context(), databaseURL)
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close(context.Background())
	var second string
	if err := db.QueryRow(t.Context(), `SELECT carpool.enqueue('order:book', '{"number": "A-18", "net_cents": 2000}')`).Scan(&second); err != nil {
		t.Fatal(err)
	}
	done := func(id string) (n int) {
		t.Helper()
		if err := db.QueryRow(t.Context(), `SELECT count(*) FROM carpool.jobs_done WHERE kind = 'order:book' AND id = $1`, id).Scan(&n); err != nil {
			t.Fatal(err)
		}
		return n
	}
	testservers.Eventually(t, "job "+second+" has a record", func() bool { return done(second) > 0 })
	if done(first) != 1 {
		t.Errorf("job %s has no record", first)
	}
	rows, err := db.Query(t.Context(), `SELECT number || ' ' || net_cents || ' ' || tax_cents FROM orders ORDER BY number`)
	if err != nil {
		t.Fatal(err)
	}
	orders, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if got, want := strings.Join(orders, ", "), "A-17 1000 70, A-18 2000 140"; err != nil || got != want {
		t.Errorf("the orders are %q, error %v; want %q", got, err, want)
	}

	if err := worker.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	err = worker.Wait()
	stopped = true
	if err != nil || !strings.Contains(log.String(), `"msg":"worker stopped"`) {
		t.Errorf("after SIGTERM shop run ends with %v, want exit code 0 and a log that says so", err)
	}
}

// The module's own tests are run as its owner would.
func TestOwn_ItsTestsPass(t *testing.T) {
	t.Parallel()
	goInOwn(t, "test", "./...")
}

// shop is the program of examples/own in an environment.
type shop struct {
	program string
	env     []string
}

func (s *shop) command(args ...string) *exec.Cmd {
	cmd := exec.Command(s.program, args...)
	cmd.Env = s.env
	return cmd
}

// run runs a command to its end and returns its standard output.
func (s *shop) run(t *testing.T, args ...string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), giveUp)
	defer cancel()
	cmd := exec.CommandContext(ctx, s.program, args...)
	cmd.Env = s.env
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Run(); err != nil {
		t.Fatalf("shop %s: %v\n%s", args[0], errors.Join(err, ctx.Err()), errs.String())
	}
	return out.String()
}

// buildShop builds the program of examples/own, whose name is that of its file.
func buildShop(t *testing.T) (program string) {
	t.Helper()
	program = filepath.Join(t.TempDir(), "shop")
	if runtime.GOOS == "windows" {
		program += ".exe"
	}
	goInOwn(t, "build", "-o", program, "./cmd/shop")
	return program
}

func goInOwn(t *testing.T, args ...string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 5*giveUp)
	defer cancel()
	cmd := exec.CommandContext(ctx, "go", args...)
	cmd.Dir = "own"
	cmd.Env = append(os.Environ(), "GOWORK=off")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("go %s in examples/own: %v\n%s(if it is about go.mod: run go mod tidy there)", args[0], errors.Join(err, ctx.Err()), out)
	}
}
