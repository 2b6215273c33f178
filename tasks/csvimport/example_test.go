package csvimport_test

import (
	"context"
	"fmt"
	"log"

	"github.com/carpool-go/carpool/internal/testservers"
	"github.com/carpool-go/carpool/tasks"
	"github.com/carpool-go/carpool/tasks/csvimport"
)

func redisURL() string { return testservers.Redis(testservers.Example{}) }

// A service has a file imported into the table imports.weather. The unique key keeps a
// second import of the table out until the first has ended.
func ExampleImport() {
	rdb, err := tasks.OpenRedis(redisURL()) // such as os.Getenv("REDIS_URL")
	if err != nil {
		log.Fatal(err)
	}
	defer rdb.Close()

	weather := csvimport.Import{Source: "https://example.com/weather.csv", Table: "weather", Mode: "replace"}
	info, err := tasks.NewClient(rdb).Enqueue(context.Background(), weather, &tasks.EnqueueOptions{UniqueKey: weather.Table})
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(info.Kind, info.State)
	// Output: csv:import pending
}

// A group registers the kind with a folder of its own.
func ExampleImporter() {
	set := new(tasks.Set)
	tasks.RegisterOnce(set, csvimport.Importer{Dir: "/var/imports"}.Handle)
	fmt.Println(set.Kinds())
	// Output: [csv:import]
}
