// Pickup measures how long a job waits on an idle worker, and what the waiting
// costs Redis, by the number of fetch loops and the time between their looks.
package main

import (
	"context"
	"fmt"
	"log"
	"math/rand/v2"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/hibiken/asynq"
	"github.com/redis/go-redis/v9"

	"github.com/carpool-go/carpool/internal/servers"
	"github.com/carpool-go/carpool/tasks"
)

const (
	jobs   = 20
	atRest = 2 * time.Second
)

func main() {
	if err := run(context.Background()); err != nil {
		log.Fatal(err)
	}
}

func run(ctx context.Context) error {
	server, err := servers.StartRedis(ctx, servers.RedisConfig{})
	if err != nil {
		return err
	}
	defer server.Stop()
	rdb, err := tasks.OpenRedis(server.URL())
	if err != nil {
		return err
	}
	defer rdb.Close()
	fmt.Println("| fetch loops | between looks | p50 | p95 | commands a second at rest |")
	fmt.Println("| --- | --- | --- | --- | --- |")
	for _, loops := range []int{1, 4} {
		for _, interval := range []time.Duration{10, 50, 200, 1000} {
			interval *= time.Millisecond
			waits, rate, err := measure(ctx, rdb, loops, interval)
			if err != nil {
				return err
			}
			fmt.Printf("| %d | %s | %s | %s | %.0f |\n", loops, interval,
				waits[len(waits)/2].Round(100*time.Microsecond), waits[len(waits)*95/100].Round(100*time.Microsecond), rate)
		}
	}
	return nil
}

func measure(ctx context.Context, rdb redis.UniversalClient, loops int, interval time.Duration) (waits []time.Duration, rate float64, err error) {
	picked := make(chan time.Duration, jobs)
	handler := asynq.HandlerFunc(func(_ context.Context, t *asynq.Task) error {
		ns, err := strconv.ParseInt(string(t.Payload()), 10, 64)
		picked <- time.Since(time.Unix(0, ns))
		return err
	})
	for range loops {
		s := asynq.NewServerFromRedisClient(rdb, asynq.Config{
			Concurrency: 3, TaskCheckInterval: interval, LogLevel: asynq.FatalLevel,
			Queues: map[string]int{"critical": 6, "default": 3, "low": 1},
		})
		if err := s.Start(handler); err != nil {
			return nil, 0, err
		}
		defer s.Shutdown()
	}
	time.Sleep(2 * interval)
	before := commands(ctx, rdb)
	time.Sleep(atRest)
	rate = float64(commands(ctx, rdb)-before) / atRest.Seconds()

	client := asynq.NewClientFromRedisClient(rdb)
	for range jobs {
		time.Sleep(time.Duration(20+rand.IntN(60)) * time.Millisecond) // not in step with the loops
		now := strconv.FormatInt(time.Now().UnixNano(), 10)
		if _, err := client.EnqueueContext(ctx, asynq.NewTask("pickup", []byte(now))); err != nil {
			return nil, 0, err
		}
		waits = append(waits, <-picked)
	}
	slices.Sort(waits)
	return waits, rate, nil
}

// commands is how many scripts, of which each look at a queue is one, Redis has
// run.
func commands(ctx context.Context, rdb redis.UniversalClient) int {
	stats, err := rdb.Info(ctx, "commandstats").Result()
	if err != nil {
		return 0
	}
	for line := range strings.Lines(stats) {
		if rest, ok := strings.CutPrefix(line, "cmdstat_evalsha:calls="); ok {
			n, _, _ := strings.Cut(rest, ",")
			calls, _ := strconv.Atoi(n)
			return calls
		}
	}
	return 0
}
