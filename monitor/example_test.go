package monitor_test

import (
	"log"
	"net/http"
	"os"
	"time"

	"github.com/carpool-go/carpool/monitor"
	"github.com/carpool-go/carpool/tasks"
)

// A program serves the monitor itself, behind a login, and lets nobody change anything.
func ExampleNew() {
	rdb, err := tasks.OpenRedis(os.Getenv("REDIS_URL"))
	if err != nil {
		log.Fatal(err)
	}
	defer rdb.Close()

	password := os.Getenv("MONITOR_PASSWORD")
	if password == "" {
		log.Fatal("MONITOR_PASSWORD is not set; without a password there is no login")
	}
	server := &http.Server{
		Addr:              ":8080",
		Handler:           monitor.New(monitor.Config{Redis: rdb, User: "ada", Password: password, ReadOnly: true}),
		ReadHeaderTimeout: 10 * time.Second,
	}
	log.Print(server.ListenAndServe())
}
