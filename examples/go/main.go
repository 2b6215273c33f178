// The program enqueues a job in a transaction, with pgx.
//
//	DATABASE_URL=postgres://… go run ./examples/go
package main

import (
	"context"
	"errors"
	"fmt"
	"log"
	"os"

	"github.com/jackc/pgx/v5"

	"github.com/carpool-go/carpool/tasks"
)

// Order is the payload of a job that workers know as order:book; see examples/own. A
// service of the same repository would import it.
type Order struct {
	Number   string `json:"number"`
	NetCents int64  `json:"net_cents"`
}

// Kind implements [tasks.Payload].
func (Order) Kind() string { return "order:book" }

// Options implements [tasks.Payload].
func (Order) Options() tasks.Options { return tasks.Options{} }

// Validate implements [tasks.Payload].
func (o Order) Validate() error {
	if o.Number == "" {
		return errors.New("number: must not be empty")
	}
	return nil
}

func main() {
	if err := run(context.Background()); err != nil {
		log.Fatal(err)
	}
}

func run(ctx context.Context) error {
	conn, err := pgx.Connect(ctx, os.Getenv("DATABASE_URL"))
	if err != nil {
		return err
	}
	defer conn.Close(ctx)

	var client tasks.Client // the zero client needs no Redis
	order := Order{Number: "A-17", NetCents: 1000}
	opts := &tasks.EnqueueOptions{Queue: "low"}

	tx, err := conn.Begin(ctx)
	if err != nil {
		return err
	}
	defer tx.Rollback(ctx) // does nothing after the commit
	job, err := client.EnqueueTx(ctx, tx, order, opts)
	if err != nil {
		return err
	}
	// Your own statements go into the transaction too.
	if err := tx.Commit(ctx); err != nil {
		return err
	}
	fmt.Println("committed", job)

	if tx, err = conn.Begin(ctx); err != nil {
		return err
	}
	if job, err = client.EnqueueTx(ctx, tx, order, opts); err != nil {
		return err
	}
	if err := tx.Rollback(ctx); err != nil {
		return err
	}
	fmt.Println("rolled back", job)
	return nil
}
