package admin_test

import (
	"context"
	"errors"
	"fmt"
	"log"

	"github.com/hibiken/asynq"

	"github.com/carpool-go/carpool/admin"
	"github.com/carpool-go/carpool/internal/testservers"
	"github.com/carpool-go/carpool/tasks"
)

// redisWithArchivedJob returns the URL of a Redis with one job, which was given up.
func redisWithArchivedJob() string {
	url := testservers.Redis(testservers.Example{})
	rdb, err := tasks.OpenRedis(url)
	if err != nil {
		log.Fatal(err)
	}
	defer rdb.Close()
	info, err := tasks.NewClient(rdb).Enqueue(context.Background(), note{Text: "hello"}, nil)
	if err != nil {
		log.Fatal(err)
	}
	if err := asynq.NewInspectorFromRedisClient(rdb).ArchiveTask(info.Queue, info.ID); err != nil {
		log.Fatal(err)
	}
	return url
}

// A tool shows the queues. Without a database it leaves the outbox out.
func ExampleAdmin_Status() {
	rdb, err := tasks.OpenRedis(redisWithArchivedJob()) // such as os.Getenv("REDIS_URL")
	if err != nil {
		log.Fatal(err)
	}
	defer rdb.Close()

	status, err := admin.New(rdb, nil).Status(context.Background())
	if err != nil {
		log.Fatal(err)
	}
	for _, q := range status.Queues {
		fmt.Printf("%s: %d pending, %d archived, served: %t\n", q.Name, q.Pending, q.Archived, status.IsServed(q.Name))
	}
	// Output: default: 0 pending, 1 archived, served: false
}

// A tool puts all jobs of a kind that were given up back on their queues.
func ExampleAdmin_Retry() {
	ctx := context.Background()
	rdb, err := tasks.OpenRedis(redisWithArchivedJob()) // such as os.Getenv("REDIS_URL")
	if err != nil {
		log.Fatal(err)
	}
	defer rdb.Close()
	operator := admin.New(rdb, nil)

	jobs, err := operator.Archived(ctx, admin.ArchiveFilter{Kind: "note"})
	if err != nil {
		log.Fatal(err)
	}
	for _, job := range jobs {
		err := operator.Retry(ctx, job)
		if held, ok := errors.AsType[*tasks.DuplicateError](err); ok {
			fmt.Println("left in the archive, as it is done by the job", held.ID)
			continue
		}
		if err != nil && !errors.Is(err, admin.ErrNotArchived) { // somebody else was faster
			log.Fatal(err)
		}
		fmt.Println(job.Kind, "is on the queue", job.Queue)
	}
	// Output: note is on the queue default
}
