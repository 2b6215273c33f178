package tasks_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log"
	"log/slog"
	"net/http"
	"os"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/carpool-go/carpool/dbpool"
	"github.com/carpool-go/carpool/internal/schema"
	"github.com/carpool-go/carpool/internal/testservers"
	"github.com/carpool-go/carpool/tasks"
	"github.com/carpool-go/carpool/tasks/csvimport"
	"github.com/carpool-go/carpool/tasks/webhook"
)

func redisURL() string { return testservers.Redis(testservers.Example{}) }

// openDatabase opens a database that has carpool's tables and knows the kind
// webhook:deliver.
func openDatabase() *dbpool.Pool {
	ctx, silent := context.Background(), slog.New(slog.DiscardHandler)
	cfg := dbpool.DefaultConfig(testservers.Postgres(testservers.Example{}))
	cfg.Logger = silent
	if err := schema.Migrate(ctx, cfg.URL, silent); err != nil {
		log.Fatal(err)
	}
	db, err := dbpool.Open(ctx, cfg)
	if err != nil {
		log.Fatal(err)
	}
	set := new(tasks.Set)
	tasks.Register(set, webhook.Deliverer{}.Handle)
	if err := tasks.RecordKinds(ctx, db, set); err != nil {
		log.Fatal(err)
	}
	return db
}

// deliver runs a job as a worker would, and prints its result.
func deliver(s *tasks.Set, db *dbpool.Pool, id string, p tasks.Payload) {
	task, err := s.Lookup(p.Kind())
	if err != nil {
		log.Fatal(err)
	}
	job := &tasks.Job{ID: id, Kind: task.Kind, Queue: task.Options.Queue, Attempt: 1, DB: db, Log: slog.New(slog.DiscardHandler)}
	result, err := task.Run(context.Background(), job, p)
	if err != nil {
		log.Fatal(err)
	}
	fmt.Printf("%s\n", result)
}

// A service enqueues a job for later, and holds a key that keeps a second one out.
func ExampleClient_Enqueue() {
	rdb, err := tasks.OpenRedis(redisURL()) // such as os.Getenv("REDIS_URL")
	if err != nil {
		log.Fatal(err)
	}
	defer rdb.Close()
	client := tasks.NewClient(rdb)

	ctx := context.Background()
	paid := webhook.Deliver{URL: "https://shop.example/hook", Event: "order.paid", Body: json.RawMessage(`{"order": 17}`)}
	opts := &tasks.EnqueueOptions{Queue: "critical", RunAt: time.Now().Add(time.Hour), UniqueKey: "order-17"}
	info, err := client.Enqueue(ctx, paid, opts)
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(info.Kind, "is", info.State, "on", info.Queue)

	_, err = client.Enqueue(ctx, paid, opts)
	if held, ok := errors.AsType[*tasks.DuplicateError](err); ok {
		fmt.Println("the first job holds the key:", held.ID == info.ID)
	}
	// Output:
	// webhook:deliver is scheduled on critical
	// the first job holds the key: true
}

// With an id of its own, a service may repeat a call that got no answer.
func ExampleClient_Enqueue_again() {
	rdb, err := tasks.OpenRedis(redisURL()) // such as os.Getenv("REDIS_URL")
	if err != nil {
		log.Fatal(err)
	}
	defer rdb.Close()
	client := tasks.NewClient(rdb)

	paid := webhook.Deliver{URL: "https://shop.example/hook", Event: "order.paid", Body: json.RawMessage(`{"order": 17}`)}
	for range 2 {
		info, err := client.Enqueue(context.Background(), paid, &tasks.EnqueueOptions{ID: "order-17-paid"})
		if err != nil {
			log.Fatal(err)
		}
		fmt.Println(info.ID, info.State)
	}
	// Output:
	// order-17-paid pending
	// order-17-paid pending
}

// The job is enqueued when the order is committed, and never if it is rolled back.
func ExampleClient_EnqueueTx() {
	ctx := context.Background()
	db := openDatabase() // a *pgxpool.Pool is as good
	defer db.Close()
	var client tasks.Client // the zero client needs no Redis

	for _, order := range []string{`{"order": 17}`, `{"order": 0}`} {
		err := pgx.BeginFunc(ctx, db, func(tx pgx.Tx) error {
			paid := webhook.Deliver{URL: "https://shop.example/hook", Event: "order.paid", Body: json.RawMessage(order)}
			if _, err := client.EnqueueTx(ctx, tx, paid, &tasks.EnqueueOptions{MaxRetry: 5}); err != nil {
				return err
			}
			var number int
			if err := tx.QueryRow(ctx, "SELECT ($1::jsonb ->> 'order')::int", order).Scan(&number); err != nil {
				return err
			}
			if number == 0 {
				return errors.New("there is no such order")
			}
			return nil
		})
		fmt.Println("the transaction's error:", err)
	}

	var jobs int
	if err := db.QueryRow(ctx, "SELECT count(*) FROM carpool.outbox").Scan(&jobs); err != nil {
		log.Fatal(err)
	}
	fmt.Println("jobs on their way to Redis:", jobs)
	// Output:
	// the transaction's error: <nil>
	// the transaction's error: there is no such order
	// jobs on their way to Redis: 1
}

// A tool enqueues a job and waits for its result. A worker that has the kind must be up.
func ExampleClient_Wait() {
	rdb, err := tasks.OpenRedis(os.Getenv("REDIS_URL"))
	if err != nil {
		log.Fatal(err)
	}
	defer rdb.Close()
	client := tasks.NewClient(rdb)

	ctx, cancel := context.WithTimeout(context.Background(), time.Hour)
	defer cancel()
	weather := csvimport.Import{Source: "https://example.com/weather.csv", Table: "weather", Mode: "replace"}
	info, err := client.Enqueue(ctx, weather, nil)
	if err != nil {
		log.Fatal(err)
	}
	data, err := client.Wait(ctx, info.Queue, info.ID, func(now *tasks.Info) {
		fmt.Printf("%s %s\n", now.State, now.Result)
	})
	if errors.Is(err, tasks.ErrJobFailed) {
		log.Fatalf("the import was given up: %v", err)
	}
	if err != nil {
		log.Fatal(err)
	}
	var result csvimport.Result
	if err := json.Unmarshal(data, &result); err != nil {
		log.Fatal(err)
	}
	fmt.Println(result.Rows, "rows in", result.Table)
}

func ExampleClient_Cancel() {
	rdb, err := tasks.OpenRedis(redisURL()) // such as os.Getenv("REDIS_URL")
	if err != nil {
		log.Fatal(err)
	}
	defer rdb.Close()
	client := tasks.NewClient(rdb)

	ctx := context.Background()
	tomorrow := &tasks.EnqueueOptions{RunAt: time.Now().Add(24 * time.Hour)}
	info, err := client.Enqueue(ctx, Greet{Name: "Ada"}, tomorrow)
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(client.Cancel(ctx, info.ID))
	fmt.Println(errors.Is(client.Cancel(ctx, info.ID), tasks.ErrNoSuchJob))
	// Output:
	// <nil>
	// true
}

// A handler that only reads may run twice for one job.
func ExampleRegister() {
	greet := func(ctx context.Context, job *tasks.Job, g Greet) (greeting string, err error) {
		err = job.DB.QueryRow(ctx, "SELECT 'Hello, ' || $1 || '!'", g.Name).Scan(&greeting)
		return greeting, err
	}
	set := new(tasks.Set)
	tasks.Register(set, greet)

	db := openDatabase()
	defer db.Close()
	deliver(set, db, "job", Greet{Name: "Ada"})
	// Output: "Hello, Ada!"
}

// A job is delivered twice, as after a crash. Its effects are there once, and both
// deliveries have the result of the first.
func ExampleRegisterTx() {
	ctx := context.Background()
	db := openDatabase()
	defer db.Close()
	if _, err := db.Exec(ctx, "CREATE TABLE guests AS SELECT 'Ada' AS name, 0 AS greeted"); err != nil {
		log.Fatal(err)
	}

	greet := func(ctx context.Context, _ *tasks.Job, tx pgx.Tx, g Greet) (greeted int, err error) {
		err = tx.QueryRow(ctx, "UPDATE guests SET greeted = greeted + 1 WHERE name = $1 RETURNING greeted", g.Name).Scan(&greeted)
		return greeted, err
	}
	set := new(tasks.Set)
	tasks.RegisterTx(set, greet)

	deliver(set, db, "first-job", Greet{Name: "Ada"})
	deliver(set, db, "first-job", Greet{Name: "Ada"})
	deliver(set, db, "second-job", Greet{Name: "Ada"})
	// Output:
	// 1
	// 1
	// 2
}

// A handler asks elsewhere first, which takes its time and no connection, and then has its
// effects in the transaction of Once.
func ExampleRegisterOnce() {
	ctx := context.Background()
	db := openDatabase()
	defer db.Close()
	if _, err := db.Exec(ctx, "CREATE TABLE greetings (name text, text text)"); err != nil {
		log.Fatal(err)
	}
	translate := func(context.Context, string) (string, error) {
		fmt.Println("translating")
		return "Bonjour", nil
	}

	greet := func(ctx context.Context, job *tasks.Job, g Greet) (string, error) {
		text, err := translate(ctx, "Hello")
		if err != nil {
			return "", err
		}
		return tasks.Once(ctx, job, func(tx pgx.Tx) (string, error) {
			_, err := tx.Exec(ctx, "INSERT INTO greetings VALUES ($1, $2)", g.Name, text)
			return text, err
		})
	}
	set := new(tasks.Set)
	tasks.RegisterOnce(set, greet)

	deliver(set, db, "job", Greet{Name: "Ada"})
	deliver(set, db, "job", Greet{Name: "Ada"}) // has the recorded result
	// Output:
	// translating
	// "Bonjour"
	// "Bonjour"
}

// A card that was declined will be declined at the next try, too.
func ExamplePermanent() {
	outcome := func(status int) error {
		switch status {
		case http.StatusOK:
			return nil
		case http.StatusPaymentRequired:
			return tasks.Permanent(errors.New("the card was declined"))
		}
		return fmt.Errorf("the bank answered %d", status)
	}
	for _, status := range []int{http.StatusPaymentRequired, http.StatusBadGateway} {
		err := outcome(status)
		fmt.Println(err, tasks.IsPermanent(err))
	}
	// Output:
	// the card was declined true
	// the bank answered 502 false
}

// A server has said when it may be asked again.
func ExampleRetryAfter() {
	err := tasks.RetryAfter(time.Minute, errors.New("the server is busy"))
	fmt.Println(err)
	fmt.Println(tasks.RetryDelay(err))
	// Output:
	// the server is busy
	// 1m0s true
}

// A handler looks every five minutes for a file that somebody else brings. That uses up
// none of the job's tries.
func ExampleSnooze() {
	read := func(name string) ([]byte, error) {
		data, err := os.ReadFile(name)
		if errors.Is(err, fs.ErrNotExist) {
			return nil, tasks.Snooze(5 * time.Minute)
		}
		return data, err
	}
	_, err := read("testdata/not-there-yet.csv")
	fmt.Println(err)
	// Output: snoozed for 5m0s
}
