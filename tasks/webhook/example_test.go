package webhook_test

import (
	"context"
	"encoding/json"
	"fmt"
	"log"

	"github.com/carpool-go/carpool/internal/testservers"
	"github.com/carpool-go/carpool/tasks"
	"github.com/carpool-go/carpool/tasks/webhook"
)

func redisURL() string { return testservers.Redis(testservers.Example{}) }

// A service tells a receiver that an order was paid.
func ExampleDeliver() {
	rdb, err := tasks.OpenRedis(redisURL()) // such as os.Getenv("REDIS_URL")
	if err != nil {
		log.Fatal(err)
	}
	defer rdb.Close()

	body, err := json.Marshal(map[string]int{"order": 17})
	if err != nil {
		log.Fatal(err)
	}
	paid := webhook.Deliver{URL: "https://shop.example/hook", Event: "order.paid", Body: body}
	info, err := tasks.NewClient(rdb).Enqueue(context.Background(), paid, nil)
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(info.Kind, info.State, string(info.Payload))
	// Output: webhook:deliver pending {"url":"https://shop.example/hook","event":"order.paid","body":{"order":17}}
}

// A group registers the kind with a secret of its own.
func ExampleDeliverer() {
	deliverer := webhook.Deliverer{Secret: "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"}
	if err := webhook.ValidateSecret(deliverer.Secret); err != nil {
		log.Fatal(err)
	}
	set := new(tasks.Set)
	tasks.Register(set, deliverer.Handle)
	fmt.Println(set.Kinds())
	// Output: [webhook:deliver]
}
