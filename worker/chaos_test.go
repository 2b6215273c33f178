//go:build unix

package worker_test

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/hibiken/asynq"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/carpool-go/carpool/internal/schema"
	"github.com/carpool-go/carpool/internal/servers"
	"github.com/carpool-go/carpool/internal/testservers"
	"github.com/carpool-go/carpool/tasks"
	"github.com/carpool-go/carpool/worker/internal/workertest"
)

var (
	chaosJobs = flag.Int("chaos.jobs", 600, "jobs, half of them enqueued in SQL transactions of which a third are rolled back")
	chaosTime = flag.Duration("chaos.time", 10*time.Second, "the time over which jobs are enqueued, while things break")
	chaosMode = flag.String("chaos.mode", protected, "protected, unprotected (the handler's own transaction), plain (asynq and pgx alone), celery (with SQLAlchemy), or all")
	chaosSeed = flag.Uint64("chaos.seed", 0, "the same faults as in another run; 0 draws one")
	chaosLong = flag.Bool("chaos.long", false, "faults last longer, and some outlast a job's lease")
)

// With -artifacts the workers' logs are kept, and a list of the faults.
func TestChaos_EveryEffectHappensExactlyOnce(t *testing.T) {
	t.Parallel()
	modes := []string{*chaosMode}
	if *chaosMode == "all" {
		modes = []string{protected, unprotected, plain, celery}
		if err := servers.FindCelery(); err != nil {
			modes = modes[:3]
			fmt.Println("without celery:", err)
		}
	}
	seed := *chaosSeed
	if seed == 0 {
		seed = rand.Uint64()
	}
	var reports []*chaosReport
	for _, mode := range modes {
		t.Run(mode, func(t *testing.T) {
			t.Logf("again with: -chaos.seed=%d -chaos.mode=%s -chaos.jobs=%d -chaos.time=%s -chaos.long=%t", seed, mode, *chaosJobs, *chaosTime, *chaosLong)
			c := newChaos(t, mode, seed)
			r := c.run(c.breakThings)
			reports = append(reports, r)
			fmt.Print(chaosTable(r))
			for _, end := range c.endings {
				t.Log(end)
			}
			switch {
			case mode == protected && !r.right():
				t.Error("the promise is broken")
			case mode != protected && mode != celery && r.lost == 0 && r.doubled == 0:
				t.Error("nothing was lost or doubled without protection either, so the run proves nothing")
			}
			if t.Failed() {
				c.explain(r)
			}
		})
	}
	if len(reports) > 1 {
		fmt.Print(chaosTable(reports...))
	}
}

// chaosPassword is that of the users of docs/security.md in the chaos test's Redis.
const chaosPassword = "hush"

// chaos is one run.
type chaos struct {
	t        *testing.T
	mode     string
	seed     uint64
	jobs     int           // see chaosJobs
	time     time.Duration // see chaosTime
	postgres *servers.Postgres
	redis    *servers.Redis
	db       *pgxpool.Pool // past all proxies, as the inspector is
	// cable returns the URL by which a machine reaches Postgres, and the proxy on the way.
	cable   func() (string, *testservers.Proxy)
	env     []string // further variables of the workers
	inspect *asynq.Inspector
	celery  *celeryMode // nil in the other modes
	workers []*chaosNode
	logs    string // the folder of the workers' logs

	producers *chaosNode // their machine; it runs no worker
	producer  struct {   // what they work with
		db     *pgxpool.Pool
		client *tasks.Client
		asynq  *asynq.Client
	}
	rolledBack atomic.Int64
	enqueued   sync.Map // from numbers to chaosJob

	over       atomic.Bool // workers that end are not started again
	supervised sync.WaitGroup
	mending    sync.WaitGroup
	mu         sync.Mutex // guards what follows
	faults     map[string]int
	timeline   []string // of faults
	endings    []string // of workers that ended by themselves
	crashes    []string // panics and data races among those
}

// chaosJob is a job that was enqueued for certain.
type chaosJob struct {
	id string
	at time.Time
}

// chaosNode is a machine with cables of its own to the servers.
type chaosNode struct {
	name            string
	postgres, redis *testservers.Proxy
	env             []string
	mending         atomic.Bool // something is broken that will be mended

	mu      sync.Mutex
	process *chaosProcess
	starts  int
}

// chaosProcess is one life of a worker.
type chaosProcess struct {
	cmd    *exec.Cmd
	log    string
	killed atomic.Bool // by the test
	done   chan struct{}
}

func newChaos(t *testing.T, mode string, seed uint64) *chaos {
	t.Helper()
	c := &chaos{t: t, mode: mode, seed: seed, jobs: *chaosJobs, time: *chaosTime}
	c.startServers(servers.PostgresConfig{})
	c.startWorkers()
	return c
}

// startServers starts the servers and makes the tables.
func (c *chaos) startServers(cfg servers.PostgresConfig) {
	t := c.t
	t.Helper()
	c.faults, c.logs = make(map[string]int), t.ArtifactDir()
	var err error
	if c.postgres, err = servers.StartPostgres(t.Context(), cfg); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.postgres.Stop() })
	c.cable = func() (string, *testservers.Proxy) { return testservers.ThroughProxy(t, c.postgres.URL()) }
	var users []string
	for name, rules := range workertest.ACLUsers(t, "../docs/security.md") {
		users = append(users, name+" on >"+chaosPassword+" "+rules)
	}
	if c.redis, err = servers.StartRedis(t.Context(), servers.RedisConfig{AppendFsync: "always", Users: users}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.redis.Stop() })
	if err := schema.Migrate(t.Context(), c.postgres.URL(), workertest.Discard()); err != nil {
		t.Fatal(err)
	}
	c.lookInto(c.postgres.URL())
	for _, sql := range []string{
		// Nothing is unique: doubles must show.
		"CREATE TABLE effects (job_id text, n int, at timestamptz DEFAULT clock_timestamp())",
		// Of the transactions that enqueue, to find out what became of a commit.
		"CREATE TABLE ledger (n int PRIMARY KEY)",
	} {
		if _, err := c.db.Exec(t.Context(), sql); err != nil {
			t.Fatal(err)
		}
	}
}

// lookInto has the effects looked for in the database at url.
func (c *chaos) lookInto(url string) {
	c.t.Helper()
	var err error
	if c.db, err = pgxpool.New(c.t.Context(), url); err != nil {
		c.t.Fatal(err)
	}
	c.t.Cleanup(c.db.Close)
}

// startWorkers starts three workers and connects the producers.
func (c *chaos) startWorkers() {
	t := c.t
	t.Helper()
	c.inspect = asynq.NewInspectorFromRedisClient(workertest.OpenRedis(t, c.redis.URL()))
	c.connectProducers()
	if c.mode == celery {
		c.celery = newCelery(c)
	}
	for i := range 3 {
		n := c.newNode(fmt.Sprint("worker-", i), "worker")
		c.workers = append(c.workers, n)
		n.mu.Lock()
		c.start(n)
		n.mu.Unlock()
	}
	t.Cleanup(func() {
		c.over.Store(true)
		for _, n := range c.workers {
			c.kill(n)
		}
		c.supervised.Wait()
	})
	if c.carpools() { // the first worker writes down the kinds
		workertest.Eventually(t, "a worker has started", func() bool {
			var there bool
			err := c.db.QueryRow(t.Context(), "SELECT EXISTS (SELECT FROM carpool.kinds WHERE kind = 'chaos:effect')").Scan(&there)
			return err == nil && there
		})
	}
}

// carpools reports whether carpool runs the jobs.
func (c *chaos) carpools() bool { return c.mode == protected || c.mode == unprotected }

// newNode lays the cables of a machine. Where carpool runs the jobs, it is that user of
// docs/security.md in Redis: what is sent on a fault's path alone needs its right too.
func (c *chaos) newNode(name, user string) *chaosNode {
	c.t.Helper()
	n := &chaosNode{name: name}
	var databaseURL, redisURL string
	databaseURL, n.postgres = c.cable()
	toRedis := testservers.ParseURL(c.t, c.redis.URL())
	if c.carpools() {
		toRedis.User = url.UserPassword(user, chaosPassword)
	}
	redisURL, n.redis = testservers.ThroughProxy(c.t, toRedis.String())
	n.env = append([]string{
		"DATABASE_URL=" + databaseURL, "REDIS_URL=" + redisURL, chaosEnv + "=" + c.mode,
		"LOG_LEVEL=debug", "LOG_FORMAT=json", "PATH=" + os.Getenv("PATH"), "GORACE=halt_on_error=1",
	}, c.env...)
	return n
}

func (c *chaos) connectProducers() {
	c.t.Helper()
	n := c.newNode("producers", "enqueue_and_wait") // its jobs have ids of the test's own
	c.producers = n
	cfg, err := pgxpool.ParseConfig(n.env[0][len("DATABASE_URL="):])
	if err != nil {
		c.t.Fatal(err)
	}
	cfg.MaxConns = 2 * chaosProducers // one to look what became of the other
	if c.producer.db, err = pgxpool.NewWithConfig(c.t.Context(), cfg); err != nil {
		c.t.Fatal(err)
	}
	c.t.Cleanup(c.producer.db.Close)
	rdb := workertest.OpenRedis(c.t, n.env[1][len("REDIS_URL="):])
	c.producer.client, c.producer.asynq = tasks.NewClient(rdb), asynq.NewClientFromRedisClient(rdb)
}

// start starts a worker, and starts it again if it ends by itself, as a platform
// does. The node's lock is held.
func (c *chaos) start(n *chaosNode) {
	if c.over.Load() {
		return
	}
	log, err := os.Create(filepath.Join(c.logs, fmt.Sprintf("%s-%s-%d.log", c.mode, n.name, n.starts)))
	if err != nil {
		c.t.Error(err)
		return
	}
	defer log.Close()
	n.starts++
	p := &chaosProcess{cmd: exec.Command(os.Args[0]), log: log.Name(), done: make(chan struct{})}
	p.cmd.Env = n.env
	if c.celery != nil {
		p.cmd = celeryWorker(n)
	}
	p.cmd.Stdout, p.cmd.Stderr = log, log
	if _, err := p.cmd.StdinPipe(); err != nil { // it ends with us
		c.t.Error(err)
		return
	}
	if err := p.cmd.Start(); err != nil {
		c.t.Error(err)
		return
	}
	n.process = p
	c.supervised.Go(func() {
		_ = p.cmd.Wait()
		close(p.done)
		if p.killed.Load() || c.over.Load() {
			return
		}
		c.endedByItself(n, p)
		time.Sleep(time.Second)
		n.mu.Lock()
		defer n.mu.Unlock()
		if n.process == p {
			c.start(n)
		}
	})
}

// kill ends a worker with SIGKILL and returns when it is dead.
func (c *chaos) kill(n *chaosNode) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.process == nil {
		return
	}
	n.process.killed.Store(true)
	n.process.signal(syscall.SIGKILL)
	<-n.process.done
}

func (c *chaos) killAndStart(n *chaosNode) {
	c.kill(n)
	n.mu.Lock()
	defer n.mu.Unlock()
	c.start(n)
}

// signal sends a worker a signal, and returns how to send the same life of it another.
func (n *chaosNode) signal(s syscall.Signal) (another func(syscall.Signal)) {
	n.mu.Lock()
	defer n.mu.Unlock()
	p := n.process
	p.signal(s)
	return p.signal
}

// run enqueues jobs while breakThings does what it is called, waits until all is quiet,
// and reports what came of it. The context of breakThings ends when the jobs are enqueued.
func (c *chaos) run(breakThings func(context.Context)) *chaosReport {
	began := time.Now()
	ctx, cancel := context.WithCancel(c.t.Context())
	defer cancel()
	var breaking sync.WaitGroup
	breaking.Go(func() { breakThings(ctx) })
	c.produce(began)
	cancel()
	breaking.Wait()
	c.mending.Wait()
	for _, n := range append(c.workers, c.producers) {
		n.postgres.Heal()
		n.redis.Heal()
	}
	mended := time.Now()
	c.drain()
	drained := time.Now()
	r := c.report()
	if c.celery != nil {
		c.celeryLate(r)
	}
	r.drain, r.took = drained.Sub(mended), drained.Sub(began)
	return r
}

const (
	chaosProducers = 8
	// producerTry is how long a producer waits for an answer.
	producerTry = 5 * time.Second
)

// produce enqueues the jobs at an even pace; what an outage holds up is made up
// for after it.
func (c *chaos) produce(began time.Time) {
	var next atomic.Int64
	var producers sync.WaitGroup
	for range chaosProducers {
		producers.Go(func() {
			for !c.t.Failed() {
				n := int(next.Add(1))
				if n > c.jobs {
					return
				}
				time.Sleep(time.Until(began.Add(c.time * time.Duration(n) / time.Duration(c.jobs))))
				if n%2 == 0 {
					c.enqueueByClient(n)
				} else {
					c.enqueueBySQL(n, n%3 == 0)
				}
			}
		})
	}
	producers.Wait()
}

var errRolledBack = errors.New("rolled back")

// enqueueBySQL enqueues job n in a transaction of its own, or does so and rolls
// back. If the commit's answer is lost it looks what became of it, and repeats a
// transaction that is not there.
func (c *chaos) enqueueBySQL(n int, rollBack bool) {
	id := ""
	c.until(func(ctx context.Context) error {
		tx, err := c.producer.db.Begin(ctx)
		if err != nil {
			return err
		}
		defer tx.Rollback(ctx) //nolint:errcheck // it may have been committed, or be gone
		if _, err := tx.Exec(ctx, "INSERT INTO ledger (n) VALUES ($1)", n); err == nil {
			if c.carpools() {
				err = tx.QueryRow(ctx, "SELECT carpool.enqueue('chaos:effect', jsonb_build_object('n', $1::int))", n).Scan(&id)
			}
			if err != nil {
				return err
			}
			if rollBack {
				return errRolledBack
			}
			_ = tx.Commit(ctx)
		}
		return c.committed(n)
	}, errRolledBack)
	switch {
	case rollBack:
		c.rolledBack.Add(1)
	case !c.carpools():
		c.enqueueByClient(n) // as users of asynq and Celery do: after the commit
	default:
		c.enqueued.Store(n, chaosJob{id, time.Now()})
	}
}

// committed returns nil if the transaction of job n is there.
func (c *chaos) committed(n int) (err error) {
	c.until(func(ctx context.Context) error {
		var there bool
		if err := c.producer.db.QueryRow(ctx, "SELECT EXISTS (SELECT FROM ledger WHERE n = $1)", n).Scan(&there); err != nil {
			return err
		}
		if !there {
			err = errors.New("not committed")
		}
		return nil
	}, nil)
	return err
}

// enqueueByClient enqueues job n until Redis says that it has it.
func (c *chaos) enqueueByClient(n int) {
	id := fmt.Sprint("chaos-", n)
	c.until(func(ctx context.Context) error {
		if c.celery != nil {
			return c.celery.producer.enqueue(c.t.Context(), n)
		}
		if c.mode == plain {
			payload, _ := json.Marshal(chaosEffect{n})
			_, err := c.producer.asynq.EnqueueContext(ctx, asynq.NewTask("chaos:effect", payload), asynq.TaskID(id))
			return err
		}
		_, err := c.producer.client.Enqueue(ctx, chaosEffect{n}, &tasks.EnqueueOptions{ID: id})
		return err
	}, asynq.ErrTaskIDConflict)
	c.enqueued.Store(n, chaosJob{id, time.Now()})
}

// until does something again and again until it succeeds, or fails with an error
// that is as good.
func (c *chaos) until(do func(context.Context) error, orErr error) {
	for c.t.Context().Err() == nil {
		ctx, cancel := context.WithTimeout(c.t.Context(), producerTry)
		err := do(ctx)
		cancel()
		if err == nil || orErr != nil && errors.Is(err, orErr) {
			return
		}
		if strings.Contains(err.Error(), "NOPERM") {
			c.t.Errorf("a producer lacks a right in Redis: %v", err)
			return
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// drain waits until nothing is on its way any more, or for as long as it is worth
// waiting.
func (c *chaos) drain() {
	patience := 2 * time.Minute
	if *chaosLong {
		patience = 5 * time.Minute
	}
	for giveUp := time.Now().Add(patience); time.Now().Before(giveUp) && c.t.Context().Err() == nil; time.Sleep(200 * time.Millisecond) {
		if n, err := c.underway(); err == nil && n == 0 {
			return
		}
	}
}

// underway is how many jobs are on their way, or set aside in the outbox.
func (c *chaos) underway() (n int, err error) {
	if c.celery != nil {
		return c.celeryUnderway()
	}
	if err := c.db.QueryRow(c.t.Context(), "SELECT count(*) FROM carpool.outbox").Scan(&n); err != nil {
		return 0, err
	}
	q, err := c.inspect.GetQueueInfo("default")
	if err != nil {
		return 0, err
	}
	return n + q.Pending + q.Active + q.Scheduled + q.Retry, nil
}
