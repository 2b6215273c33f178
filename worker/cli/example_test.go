package cli_test

import (
	"context"
	"errors"
	"fmt"
	"os"

	"github.com/jackc/pgx/v5"

	"github.com/carpool-go/carpool/tasks"
	"github.com/carpool-go/carpool/tasks/builtin"
	"github.com/carpool-go/carpool/worker/cli"
)

// Shop is the group of a shop's tasks.
type Shop struct {
	TaxPercent int `env:"SHOP_TAX_PERCENT" default:"19" help:"Tax on an order, in percent of its net price."`
}

func (s *Shop) Register(set *tasks.Set) { tasks.RegisterTx(set, s.book) }

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

func (s *Shop) book(ctx context.Context, _ *tasks.Job, tx pgx.Tx, b Book) (any, error) {
	_, err := tx.Exec(ctx, "UPDATE orders SET tax = net * $2 / 100 WHERE id = $1", b.Order, s.TaxPercent)
	return nil, err
}

// A whole main function of a program that has the ready-made tasks and its own.
func ExampleMain() {
	cli.Main(&builtin.Tasks{}, &Shop{})
}

// A program runs inside another, such as a test.
func ExampleProgram_Run() {
	program := cli.Program{Name: "shop", Groups: []tasks.Group{&Shop{}}}
	code := program.Run(context.Background(), []string{"kinds"}, os.Stdin, os.Stdout, os.Stderr)
	fmt.Println("exit code", code)
	// Output:
	// carpool:prune   queue default, 3 retries, 1h0m0s for each try
	//   keep  string  how long the record of a job that is done is kept at least; 24h if left out (optional)
	//   shop enqueue carpool:prune '{"keep": "24h"}'
	//
	// order:book   queue critical, 10 retries, 10m0s for each try
	//   order  integer  the order's number
	//   shop enqueue order:book '{"order": 17}'
	//
	// pool:validate   queue default, 0 retries, 1m0s for each try
	//   shop enqueue pool:validate '{}'
	// exit code 0
}
