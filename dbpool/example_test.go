package dbpool_test

import (
	"context"
	"errors"
	"fmt"
	"log"
	"time"

	"github.com/jackc/pgerrcode"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/carpool-go/carpool/dbpool"
)

func ExampleOpen() {
	ctx := context.Background()
	cfg := dbpool.DefaultConfig(databaseURL()) // such as os.Getenv("DATABASE_URL")
	cfg.Size, cfg.MaxOverflow = 3, 2
	pool, err := dbpool.Open(ctx, cfg)
	if err != nil {
		log.Fatal(err)
	}
	defer pool.Close()

	err = pgx.BeginFunc(ctx, pool, func(tx pgx.Tx) error {
		_, err := tx.Exec(ctx, "CREATE TABLE seats (id int, taken bool)")
		return err
	})
	if e, ok := errors.AsType[*dbpool.TimeoutError](err); ok {
		log.Fatalf("%d others wait too", e.Waiting-1)
	}
	fmt.Println(err)
	// Output: <nil>
}

// One statement needs no connection of one's own.
func ExamplePool_QueryRow() {
	ctx := context.Background()
	pool := openPool()
	defer pool.Close()

	var sum int
	if err := pool.QueryRow(ctx, "SELECT $1::int + 1", 41).Scan(&sum); err != nil {
		log.Fatal(err)
	}
	fmt.Println(sum)
	// Output: 42
}

// Several statements that need the same connection acquire it first.
func ExamplePool_Acquire() {
	ctx := context.Background()
	pool := openPool()
	defer pool.Close()

	conn, err := pool.Acquire(ctx)
	if err != nil {
		log.Fatal(err)
	}
	defer conn.Release()
	var first, second int
	if err := conn.QueryRow(ctx, "SELECT pg_backend_pid()").Scan(&first); err != nil {
		log.Fatal(err)
	}
	if err := conn.QueryRow(ctx, "SELECT pg_backend_pid()").Scan(&second); err != nil {
		log.Fatal(err)
	}
	fmt.Println("the same backend:", first == second)
	// Output: the same backend: true
}

// A job's use of the pool is charged to it, and what it forgets is taken back.
func ExamplePool_Track() {
	pool := openPool()
	defer pool.Close()
	job := func(ctx context.Context) {
		_, _ = pool.Exec(ctx, "SELECT 1")
		_, _ = pool.Acquire(ctx) // and never released
	}

	ctx, borrower := pool.Track(context.Background(), "csv:import 17")
	job(ctx)
	usage := borrower.End()
	fmt.Printf("%d acquires, %d statements, %d leaked\n", usage.Acquires, usage.Queries, usage.Leaked)
	// Output: 2 acquires, 1 statements, 1 leaked
}

func ExamplePool_Stats() {
	ctx := context.Background()
	pool := openPool()
	defer pool.Close()

	conn, err := pool.Acquire(ctx)
	if err != nil {
		log.Fatal(err)
	}
	s := pool.Stats()
	fmt.Printf("%d lent, %d idle, %d waiting\n", s.CheckedOut, s.CheckedIn, s.Waiting)
	conn.Release()
	s = pool.Stats()
	fmt.Printf("%d lent, %d idle, %d opened since the start\n", s.CheckedOut, s.CheckedIn, s.Counts.Opened)
	// Output:
	// 1 lent, 0 idle, 0 waiting
	// 0 lent, 1 idle, 1 opened since the start
}

// A clock, such as a time.Ticker, calls Validate every minute or so.
func ExamplePool_Validate() {
	ctx := context.Background()
	pool := openPool()
	defer pool.Close()

	for range 2 {
		v, err := pool.Validate(ctx)
		if err != nil {
			log.Fatal(err)
		}
		fmt.Printf("%d checked, %d replaced, %d errors; %d idle\n", v.Checked, v.Replaced, v.Errors, pool.Stats().CheckedIn)
	}
	// Output:
	// 0 checked, 0 replaced, 0 errors; 5 idle
	// 5 checked, 0 replaced, 0 errors; 5 idle
}

// A program that waits until its database is back, and gives up on other errors,
// decides by IsAway.
func ExampleIsAway() {
	fmt.Println(dbpool.IsAway(&pgconn.PgError{Code: pgerrcode.AdminShutdown}))
	fmt.Println(dbpool.IsAway(&pgconn.PgError{Code: pgerrcode.UniqueViolation}))
	// Output:
	// true
	// false
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
