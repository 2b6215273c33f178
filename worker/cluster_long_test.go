//go:build long && unix

package worker_test

import (
	"testing"

	"github.com/carpool-go/carpool/internal/asynqwire"
	"github.com/carpool-go/carpool/internal/servers"
	"github.com/carpool-go/carpool/worker/internal/workertest"
)

// The master of a Cluster that has the queue is killed while two workers and four producers
// are at work.
func TestLong_AMasterOfAClusterIsKilled(t *testing.T) {
	cluster, err := servers.StartRedisCluster(t.Context(), servers.RedisConfig{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := cluster.Stop(); err != nil {
			t.Error(err)
		}
	})
	l := installMigrated(t, cluster.URL())
	l.exec(t, "CREATE TABLE effects (job_id text, n int, at timestamptz DEFAULT clock_timestamp())")
	for range 2 {
		l.start(t, `"msg":"worker started"`, "run")
	}
	of, err := cluster.Of(t.Context(), asynqwire.Pending("default"))
	if err != nil {
		t.Fatal(err)
	}
	rdb := workertest.OpenRedis(t, cluster.URL())
	l.losesNothing(t, rdb, cluster.Replicas[of].URL(), cluster.Masters[of].Kill)
	l.everyCommandOfRedis(t, rdb)
}
