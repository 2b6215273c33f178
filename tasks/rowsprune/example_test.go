package rowsprune_test

import (
	"context"
	"fmt"
	"log"

	"github.com/carpool-go/carpool/internal/testservers"
	"github.com/carpool-go/carpool/tasks"
	"github.com/carpool-go/carpool/tasks/rowsprune"
)

func redisURL() string { return testservers.Redis(testservers.Example{}) }

// A service has the log-ins of more than 90 days ago deleted.
func ExamplePrune() {
	rdb, err := tasks.OpenRedis(redisURL()) // such as os.Getenv("REDIS_URL")
	if err != nil {
		log.Fatal(err)
	}
	defer rdb.Close()

	logins := rowsprune.Prune{Table: "app.logins", Column: "at", OlderThan: "90d"}
	info, err := tasks.NewClient(rdb).Enqueue(context.Background(), logins, &tasks.EnqueueOptions{Queue: "low"})
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(info.Kind, info.State, "on", info.Queue)
	// Output: rows:prune pending on low
}

func ExamplePrune_Validate() {
	fmt.Println(rowsprune.Prune{Table: "app.logins", Column: "at", OlderThan: "three months"}.Validate())
	// Output: older_than: must be an age above zero, such as 30d, 1d12h or 90m
}
