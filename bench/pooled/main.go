// Pooled measures how near many jobs at once on few connections come to the ideal: each
// works for about 100 ms elsewhere, without the database, and then inserts a row exactly once.
package main

import (
	"context"
	"flag"
	"fmt"
	"log"
	"log/slog"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/carpool-go/carpool/dbpool"
	"github.com/carpool-go/carpool/internal/servers"
	"github.com/carpool-go/carpool/tasks"
	"github.com/carpool-go/carpool/worker"
)

const elsewhere = 100 * time.Millisecond

var (
	slots = flag.Int("slots", 150, "jobs at once")
	jobs  = flag.Int("jobs", 6000, "jobs a run")
	runs  = flag.Int("runs", 5, "runs, of which the median counts")
	// Jobs that take exactly as long as each other go on meeting at the database, as they did at the start.
	spread = flag.Duration("spread", 20*time.Millisecond, "by how much more or less than 100ms a job works elsewhere; at least 1ns")
)

func main() {
	flag.Parse()
	if err := run(context.Background()); err != nil {
		log.Fatal(err)
	}
}

func run(ctx context.Context) error {
	redis, err := servers.StartRedis(ctx, servers.RedisConfig{})
	if err != nil {
		return err
	}
	defer redis.Stop()
	postgres, err := servers.StartPostgres(ctx, servers.PostgresConfig{})
	if err != nil {
		return err
	}
	defer postgres.Stop()
	databaseURL, err := postgres.Database(ctx, "pooled")
	if err != nil {
		return err
	}
	group := new(callers)
	quiet := slog.New(slog.DiscardHandler)
	if err := worker.Migrate(ctx, databaseURL, quiet, group); err != nil {
		return err
	}
	conn, err := pgx.Connect(ctx, databaseURL)
	if err != nil {
		return err
	}
	defer conn.Close(ctx)
	if _, err := conn.Exec(ctx, "CREATE TABLE effects (job_id text)"); err != nil {
		return err
	}
	rdb, err := tasks.OpenRedis(redis.URL())
	if err != nil {
		return err
	}
	defer rdb.Close()
	client := tasks.NewClient(rdb)

	ideal := float64(*slots) / elsewhere.Seconds()
	var ratios []float64
	for range *runs {
		for range *jobs {
			if _, err := client.Enqueue(ctx, call{}, nil); err != nil {
				return err
			}
		}
		cfg := worker.Config{
			RedisURL: redis.URL(), Pool: dbpool.DefaultConfig(databaseURL), Groups: []tasks.Group{group},
			Concurrency: *slots, Burst: true, Logger: quiet,
		}
		group.ended = nil
		if err := worker.Run(ctx, cfg); err != nil {
			return err
		}
		rate := group.rate()
		fmt.Printf("%.0f jobs a second, %.2f of the ideal %.0f\n", rate, rate/ideal, ideal)
		ratios = append(ratios, rate/ideal)
	}
	var effects int
	if err := conn.QueryRow(ctx, "SELECT count(*) FROM effects").Scan(&effects); err != nil {
		return err
	}
	if want := *runs * *jobs; effects != want {
		return fmt.Errorf("%d effects of %d jobs", effects, want)
	}
	slices.Sort(ratios)
	fmt.Printf("%d jobs at once on 10 connections: %.2f of the ideal (median of %d runs)\n", *slots, ratios[len(ratios)/2], *runs)
	return nil
}

// call is a job that works elsewhere, and then inserts a row.
type call struct{}

func (call) Kind() string           { return "bench:call" }
func (call) Options() tasks.Options { return tasks.Options{} }
func (call) Validate() error        { return nil }

// callers is the group of the kind.
type callers struct {
	mu    sync.Mutex
	ended []time.Time
}

func (c *callers) Register(s *tasks.Set) {
	tasks.RegisterOnce(s, func(ctx context.Context, job *tasks.Job, _ call) (any, error) {
		time.Sleep(elsewhere - *spread + rand.N(2**spread))
		_, err := tasks.Once(ctx, job, func(tx pgx.Tx) (any, error) {
			_, err := tx.Exec(ctx, "INSERT INTO effects VALUES ($1)", job.ID)
			return nil, err
		})
		c.mu.Lock()
		defer c.mu.Unlock()
		c.ended = append(c.ended, time.Now())
		return nil, err
	})
}

// rate is how many jobs ended a second between the first tenth and the last.
func (c *callers) rate() float64 {
	slices.SortFunc(c.ended, time.Time.Compare)
	first, last := len(c.ended)/10, len(c.ended)*9/10
	return float64(last-first) / c.ended[last].Sub(c.ended[first]).Seconds()
}
