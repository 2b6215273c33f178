package asynqwire

import (
	"fmt"
	"maps"
	"slices"

	"github.com/hibiken/asynq"
	"github.com/redis/go-redis/v9"
)

// ServedQueues returns the queues that a server of asynq's pulls from, sorted, by asynq's
// own account. Workers are such servers, and so are programs that are none of carpool's.
// One that dies without a word is counted for ten seconds more. The error is Redis'.
func ServedQueues(rdb redis.UniversalClient) ([]string, error) {
	servers, err := asynq.NewInspectorFromRedisClient(rdb).Servers()
	if err != nil {
		return nil, fmt.Errorf("read asynq's servers: %w", err)
	}
	served := make(map[string]bool)
	for _, server := range servers {
		for queue := range server.Queues {
			served[queue] = true
		}
	}
	return slices.Sorted(maps.Keys(served)), nil
}
