package doctor

import (
	"testing"
	"time"

	"github.com/hibiken/asynq"

	"github.com/carpool-go/carpool/internal/asynqwire"
	"github.com/carpool-go/carpool/internal/instance"
	"github.com/carpool-go/carpool/internal/testservers"
	"github.com/carpool-go/carpool/tasks"
	"github.com/carpool-go/carpool/tasks/maintenance"
	"github.com/carpool-go/carpool/worker/internal/fleet"
	"github.com/carpool-go/carpool/worker/internal/workertest"

	"github.com/redis/go-redis/v9"
)

// enqueue puts a job on a queue as another program does, with a payload that is secret.
func enqueue(t *testing.T, rdb redis.UniversalClient, kind, queue string, opts ...asynq.Option) {
	t.Helper()
	client := asynq.NewClientFromRedisClient(rdb)
	if _, err := client.Enqueue(asynq.NewTask(kind, []byte(`{"x": "hush"}`), append(opts, asynq.Queue(queue))...)); err != nil {
		t.Fatal(err)
	}
}

func TestExamine_FindsJobsThatNobodyRuns(t *testing.T) {
	t.Parallel()
	b := workertest.Setup(t)
	rdb := b.Redis(t)
	c := config(t, b.RedisURL, b.DatabaseURL)
	requireOK(t, examine(t, c), "queues", "kinds", "schedules")

	enqueue(t, rdb, "carpool:prune", "low")
	enqueue(t, rdb, "carpool:prune", "nowhere", asynq.ProcessIn(time.Hour))
	enqueue(t, rdb, "shop:oder", "default")
	enqueue(t, rdb, "shop:refund", "default", asynq.ProcessIn(time.Hour))
	enqueue(t, rdb, "shop:order", "default")
	b.Exec(t, `INSERT INTO carpool.outbox (id, kind, payload, problem) VALUES (gen_random_uuid(), 'shop:gone', '{"x": "hush"}', NULL),
		(gen_random_uuid(), 'shop:order', '{}', NULL), (gen_random_uuid(), 'rows:prune', '{}', 'a problem')`)
	b.Exec(t, `INSERT INTO carpool.schedules (name, cron, kind) VALUES ('nightly', '@daily', 'shop:report'), ('hourly', '@hourly', 'carpool:prune')`)
	b.Exec(t, `INSERT INTO carpool.schedules (name, cron, kind) VALUES ('never', 'sometimes', 'carpool:prune')`)

	findings := examine(t, c)
	require(t, findings, "workers", Warning, "none is up", "start one")
	require(t, findings, "queues", Warning, "1 job is on the queue low, which no worker that is up pulls from", "start a worker")
	require(t, findings, "queues", Warning, "1 job is on the queue nowhere, which neither this worker", "add it to WORKER_QUEUES")

	startInstance(t, rdb, func(*fleet.Config) {}) // it knows shop:order
	const unknown = "deploy the worker that has the kind"
	findings = examine(t, c)
	requireOK(t, findings, "workers")
	require(t, findings, "queues", Warning, "1 job is on the queue nowhere", "")
	require(t, findings, "kinds", Warning, "1 job is in the outbox of the kind shop:gone", unknown)
	require(t, findings, "kinds", Warning, "1 job is set aside in the outbox", "outbox ls")
	require(t, findings, "kinds", Warning, "1 job is on the queue default of the kind shop:oder", unknown)
	require(t, findings, "kinds", Warning, "1 job is on the queue default of the kind shop:refund", unknown)
	require(t, findings, "schedules", Warning, "nightly is of the kind shop:report", unknown)
	require(t, findings, "schedules", Warning, "never is not run: ", "schedule ls")
	for check, want := range map[string]int{"queues": 1, "kinds": 4, "schedules": 2} {
		n := 0
		for _, f := range findings {
			if f.Check == check {
				n++
			}
		}
		if n != want {
			t.Errorf("%d findings of %s, want %d", n, check, want)
		}
	}
}

func TestExamine_FindsQueuesThatNeedSomebody(t *testing.T) {
	t.Parallel()
	b := workertest.Setup(t)
	rdb := b.Redis(t)
	startInstance(t, rdb, func(*fleet.Config) {})
	c := redisOnly(t, b.RedisURL)

	enqueue(t, rdb, "carpool:prune", "low")
	do(t, rdb, "SET "+asynqwire.Paused("low")+" 1")
	require(t, examine(t, c), "queues", Warning, "1 job is on the queue low, which is paused", "resume")
	do(t, rdb, "DEL "+asynqwire.Paused("low"))
	requireOK(t, examine(t, c), "queues")

	ids, err := rdb.LRange(t.Context(), asynqwire.Pending("low"), 0, -1).Result()
	if err != nil || len(ids) != 1 {
		t.Fatal(ids, err)
	}
	do(t, rdb, "DEL "+asynqwire.Task("low", ids[0]))
	require(t, examine(t, c), "queues", Warning, "jobs of the queue low have lost their data", "status")
	do(t, rdb, "SET "+asynqwire.Archived("low")+" x")
	require(t, examine(t, c), "queues", Failure, "the key asynq:{low}:archived in Redis is no list of jobs", "delete it")
}

// onReports is a kind that goes to a queue of its own.
type onReports struct{}

func (onReports) Kind() string           { return "shop:report" }
func (onReports) Options() tasks.Options { return tasks.Options{Queue: "reports"} }
func (onReports) Validate() error        { return nil }

type reports struct{}

func (reports) Register(s *tasks.Set) { tasks.Register[onReports, any](s, nil) }

func TestExamine_FindsAKindWhoseQueueNobodyPullsFrom(t *testing.T) {
	t.Parallel()
	c := redisOnly(t, testservers.Redis(t))
	set, err := tasks.NewSet(&maintenance.Tasks{}, reports{})
	if err != nil {
		t.Fatal(err)
	}
	c.Tasks = set
	require(t, examine(t, c), "queues", Warning, "pulls from the queue reports, which is that of shop:report", "add it to WORKER_QUEUES")
	startInstance(t, workertest.OpenRedis(t, c.RedisURL), func(cfg *fleet.Config) { cfg.Self.Queues = map[string]int{"reports": 1} })
	requireOK(t, examine(t, c), "queues")
}

func TestExamine_FindsWorkersThatNeedSomebody(t *testing.T) {
	t.Parallel()
	b := workertest.Setup(t)
	rdb := b.Redis(t)
	c := config(t, b.RedisURL, b.DatabaseURL)
	startInstance(t, rdb, func(cfg *fleet.Config) { cfg.Blocked = func() string { return "permission denied" } })
	startInstance(t, rdb, func(cfg *fleet.Config) { cfg.DatabaseAway = func() bool { return true } })
	startInstance(t, rdb, func(cfg *fleet.Config) { cfg.Self.Kinds = nil })
	if err := rdb.ZAdd(t.Context(), instance.Names, redis.Z{Score: float64(time.Now().Unix()) - 40, Member: "dead-00000003"}).Err(); err != nil {
		t.Fatal(err)
	}
	b.Exec(t, "UPDATE carpool.settings SET value = 4096 WHERE name = 'max_payload'")
	findings := examine(t, c)
	require(t, findings, "workers", Failure, "transactional jobs can't begin: permission denied", "")
	require(t, findings, "workers", Warning, "jobs wait for the database", "")
	require(t, findings, "workers", Warning, "dead-00000003 gives no sign of life", "log")
	require(t, findings, "kinds", OK, "not judged: a worker of an older version is up", "")
	require(t, findings, "payload limit", Warning, "MAX_PAYLOAD is 1048576 bytes here, and 4096 in the database", "same MAX_PAYLOAD")
	require(t, findings, "postgres connections", OK, "3 instances of 11", "")
}
