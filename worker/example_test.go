package worker_test

import (
	"context"
	"errors"
	"fmt"
	"log"
	"os"
	"os/signal"

	"github.com/jackc/pgx/v5"

	"github.com/carpool-go/carpool/dbpool"
	"github.com/carpool-go/carpool/tasks"
	"github.com/carpool-go/carpool/worker"
)

// Book books an order.
type Book struct {
	Order int `json:"order" doc:"the order's number" example:"17"`
}

func (Book) Kind() string           { return "order:book" }
func (Book) Options() tasks.Options { return tasks.Options{Queue: "critical"} }

func (b Book) Validate() error {
	if b.Order < 1 {
		return errors.New("order: must be 1 at least")
	}
	return nil
}

// Shop is a group of tasks.
type Shop struct{}

func (*Shop) Register(s *tasks.Set) { tasks.RegisterTx(s, handleBook) }

func handleBook(ctx context.Context, _ *tasks.Job, tx pgx.Tx, b Book) (any, error) {
	_, err := tx.Exec(ctx, "UPDATE orders SET booked = true WHERE id = $1", b.Order)
	return nil, err
}

// A program that embeds a worker beside other things. One that is nothing but a worker
// calls cli.Main.
func ExampleRun() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	err := worker.Run(ctx, worker.Config{
		RedisURL: os.Getenv("REDIS_URL"),
		Pool:     dbpool.DefaultConfig(os.Getenv("DATABASE_URL")),
		Groups:   []tasks.Group{&Shop{}},
	})
	if err != nil {
		log.Fatal(err)
	}
}

func ExampleKinds() {
	set, err := worker.Kinds(&Shop{})
	fmt.Println(set.Kinds(), err)
	_, err = worker.Kinds(&Shop{}, &Shop{})
	fmt.Println(err)
	// Output:
	// [carpool:prune order:book pool:validate] <nil>
	// tasks: Register: kind "order:book" is registered twice
}

func ExampleConfig_Validate() {
	cfg := worker.Config{
		RedisURL:    "redis://localhost",
		Pool:        dbpool.DefaultConfig("postgres://localhost/app"),
		Concurrency: -1,
		Queues:      map[string]int{"low": 0},
	}
	fmt.Println(cfg.Validate())
	// Output:
	// Queues: "low" has the weight 0, which is not from 1 to 1000
	// Concurrency: -1 is not from 1 to 10000
}
