package tasks_test

import (
	"context"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/carpool-go/carpool/internal/servers"
	"github.com/carpool-go/carpool/tasks"
)

// silent returns the address of a listener that accepts and never answers.
func silent(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	return l.Addr().String()
}

// A client without a deadline of its own asks no longer than three seconds, however many ask
// at once.
func TestOpenRedis_SentinelsThatAreAllAwayAreOneErrorThatNamesThem(t *testing.T) {
	t.Parallel()
	const refused = "127.0.0.1:1"
	one, other := silent(t), silent(t)
	for at, want := range map[string]string{
		refused + ",localhost:1": "Redis cannot be reached by the Sentinels at 127.0.0.1:1, localhost:1: connect: connection refused; one of them must run",
		one + "," + other:        "Redis cannot be reached by the Sentinels at " + one + ", " + other + ": no answer; one of them must run",
		refused + "," + one:      "Redis cannot be reached by the Sentinels at 127.0.0.1:1, " + one + ": 127.0.0.1:1: connect: connection refused; " + one + ": no answer; one of them must run",
	} {
		t.Run(at, func(t *testing.T) {
			t.Parallel()
			rdb, err := tasks.OpenRedis("redis-sentinel://:hush@" + at + "?master=m")
			if err != nil {
				t.Fatal(err)
			}
			defer rdb.Close()
			client := tasks.NewClient(rdb)
			ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
			defer cancel()
			var all sync.WaitGroup
			for range 20 {
				all.Go(func() {
					_, err := client.Enqueue(ctx, Greet{Name: "x"}, nil)
					if err == nil || ctx.Err() != nil || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "hush") {
						t.Errorf("error %v, want in it %s", err, want)
					}
				})
			}
			all.Wait()
		})
	}
}

// Which sentinel a client asks first is its own affair, so there are several clients.
func TestOpenRedis_AFrozenSentinelKeepsNobodyFromTheNewMaster(t *testing.T) {
	t.Parallel()
	trio, err := servers.StartRedisTrio(t.Context(), servers.RedisConfig{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := trio.Stop(); err != nil {
			t.Error(err)
		}
	})
	clients := make([]redis.UniversalClient, 8)
	for i := range clients {
		if clients[i], err = tasks.OpenRedis(trio.URL()); err != nil {
			t.Fatal(err)
		}
		defer clients[i].Close()
		if err := clients[i].Ping(t.Context()).Err(); err != nil {
			t.Fatal(err)
		}
	}
	if err := trio.Sentinels[0].Pause(); err != nil {
		t.Fatal(err)
	}
	trio.Servers[0].Kill()
	ctx, cancel := context.WithTimeout(t.Context(), 40*time.Second)
	defer cancel()
	var all sync.WaitGroup
	for _, client := range clients {
		all.Go(func() {
			for {
				err := client.Set(ctx, "key", "value", 0).Err()
				if err == nil {
					return
				}
				if ctx.Err() != nil {
					t.Errorf("a client doesn't find the new master: %v", err)
					return
				}
			}
		})
	}
	all.Wait()
}
