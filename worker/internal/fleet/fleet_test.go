package fleet

import (
	"context"
	"log/slog"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/hibiken/asynq"
	"github.com/redis/go-redis/v9"

	"github.com/carpool-go/carpool/admin"
	"github.com/carpool-go/carpool/dbpool"
	"github.com/carpool-go/carpool/internal/asynqwire"
	"github.com/carpool-go/carpool/internal/instance"
	"github.com/carpool-go/carpool/internal/testservers"
	"github.com/carpool-go/carpool/tasks"
	"github.com/carpool-go/carpool/tasks/maintenance"
	"github.com/carpool-go/carpool/worker/internal/workertest"
)

// newFleet is an instance with a snapshot whose numbers can be told from each other.
func newFleet(rdb redis.UniversalClient, name string, log slog.Handler) *Fleet {
	return New(Config{
		Redis: rdb,
		Self: admin.Instance{
			Name: name, Version: "1.2.3", Host: "host", PID: os.Getpid(), Started: time.Unix(1_800_000_000, 0).UTC(),
			Queues: map[string]int{"critical": 6, "default": 3}, OwnQueue: instance.Queue(name),
			Concurrency: 10,
		},
		Running: func() int { return 7 },
		Pool: func() dbpool.Stats {
			return dbpool.Stats{PoolSize: 5, CheckedIn: 1, CheckedOut: 6, Overflow: 2, Invalid: 3, Waiting: 4}
		},
		DatabaseAway: func() bool { return false },
		Blocked:      func() string { return "" },
		Log:          slog.New(log),
	})
}

// startFleet starts an instance that is stopped, at the latest, when the test ends.
func startFleet(t *testing.T, f *Fleet) *Fleet {
	t.Helper()
	t.Cleanup(f.Stop)
	if err := f.Start(); err != nil {
		t.Fatal(err)
	}
	return f
}

// redisKeys are those that begin with the prefix.
func redisKeys(t *testing.T, rdb redis.UniversalClient, prefix string) []string {
	t.Helper()
	all, err := rdb.Keys(t.Context(), "*").Result()
	if err != nil {
		t.Fatal(err)
	}
	found := []string{}
	for _, key := range all {
		if strings.HasPrefix(key, prefix) {
			found = append(found, key)
		}
	}
	slices.Sort(found)
	return found
}

func isListed(t *testing.T, rdb redis.UniversalClient, queue string) bool {
	t.Helper()
	is, err := rdb.SIsMember(t.Context(), "asynq:queues", queue).Result()
	if err != nil {
		t.Fatal(err)
	}
	return is
}

// readStatus reads what operators see of the fleet.
func readStatus(t *testing.T, rdb redis.UniversalClient) *admin.Status {
	t.Helper()
	status, err := admin.New(rdb, nil).Status(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return status
}

// fleetShown returns the names of the instances in the status.
func fleetShown(t *testing.T, rdb redis.UniversalClient) (alive, missing []string) {
	t.Helper()
	status := readStatus(t, rdb)
	for _, i := range status.Instances {
		alive = append(alive, i.Name)
	}
	for _, m := range status.Missing {
		missing = append(missing, m.Name)
	}
	return alive, missing
}

func TestFleet_ItsSnapshotIsThereFromStartToStop(t *testing.T) {
	t.Parallel()
	rdb := workertest.OpenRedis(t, testservers.Redis(t))
	began := time.Now().Add(-time.Millisecond)
	f := newFleet(rdb, "a-00000001", slog.DiscardHandler)
	f.cfg.DatabaseAway = func() bool { return true }
	startFleet(t, f)

	status := readStatus(t, rdb)
	if len(status.Instances) != 1 || len(status.Missing) != 0 {
		t.Fatalf("%d instances, %d missing", len(status.Instances), len(status.Missing))
	}
	seen := status.Instances[0].Seen
	if seen.Before(began) || seen.After(time.Now()) {
		t.Errorf("the snapshot is of %s", seen)
	}
	want := f.cfg.Self
	want.Running, want.DatabaseAway, want.Seen = 7, true, seen
	want.Pool = admin.InstancePool{PoolSize: 5, CheckedIn: 1, CheckedOut: 6, Overflow: 2, Invalid: 3, Waiting: 4}
	if diff := cmp.Diff(want, status.Instances[0]); diff != "" {
		t.Errorf("snapshot (-want +got):\n%s", diff)
	}
	if ttl := rdb.PTTL(t.Context(), instance.SnapshotKey(f.cfg.Self.Name)).Val(); ttl <= 0 || ttl > snapshotTTL {
		t.Errorf("it is there for another %s", ttl)
	}

	workertest.Eventually(t, "the snapshot is written again by itself", func() bool {
		instances := readStatus(t, rdb).Instances
		return len(instances) == 1 && instances[0].Seen.After(seen)
	})
	f.Stop()
	f.Heartbeat(t.Context()) // a job that ended late
	if left := redisKeys(t, rdb, ""); len(left) > 0 {
		t.Errorf("after stop there are %q", left)
	}
}

func TestFleet_HeartbeatShowsTheNumbersOfThatMoment(t *testing.T) {
	t.Parallel()
	rdb := workertest.OpenRedis(t, testservers.Redis(t))
	f := newFleet(rdb, "a-00000001", slog.DiscardHandler)
	var running atomic.Int64
	f.cfg.Running = func() int { return int(running.Load()) }
	startFleet(t, f)
	for _, n := range []int{3, 0, 10} {
		running.Store(int64(n))
		f.Heartbeat(t.Context())
		instances := readStatus(t, rdb).Instances
		if len(instances) != 1 || instances[0].Running != n {
			t.Errorf("%+v; want %d running", instances, n)
		}
	}
}

func TestFleet_StopLeavesNothingOfTheQueueBehind(t *testing.T) {
	t.Parallel()
	b := workertest.Setup(t)
	rdb := workertest.OpenRedis(t, b.RedisURL)
	f := startFleet(t, newFleet(rdb, "a-00000001", slog.DiscardHandler))
	server := asynq.NewServerFromRedisClient(rdb, asynq.Config{
		Queues: map[string]int{f.cfg.Self.OwnQueue: 1}, LogLevel: asynq.FatalLevel, TaskCheckInterval: 10 * time.Millisecond,
	})
	if err := server.Start(asynq.HandlerFunc(func(ctx context.Context, _ *asynq.Task) error {
		if id, _ := asynq.GetTaskID(ctx); id == "fails" {
			return asynq.SkipRetry
		}
		return nil
	})); err != nil {
		t.Fatal(err)
	}
	for _, id := range []string{"a", "b", "fails"} {
		opts := tasks.EnqueueOptions{Queue: f.cfg.Self.OwnQueue, ID: id, Retention: time.Hour}
		if _, err := b.Client.Enqueue(t.Context(), maintenance.PoolValidate{}, &opts); err != nil {
			t.Fatal(err)
		}
	}
	workertest.Eventually(t, "the jobs have ended", func() bool {
		info, err := b.Inspector.GetQueueInfo(f.cfg.Self.OwnQueue)
		return err == nil && info.Completed == 2 && info.Archived == 1
	})
	server.Shutdown()
	// One that nobody runs any more, and one that is due later.
	for i, at := range []time.Time{{}, time.Now().Add(time.Hour)} {
		opts := tasks.EnqueueOptions{Queue: f.cfg.Self.OwnQueue, ID: strconv.Itoa(i), RunAt: at}
		if _, err := b.Client.Enqueue(t.Context(), maintenance.PoolValidate{}, &opts); err != nil {
			t.Fatal(err)
		}
	}
	f.Stop()
	if left := append(redisKeys(t, rdb, "asynq:{"), redisKeys(t, rdb, "carpool:instance")...); len(left) > 0 || isListed(t, rdb, f.cfg.Self.OwnQueue) {
		t.Errorf("after stop there are %q; the queue is listed: %t", left, isListed(t, rdb, f.cfg.Self.OwnQueue))
	}
}

func TestFleet_AnInstanceThatComesBackAtTheLastMomentKeepsItsQueue(t *testing.T) {
	t.Parallel()
	rdb := workertest.OpenRedis(t, testservers.Redis(t))
	a := startFleet(t, newFleet(rdb, "a-00000001", slog.DiscardHandler))
	b := startFleet(t, newFleet(rdb, "b-00000002", slog.DiscardHandler))
	// b has found a missing twice, and a writes its snapshot before b removes it.
	removed, err := b.remove(t.Context(), a.cfg.Self.Name)
	if removed || err != nil || !isListed(t, rdb, a.cfg.Self.OwnQueue) {
		t.Errorf("removed %t, error %v", removed, err)
	}
}

func TestFleet_LeavesQueuesAloneThatAreNotOfADeadInstance(t *testing.T) {
	t.Parallel()
	b := workertest.Setup(t)
	rdb := workertest.OpenRedis(t, b.RedisURL)
	f := startFleet(t, newFleet(rdb, "a-00000001", slog.DiscardHandler))
	// The queue of an instance that writes no snapshot, but has a server.
	server := asynq.NewServerFromRedisClient(rdb, asynq.Config{Queues: map[string]int{"instance-old-00000009": 1}, LogLevel: asynq.FatalLevel})
	if err := server.Start(asynq.HandlerFunc(func(context.Context, *asynq.Task) error { return nil })); err != nil {
		t.Fatal(err)
	}
	defer server.Shutdown()
	workertest.Eventually(t, "asynq shows the server", func() bool {
		served, err := asynqwire.ServedQueues(rdb)
		return err == nil && slices.Contains(served, "instance-old-00000009")
	})
	later := time.Now().Add(time.Hour)
	for _, queue := range []string{"default", "instance-billing", "instance-old-00000009"} {
		if _, err := b.Client.Enqueue(t.Context(), maintenance.PoolValidate{}, &tasks.EnqueueOptions{Queue: queue, RunAt: later}); err != nil {
			t.Fatal(err)
		}
	}
	for i := range 3 {
		if err := f.sweepDead(t.Context(), time.Now().Add(time.Duration(i)*missingFor)); err != nil {
			t.Fatal(err)
		}
	}
	for _, queue := range []string{"default", "instance-billing", "instance-old-00000009"} {
		if info, err := b.Inspector.GetQueueInfo(queue); err != nil || info.Scheduled != 1 {
			t.Errorf("%s: %+v, error %v", queue, info, err)
		}
	}
}

// As after a FLUSHALL, or asynq's own command that removes a queue.
func TestFleet_AQueueWithJobsIsListedAgain(t *testing.T) {
	t.Parallel()
	rdb := workertest.OpenRedis(t, testservers.Redis(t))
	client := tasks.NewClient(rdb)
	f := startFleet(t, newFleet(rdb, "a-00000001", slog.DiscardHandler))
	enqueue := func() {
		if _, err := client.Enqueue(t.Context(), maintenance.PoolValidate{}, &tasks.EnqueueOptions{Queue: "critical"}); err != nil {
			t.Fatal(err)
		}
	}
	enqueue()
	if err := rdb.FlushDB(t.Context()).Err(); err != nil {
		t.Fatal(err)
	}
	enqueue() // this client has listed the queue, and doesn't do it twice
	if isListed(t, rdb, "critical") {
		t.Fatal("asynq lists it again by itself")
	}
	f.Heartbeat(t.Context())
	if !isListed(t, rdb, "critical") || !isListed(t, rdb, f.cfg.Self.OwnQueue) {
		t.Error("it is not listed again")
	}
	if isListed(t, rdb, "default") {
		t.Error("a queue that has never had a job is listed")
	}
}

func TestFleet_GoesOnWithoutRedisAndSaysSoOnce(t *testing.T) {
	t.Parallel()
	url := testservers.Redis(t)
	rdb := workertest.OpenRedis(t, url)
	proxied, proxy := testservers.ThroughProxy(t, url)
	proxy.Refuse()
	options, err := redis.ParseURL(proxied)
	if err != nil {
		t.Fatal(err)
	}
	options.MaxRetries = -1
	client := redis.NewClient(options)
	defer client.Close()

	log := workertest.NewLog()
	f := startFleet(t, newFleet(client, "a-00000001", slog.NewTextHandler(log, nil)))
	for range 3 {
		f.Heartbeat(t.Context())
	}
	if alive, missing := fleetShown(t, rdb); len(alive)+len(missing) > 0 {
		t.Errorf("alive are %q, missing %q", alive, missing)
	}
	if err := f.sweepDead(t.Context(), time.Now()); err == nil {
		t.Error("to sweep is no error without Redis")
	}
	proxy.Heal()
	workertest.Eventually(t, "it is in the fleet", func() bool {
		f.Heartbeat(t.Context())
		alive, _ := fleetShown(t, rdb)
		return len(alive) == 1
	})
	if text := log.String(); strings.Count(text, "could not be written") != 1 || strings.Count(text, "can be written again") != 1 {
		t.Errorf("the log:\n%s", text)
	}
	proxy.Refuse()
	proxy.Reset()
	f.Stop()
	if !strings.Contains(log.String(), "another instance will") {
		t.Errorf("the log:\n%s", log)
	}
}

func TestFleet_StopMayBeCalledTwiceAndWithoutStart(t *testing.T) {
	t.Parallel()
	rdb := workertest.OpenRedis(t, testservers.Redis(t))
	log := workertest.NewLog()
	never := newFleet(rdb, "a-00000001", slog.NewTextHandler(log, nil))
	never.Heartbeat(t.Context()) // of a worker whose start has failed before
	never.Stop()
	never.Stop()
	twice := newFleet(rdb, "b-00000002", slog.NewTextHandler(log, nil))
	if err := twice.Start(); err != nil {
		t.Fatal(err)
	}
	twice.Stop()
	if err := rdb.Set(t.Context(), instance.SnapshotKey(twice.cfg.Self.Name), "{}", 0).Err(); err != nil {
		t.Fatal(err)
	}
	twice.Stop()
	if left := redisKeys(t, rdb, ""); !slices.Equal(left, []string{instance.SnapshotKey(twice.cfg.Self.Name)}) {
		t.Errorf("there are %q; want what was written after the first stop, as the second does nothing", left)
	}
	if log.String() != "" {
		t.Errorf("the log:\n%s", log)
	}
}

func TestStatus_TheOldestInstanceComesFirst(t *testing.T) {
	t.Parallel()
	rdb := workertest.OpenRedis(t, testservers.Redis(t))
	for name, hour := range map[string]int{"b-00000001": 1, "a-00000002": 3, "d-00000003": 2, "c-00000004": 2} {
		f := newFleet(rdb, name, slog.DiscardHandler)
		f.cfg.Self.Started = f.cfg.Self.Started.Add(time.Duration(hour) * time.Hour)
		startFleet(t, f)
	}
	alive, _ := fleetShown(t, rdb)
	if diff := cmp.Diff([]string{"b-00000001", "c-00000004", "d-00000003", "a-00000002"}, alive); diff != "" {
		t.Errorf("instances (-want +got):\n%s", diff)
	}
}

func TestRun_IsInTheFleetUntilItStops(t *testing.T) {
	t.Parallel()
	b := workertest.Setup(t)
	rdb := workertest.OpenRedis(t, b.RedisURL)
	p := b.Start(t, "WORKER_CONCURRENCY=3", "WORKER_QUEUES=default=2,low", "DB_POOL_SIZE=4", "DB_POOL_VALIDATE_EVERY=1s")
	instances := readStatus(t, rdb).Instances
	if len(instances) != 1 {
		t.Fatalf("instances %+v", instances)
	}
	i := instances[0]
	if i.PID != p.Cmd.Process.Pid || i.Concurrency != 3 || i.Pool.PoolSize != 4 || i.DatabaseAway ||
		!cmp.Equal(i.Queues, map[string]int{"default": 2, "low": 1}) || i.OwnQueue != instance.Queue(i.Name) || !slices.Contains(i.Kinds, "csv:import") || !slices.Contains(i.Kinds, "pool:validate") {
		t.Errorf("snapshot: %+v", i)
	}
	workertest.Eventually(t, "its pool is validated", func() bool {
		info, err := b.Inspector.GetQueueInfo(i.OwnQueue)
		return err == nil && info.Completed > 0
	})
	stdout, stderr, code := workertest.Run(t, b.Worker(t, nil, "status"))
	if code != 0 || stderr != "" || !strings.Contains(stdout, "\n"+i.Name+"  ") || !strings.Contains(stdout, "\noutbox: 0 waiting; 0 set aside\n") {
		t.Errorf("worker status: exit code %d\n%s%s", code, stdout, stderr)
	}
	p.Signal(t, syscall.SIGTERM)
	if code := p.Exit(t); code != 0 {
		t.Errorf("exit code %d", code)
	}
	if left := append(redisKeys(t, rdb, "asynq:{instance"), redisKeys(t, rdb, "carpool:instance")...); len(left) > 0 || isListed(t, rdb, i.OwnQueue) {
		t.Errorf("it has left %q; its queue is listed: %t", left, isListed(t, rdb, i.OwnQueue))
	}
}
