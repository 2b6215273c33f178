package tasks_test

import (
	"os"
	"strings"
	"testing"

	"github.com/jackc/pgx/v5"

	"github.com/carpool-go/carpool/tasks"
	"github.com/carpool-go/carpool/tasks/taskstest"
)

func TestREADME_ShowsTheTaskThatIsTestedHereInUnder25Lines(t *testing.T) {
	t.Parallel()
	source, err := os.ReadFile("example_task_test.go")
	if err != nil {
		t.Fatal(err)
	}
	readme, err := os.ReadFile("../README.md")
	if err != nil {
		t.Fatal(err)
	}
	section := func(begin, end string) string {
		_, rest, _ := strings.Cut(string(source), begin+"\n\n")
		code, _, found := strings.Cut(rest, "\n\n"+end+"\n")
		if !found {
			t.Fatalf("example_task_test.go has no section from %q to %q", begin, end)
		}
		return code
	}
	task := section("// README:task", "// README:enqueue")
	for _, code := range []string{task, section("// README:enqueue", "// README:end")} {
		if !strings.Contains(string(readme), "\n)\n\n"+code+"\n```\n") {
			t.Errorf("README.md does not show what is tested, after its imports:\n%s", code)
		}
	}
	_, payloadAndHandler, _ := strings.Cut(task, "// Greet greets")
	if n := strings.Count(payloadAndHandler, "\n") + 1; n < 10 || n >= 25 {
		t.Errorf("a new task takes %d lines in README.md", n)
	}
}

func TestGreet_GreetsAGuestInItsTransaction(t *testing.T) {
	t.Parallel()
	kit := taskstest.New(t)
	if _, err := kit.DB.Exec(t.Context(), "CREATE TABLE greetings (text text)"); err != nil {
		t.Fatal(err)
	}
	group := &Tasks{Greeting: "Hello"}
	greeting, err := taskstest.RunTx(t, kit, group.greet, Greet{Name: "Ada"})
	if err != nil || greeting != "Hello, Ada!" {
		t.Errorf("greeting %q, error %v", greeting, err)
	}
	var text string
	if err := kit.DB.QueryRow(t.Context(), "SELECT text FROM greetings").Scan(&text); err != nil || text != "Hello, Ada!" {
		t.Errorf("the table has %q, error %v", text, err)
	}
}

func TestWelcome_EnqueuesOneJobWithTheTransactionAndOneDirectly(t *testing.T) {
	t.Parallel()
	kit := taskstest.New(t)
	set, err := tasks.NewSet(&Tasks{})
	if err != nil {
		t.Fatal(err)
	}
	if err := tasks.RecordKinds(t.Context(), kit.DB, set); err != nil {
		t.Fatal(err)
	}
	err = pgx.BeginFunc(t.Context(), kit.DB, func(tx pgx.Tx) error {
		return welcome(t.Context(), kit.Client, tx, "Ada")
	})
	if err != nil {
		t.Fatal(err)
	}
	if job := kit.RequireEnqueued(t, Greet{Name: "Ada"}); job.State != tasks.StateScheduled {
		t.Errorf("the job that was enqueued directly is %s, want scheduled", job.State)
	}
	var kind string
	if err := kit.DB.QueryRow(t.Context(), "SELECT kind FROM carpool.outbox").Scan(&kind); err != nil || kind != "guest:greet" {
		t.Errorf("the outbox has a job of the kind %q, error %v", kind, err)
	}
}
