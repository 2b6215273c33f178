package tasks_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/carpool-go/carpool/tasks"
	"github.com/carpool-go/carpool/tasks/taskstest"
)

// README:start

// Greet greets somebody.
type Greet struct {
	Name string `json:"name" doc:"who is greeted" example:"Ada"`
}

func (Greet) Kind() string { return "greet:hello" }

func (Greet) Options() tasks.Options {
	return tasks.Options{Queue: "low", MaxRetry: 5, Timeout: time.Minute, Retention: time.Hour}
}

func (g Greet) Validate() error {
	if g.Name == "" {
		return errors.New("name: must not be empty")
	}
	return nil
}

func HandleGreet(ctx context.Context, job *tasks.Job, g Greet) (greeting string, err error) {
	err = job.DB.QueryRow(ctx, "SELECT 'Hello, ' || $1 || '!'", g.Name).Scan(&greeting)
	return greeting, err
}

// README:end

// README:transactional

// tasks.RegisterTx(s, HandleWelcome)
func HandleWelcome(ctx context.Context, job *tasks.Job, tx pgx.Tx, g Greet) (any, error) {
	_, err := tx.Exec(ctx, "UPDATE guests SET greeted = greeted + 1 WHERE name = $1", g.Name)
	return nil, err
}

// README:end

func ExampleRegister() {
	set := new(tasks.Set)
	tasks.Register(set, HandleGreet)

	task, _ := set.Lookup("greet:hello")
	fmt.Println(task.Example())
	_, err := task.Decode([]byte(`{"name": ""}`))
	fmt.Println(err)
	// Output:
	// {"name": "Ada"}
	// greet:hello payload: name: must not be empty
}

func TestREADME_ShowsTheTaskThatIsTestedHereInUnder25Lines(t *testing.T) {
	t.Parallel()
	source, err := os.ReadFile("example_task_test.go")
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(source), "// README:start\n")
	want, _, _ := strings.Cut(rest, "// README:end")
	readme, err := os.ReadFile("../README.md")
	if err != nil {
		t.Fatal(err)
	}
	block := regexp.MustCompile("(?s)```go\npackage greet\n(.*?)```").FindSubmatch(readme)
	if block == nil {
		t.Fatal("README.md has no Go code that begins with package greet")
	}
	if got, want := strings.TrimSpace(string(block[1])), strings.TrimSpace(want); got != want {
		t.Errorf("README.md shows\n%s\nbut what is tested is\n%s", got, want)
	}
	if n := strings.Count(string(block[0]), "\n") - 1; n >= 25 {
		t.Errorf("a new task takes %d lines in README.md", n)
	}
	_, rest, _ = strings.Cut(string(source), "// README:transactional\n\n")
	want, _, _ = strings.Cut(rest, "\n// README:end")
	if !strings.Contains(string(readme), "```go\n"+want+"```") {
		t.Errorf("README.md does not show the transactional task that is tested:\n%s", want)
	}
}

func TestHandleWelcome_CountsAGuestOnce(t *testing.T) {
	t.Parallel()
	kit := taskstest.New(t)
	if _, err := kit.DB.Exec(t.Context(), "CREATE TABLE guests AS SELECT 'Ada' AS name, 0 AS greeted"); err != nil {
		t.Fatal(err)
	}
	if _, err := taskstest.RunTx(t, kit, HandleWelcome, Greet{Name: "Ada"}); err != nil {
		t.Fatal(err)
	}
	var greeted int
	if err := kit.DB.QueryRow(t.Context(), "SELECT greeted FROM guests").Scan(&greeted); err != nil || greeted != 1 {
		t.Errorf("greeted %d times, error %v", greeted, err)
	}
}

func TestHandleGreet_Greets(t *testing.T) {
	t.Parallel()
	kit := taskstest.New(t)
	greeting, err := taskstest.Run(t, kit, HandleGreet, Greet{Name: "Ada"})
	if err != nil || greeting != "Hello, Ada!" {
		t.Errorf("greeting %q, error %v", greeting, err)
	}
}
