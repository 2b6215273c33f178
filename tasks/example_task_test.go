package tasks_test

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/carpool-go/carpool/tasks"
)

// README:task

// Tasks is a group of tasks, with their settings.
type Tasks struct {
	Greeting string `env:"SHOP_GREETING" default:"Hello" help:"What guests are told."`
}

func (t *Tasks) Register(s *tasks.Set) { tasks.RegisterTx(s, t.greet) }

// Greet greets a guest.
type Greet struct {
	Name string `json:"name" doc:"who is greeted" example:"Ada"`
}

func (Greet) Kind() string           { return "guest:greet" }
func (Greet) Options() tasks.Options { return tasks.Options{MaxRetry: 5} }

func (g Greet) Validate() error {
	if g.Name == "" {
		return errors.New("name: must not be empty")
	}
	return nil
}

func (t *Tasks) greet(ctx context.Context, job *tasks.Job, tx pgx.Tx, g Greet) (string, error) {
	text := t.Greeting + ", " + g.Name + "!"
	_, err := tx.Exec(ctx, "INSERT INTO greetings (text) VALUES ($1)", text)
	return text, err
}

// README:enqueue

func welcome(ctx context.Context, client *tasks.Client, tx pgx.Tx, name string) error {
	if _, err := client.EnqueueTx(ctx, tx, Greet{Name: name}, nil); err != nil { // when tx commits
		return err
	}
	_, err := client.Enqueue(ctx, Greet{Name: name}, // directly; for the client see tasks.NewClient
		&tasks.EnqueueOptions{RunAt: time.Now().Add(time.Hour), UniqueKey: name})
	return err
}

// README:end

// A group is a pointer to a struct, whose fields are settings and whose methods are
// handlers. A whole worker with this group is cli.Main(&Tasks{}), which has the variable
// SHOP_GREETING and the flag --shop-greeting.
func ExampleGroup() {
	set, err := tasks.NewSet(&Tasks{})
	if err != nil {
		fmt.Println(err)
		return
	}
	task, err := set.Lookup("guest:greet")
	fmt.Println(task.Example(), err)
	_, err = task.Decode([]byte(`{"name": ""}`))
	fmt.Println(err)
	// Output:
	// {"name": "Ada"} <nil>
	// guest:greet payload: name: must not be empty
}
