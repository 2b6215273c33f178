// The program enqueues a job in a transaction, with pgx.
//
//	DATABASE_URL=postgres://… go run ./examples/go
package main

import (
	"context"
	"fmt"
	"log"
	"os"

	"github.com/jackc/pgx/v5"

	"github.com/carpool-go/carpool/tasks"
	"github.com/carpool-go/carpool/tasks/rowsprune"
)

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
	prune := rowsprune.Prune{Table: "carpool.webhook_deliveries", Column: "delivered_at", OlderThan: "30d"}
	opts := &tasks.EnqueueOptions{Queue: "low"}

	tx, err := conn.Begin(ctx)
	if err != nil {
		return err
	}
	defer tx.Rollback(ctx) // does nothing after the commit
	job, err := client.EnqueueTx(ctx, tx, prune, opts)
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
	if job, err = client.EnqueueTx(ctx, tx, prune, opts); err != nil {
		return err
	}
	if err := tx.Rollback(ctx); err != nil {
		return err
	}
	fmt.Println("rolled back", job)
	return nil
}
