//go:build unix

package servers

import (
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
)

func TestRedisCluster_AReplicaTakesItsMastersPlaceWithItsData(t *testing.T) {
	t.Parallel()
	cluster, err := StartRedisCluster(t.Context(), RedisConfig{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := cluster.Stop(); err != nil {
			t.Error(err)
		}
	})
	options := &redis.ClusterOptions{Password: cluster.Masters[0].password, ClusterStateReloadInterval: time.Second}
	for _, r := range cluster.all() {
		o, err := redis.ParseURL(r.URL())
		if err != nil {
			t.Fatal(err)
		}
		options.Addrs = append(options.Addrs, o.Addr)
	}
	client := redis.NewClusterClient(options)
	defer client.Close()
	if err := client.Set(t.Context(), "key", "value", 0).Err(); err != nil {
		t.Fatal(err)
	}
	of, err := cluster.Of(t.Context(), "key")
	if err != nil {
		t.Fatal(err)
	}
	master := redisClient(t, cluster.Masters[of].URL())
	if n, err := master.Wait(t.Context(), 1, 10*time.Second).Result(); n != 1 || err != nil {
		t.Fatalf("%d replicas have it, error %v", n, err)
	}
	cluster.Masters[of].Kill()
	for giveUp := time.Now().Add(time.Minute); client.Set(t.Context(), "key", "another", 0).Err() != nil; time.Sleep(20 * time.Millisecond) {
		if time.Now().After(giveUp) {
			t.Fatal("no replica takes the master's place")
		}
	}
	if err := cluster.Masters[of].Restart(t.Context()); err != nil {
		t.Fatal(err)
	}
}
