package dbpool_test

import (
	"context"
	"errors"
	"fmt"
	"log"
	"os"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/carpool-go/carpool/dbpool"
)

func ExampleOpen() {
	ctx := context.Background()
	cfg := dbpool.DefaultConfig(os.Getenv("DATABASE_URL"))
	cfg.Size, cfg.MaxOverflow = 3, 2
	pool, err := dbpool.Open(ctx, cfg)
	if err != nil {
		log.Fatal(err)
	}
	defer pool.Close()

	err = pgx.BeginFunc(ctx, pool, func(tx pgx.Tx) error {
		_, err := tx.Exec(ctx, "UPDATE seats SET taken = true WHERE id = $1", 7)
		return err
	})
	if e, ok := errors.AsType[*dbpool.TimeoutError](err); ok {
		log.Printf("%d others wait too", e.Waiting-1)
	}
}

// A job's use of the pool is charged to it, and what it forgets is taken back.
func ExamplePool_Track() {
	var pool *dbpool.Pool // from Open
	job := func(ctx context.Context) {
		ctx, borrower := pool.Track(ctx, "csv:import 17")
		_, _ = pool.Exec(ctx, "SELECT 1")
		usage := borrower.End()
		log.Printf("%d statements, waited %s", usage.Queries, usage.Wait)
	}
	_ = job
}

func ExampleConfig_Validate() {
	cfg := dbpool.DefaultConfig("postgres://ada:secret@localhost/app")
	cfg.Size, cfg.Timeout = 0, -1
	fmt.Println(cfg.Validate())
	// Output: dbpool: Size is 0; set at least 1, or start from DefaultConfig; Timeout is -1ns; set a positive time, or start from DefaultConfig
}

func ExampleTimeoutError() {
	fmt.Println(&dbpool.TimeoutError{
		Timeout: 30 * time.Second, Size: 5, MaxOverflow: 5, CheckedOut: 10, Waiting: 3,
		Holders: []dbpool.Holder{{Name: "csv:import 17", For: 41 * time.Second}},
	})
	// Output: no connection within 30s: size 5 + overflow 5 all checked out, 3 waiting; held by csv:import 17 for 41s
}

func ExampleBudget_Warning() {
	budget := dbpool.Budget{MaxConnections: 100, Reserved: 3, RoleLimit: -1, DatabaseLimit: -1, PerInstance: 10}
	fmt.Println(budget.Warning(6))
	// Output: 6 instances of 10 connections, and as many again during a deploy, are 120, but the server has 97; set DB_POOL_SIZE and DB_MAX_OVERFLOW to 8 together
}
