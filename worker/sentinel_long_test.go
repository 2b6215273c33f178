//go:build long && unix

package worker_test

import (
	"context"
	"io"
	"net/http"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/hibiken/asynq"
	"github.com/redis/go-redis/v9"

	"github.com/carpool-go/carpool/internal/servers"
	"github.com/carpool-go/carpool/worker/internal/workertest"
)

// The master is killed while two workers and four producers are at work. Replication is
// asynchronous, so a job that a client has enqueued may be lost to Redis itself; none may be
// lost that the replica has got. Afterwards every command that needs Redis is tried.
func TestLong_TheMasterIsKilledAndSentinelsPutTheReplicaInItsPlace(t *testing.T) {
	trio, err := servers.StartRedisTrio(t.Context(), servers.RedisConfig{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := trio.Stop(); err != nil {
			t.Error(err)
		}
	})
	l := installMigrated(t, trio.URL())
	l.exec(t, "CREATE TABLE effects (job_id text, n int, at timestamptz DEFAULT clock_timestamp())")
	for range 2 {
		l.start(t, `"msg":"worker started"`, "run")
	}
	rdb := workertest.OpenRedis(t, trio.URL())
	l.losesNothing(t, rdb, trio.Servers[1].URL(), trio.Servers[0].Kill)
	l.everyCommandOfRedis(t, rdb)
}

// everyCommandOfRedis runs the commands that need Redis, one after the other.
func (l *installation) everyCommandOfRedis(t *testing.T, rdb redis.UniversalClient) {
	t.Helper()
	for _, id := range []string{"spoilt-1", "spoilt-2"} {
		task := asynq.NewTask("chaos:effect", []byte(`{"what": 1}`))
		if _, err := asynq.NewClientFromRedisClient(rdb).EnqueueContext(t.Context(), task, asynq.TaskID(id)); err != nil {
			t.Fatal(err)
		}
	}
	inspect := asynq.NewInspectorFromRedisClient(rdb)
	longest(t, time.Minute, "the spoilt jobs are archived", func(context.Context) bool {
		q, err := inspect.GetQueueInfo("default")
		return err == nil && q.Archived == 2
	})
	l.runs(t, "-", "enqueue", "chaos:effect", `{"n": -1}`, "--wait")
	later := l.runs(t, "-", "enqueue", "chaos:effect", `{"n": -2}`, "--in=1h", "--unique=later")
	for _, c := range []struct {
		wants string
		args  []string
	}{
		{"default", []string{"status"}},
		{`"default"`, []string{"status", "--json"}},
		{"", []string{"cancel", later}},
		{"spoilt-1", []string{"archive", "ls"}},
		{"spoilt-1", []string{"archive", "show", "spoilt-1"}},
		{"", []string{"archive", "retry", "spoilt-1"}},
		{"", []string{"archive", "delete", "spoilt-2"}},
		{"", []string{"outbox", "ls"}},
		{"", []string{"pause", "low"}},
		{"", []string{"resume", "low"}},
		{"", []string{"schedule", "add", "hourly", "@hourly", "chaos:effect", `{"n": -3}`}},
		{"hourly", []string{"schedule", "ls"}},
		{"-", []string{"schedule", "run-now", "hourly"}},
		{"", []string{"schedule", "rm", "hourly"}},
		{"", []string{"run", "--burst"}},
	} {
		l.runs(t, c.wants, c.args...)
	}
	if n := l.count(t, "SELECT count(*) FROM effects WHERE n < 0"); n != 2 {
		t.Errorf("%d effects of the commands enqueue and schedule run-now, want 2", n)
	}

	monitor := l.start(t, "monitor started", "monitor", "--addr=127.0.0.1:0")
	at := regexp.MustCompile(`http://127\.0\.0\.1:\d+`).FindString(monitor.log.String())
	resp, err := http.Get(at + "/api/queues")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if body, err := io.ReadAll(resp.Body); err != nil || resp.StatusCode != http.StatusOK || !strings.Contains(string(body), `"default"`) {
		t.Errorf("the monitor answers %d, %s, error %v", resp.StatusCode, body, err)
	}
}
