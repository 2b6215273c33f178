//go:build unix

package servers

import (
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
)

func TestRedisTrio_TheReplicaTakesTheMastersPlaceWithItsData(t *testing.T) {
	t.Parallel()
	trio, err := StartRedisTrio(t.Context(), RedisConfig{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := trio.Stop(); err != nil {
			t.Error(err)
		}
	})
	master, replica := trio.Servers[0], trio.Servers[1]
	client := redisClient(t, master.URL())
	if err := client.Set(t.Context(), "key", "value", 0).Err(); err != nil {
		t.Fatal(err)
	}
	if n, err := client.Wait(t.Context(), 1, 10*time.Second).Result(); n != 1 || err != nil {
		t.Fatalf("%d replicas have it, error %v", n, err)
	}
	master.Kill()
	client = redisClient(t, replica.URL())
	for giveUp := time.Now().Add(time.Minute); client.Set(t.Context(), "other", "value", 0).Err() != nil; time.Sleep(20 * time.Millisecond) {
		if time.Now().After(giveUp) {
			t.Fatal("the replica takes no writes")
		}
	}
	if got, err := client.Get(t.Context(), "key").Result(); got != "value" || err != nil {
		t.Errorf("the value is %q, error %v", got, err)
	}
	want := strings.Split(client.Options().Addr, ":")
	for _, sentinel := range trio.Sentinels {
		options, err := redis.ParseURL(sentinel.URL())
		if err != nil {
			t.Fatal(err)
		}
		asked := redis.NewSentinelClient(&redis.Options{Addr: options.Addr, Password: options.Password})
		defer asked.Close()
		for giveUp := time.Now().Add(time.Minute); ; time.Sleep(20 * time.Millisecond) {
			got, err := asked.GetMasterAddrByName(t.Context(), trioMaster).Result()
			if err == nil && slices.Equal(got, want) {
				break
			}
			if time.Now().After(giveUp) {
				t.Fatalf("a sentinel names %v, error %v; want %s", got, err, want)
			}
		}
	}
	if err := master.Restart(t.Context()); err != nil {
		t.Fatal(err)
	}
}
