package taskstest_test

import (
	"context"
	"encoding/json"
	"testing"
	"time"

	"github.com/carpool-go/carpool/tasks"
	"github.com/carpool-go/carpool/tasks/taskstest"
	"github.com/carpool-go/carpool/tasks/webhook"
)

func TestMain(m *testing.M) { taskstest.Main(m) }

// Pay is a task that enqueues another one.
type Pay struct {
	Order int `json:"order"`
}

func (Pay) Kind() string           { return "order:pay" }
func (Pay) Options() tasks.Options { return tasks.Options{} }
func (Pay) Validate() error        { return nil }

func HandlePay(ctx context.Context, job *tasks.Job, p Pay) (struct{}, error) {
	if _, err := job.DB.Exec(ctx, "INSERT INTO orders VALUES ($1)", p.Order); err != nil {
		return struct{}{}, err
	}
	_, err := job.Client.Enqueue(ctx, webhook.Deliver{
		URL: "https://shop.example/hook", Event: "order.paid", Body: json.RawMessage(`{"order": 17}`),
	}, &tasks.EnqueueOptions{RunAt: time.Now().Add(time.Minute)})
	return struct{}{}, err
}

// A test of a handler runs it on a database of its own and looks at what it
// wrote and enqueued.
func ExampleRun() {
	_ = func(t *testing.T) { // func TestHandlePay(t *testing.T) {
		kit := taskstest.New(t)
		if _, err := kit.DB.Exec(t.Context(), "CREATE TABLE orders (id int PRIMARY KEY)"); err != nil {
			t.Fatal(err)
		}
		if _, err := taskstest.Run(t, kit, HandlePay, Pay{Order: 17}); err != nil {
			t.Fatal(err)
		}
		kit.RequireEnqueued(t, webhook.Deliver{
			URL: "https://shop.example/hook", Event: "order.paid", Body: json.RawMessage(`{"order": 17}`),
		})
	}
}

func TestRun_GivesTheHandlerARealPoolAndKeepsWhatItEnqueues(t *testing.T) {
	t.Parallel()
	kit := taskstest.New(t)
	if _, err := kit.DB.Exec(t.Context(), "CREATE TABLE orders (id int PRIMARY KEY)"); err != nil {
		t.Fatal(err)
	}
	kit.RequireNothingEnqueued(t)
	if _, err := taskstest.Run(t, kit, HandlePay, Pay{Order: 17}); err != nil {
		t.Fatal(err)
	}
	info := kit.RequireEnqueued(t, webhook.Deliver{
		URL: "https://shop.example/hook", Event: "order.paid", Body: json.RawMessage(`{"order":17}`),
	})
	if until := time.Until(info.RunAt); until <= 0 || until > time.Minute {
		t.Errorf("the webhook is due in %s, want a minute", until)
	}
	var n int
	if err := kit.DB.QueryRow(t.Context(), "SELECT count(*) FROM orders").Scan(&n); err != nil || n != 1 {
		t.Errorf("%d orders, error %v", n, err)
	}
	if _, err := taskstest.Run(t, kit, HandlePay, Pay{Order: 17}); err == nil {
		t.Error("the handler's error does not reach the test")
	}
}
