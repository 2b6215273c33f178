package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/url"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/hibiken/asynq"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/carpool-go/carpool/internal/schema"
	"github.com/carpool-go/carpool/internal/servers"
	"github.com/carpool-go/carpool/internal/testservers"
	"github.com/carpool-go/carpool/tasks"
)

var (
	chaosJobs = flag.Int("chaos.jobs", 1000, "jobs, half of them enqueued in SQL transactions of which a third are rolled back")
	chaosTime = flag.Duration("chaos.time", 15*time.Second, "how long jobs are enqueued and things broken")
	chaosMode = flag.String("chaos.mode", protected, "protected, unprotected (the handler's own transaction), plain (asynq and pgx alone), or all")
	chaosSeed = flag.Uint64("chaos.seed", 0, "the same faults as in another run; 0 draws one")
	chaosLong = flag.Bool("chaos.long", false, "some faults outlast a job's lease")
)

const (
	protected   = "protected"
	unprotected = "unprotected"
	plain       = "plain"
	chaosEnv    = "CARPOOL_CHAOS_WORKER" // holds the mode of a worker process
)

// chaosEffect is a job whose effect is a row in the table effects.
type chaosEffect struct {
	N int `json:"n"`
}

func (chaosEffect) Kind() string { return "chaos:effect" }
func (chaosEffect) Options() tasks.Options {
	return tasks.Options{MaxRetry: 20, Timeout: time.Minute}
}
func (chaosEffect) Validate() error { return nil }

func (e chaosEffect) happen(ctx context.Context, tx pgx.Tx) error {
	pause := rand.N(20 * time.Millisecond)
	if rand.N(100) == 0 {
		pause = rand.N(2 * time.Second)
	}
	if _, err := tx.Exec(ctx, "INSERT INTO effects (n) VALUES ($1)", e.N); err != nil {
		return err
	}
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(pause):
		return nil
	}
}

// chaosWorker is what the test binary does when the harness starts it as a worker.
func chaosWorker() int {
	mode := os.Getenv(chaosEnv)
	if mode == plain {
		return plainWorker()
	}
	return program([]string{"run"}, func(cfg tasks.Config) *tasks.Set {
		set := tasks.Builtin(cfg)
		if mode == protected {
			tasks.RegisterTx(set, func(ctx context.Context, _ *tasks.Job, tx pgx.Tx, e chaosEffect) (any, error) {
				return nil, e.happen(ctx, tx)
			})
			return set
		}
		tasks.Register(set, func(ctx context.Context, job *tasks.Job, e chaosEffect) (any, error) {
			return nil, pgx.BeginFunc(ctx, job.DB, func(tx pgx.Tx) error { return e.happen(ctx, tx) })
		})
		return set
	})
}

// plainWorker is a worker made of asynq and pgx as their documentation has it.
func plainWorker() int {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	db, err := pgxpool.New(ctx, os.Getenv("DATABASE_URL"))
	if err != nil {
		return 1
	}
	defer db.Close()
	rdb, err := tasks.OpenRedis(os.Getenv("REDIS_URL"))
	if err != nil {
		return 1
	}
	defer rdb.Close()
	server := asynq.NewServerFromRedisClient(rdb, asynq.Config{Concurrency: 10})
	err = server.Start(asynq.HandlerFunc(func(ctx context.Context, t *asynq.Task) error {
		var e chaosEffect
		if err := json.Unmarshal(t.Payload(), &e); err != nil {
			return err
		}
		return pgx.BeginFunc(ctx, db, func(tx pgx.Tx) error { return e.happen(ctx, tx) })
	}))
	if err != nil {
		return 1
	}
	<-ctx.Done()
	server.Shutdown()
	return 0
}

func TestChaos_EveryEffectHappensExactlyOnce(t *testing.T) {
	t.Parallel()
	modes := []string{*chaosMode}
	if *chaosMode == "all" {
		modes = []string{protected, unprotected, plain}
	}
	seed := *chaosSeed
	if seed == 0 {
		seed = rand.Uint64()
	}
	for _, mode := range modes {
		t.Run(mode, func(t *testing.T) {
			c := newChaos(t, mode, seed)
			r := c.run()
			fmt.Print(r)
			t.Logf("again with: -chaos.seed=%d -chaos.mode=%s -chaos.jobs=%d -chaos.time=%s -chaos.long=%t", seed, mode, *chaosJobs, *chaosTime, *chaosLong)
			right := r.lost == 0 && r.doubled == 0 && r.phantoms == 0 && r.archived == 0
			if mode == protected && !right {
				t.Error("the promise is broken")
				c.explain(r)
			}
			if mode != protected && r.lost == 0 && r.doubled == 0 {
				t.Error("nothing was lost or doubled without protection either, so the run proves nothing")
			}
		})
	}
}

// chaos is one run.
type chaos struct {
	t        *testing.T
	mode     string
	rng      *rand.Rand // of the faults
	postgres *servers.Postgres
	redis    *servers.Redis
	db       *pgxpool.Pool // past all proxies
	client   *tasks.Client
	asynq    *asynq.Client
	inspect  *asynq.Inspector
	nodes    []*chaosNode
	logs     string // the folder of the workers' logs

	next       atomic.Int64 // number of the next job
	rolledBack atomic.Int64
	acked      sync.Map // numbers that were enqueued for certain
	background sync.WaitGroup
	faults     map[string]int
}

// chaosNode is a machine with a worker, and cables of its own to the servers.
type chaosNode struct {
	name            string
	postgres, redis *testservers.Proxy
	env             []string
	cmd             *exec.Cmd
	done            chan struct{}
	starts          int
	stopped         atomic.Bool
}

func newChaos(t *testing.T, mode string, seed uint64) *chaos {
	t.Helper()
	c := &chaos{t: t, mode: mode, rng: rand.New(rand.NewPCG(seed, 0)), faults: make(map[string]int), logs: t.TempDir()}
	var err error
	if c.postgres, err = servers.StartPostgres(t.Context(), servers.PostgresConfig{}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.postgres.Stop() })
	if c.redis, err = servers.StartRedis(t.Context(), servers.RedisConfig{AppendFsync: "always"}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.redis.Stop() })
	if err := schema.Migrate(t.Context(), c.postgres.URL(), discard()); err != nil {
		t.Fatal(err)
	}
	if c.db, err = pgxpool.New(t.Context(), c.postgres.URL()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.db.Close)
	for _, sql := range []string{
		"CREATE TABLE effects (n int, at timestamptz DEFAULT clock_timestamp())", // not unique: doubles must show
		"CREATE TABLE ledger (n int PRIMARY KEY)",                                // of the transactions that enqueue
	} {
		if _, err := c.db.Exec(t.Context(), sql); err != nil {
			t.Fatal(err)
		}
	}
	rdb, err := tasks.OpenRedis(c.redis.URL())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = rdb.Close() })
	c.client, c.asynq, c.inspect = tasks.NewClient(rdb), asynq.NewClientFromRedisClient(rdb), asynq.NewInspectorFromRedisClient(rdb)
	for i := range 3 {
		n := &chaosNode{name: fmt.Sprint("worker-", i)}
		databaseURL, pg := throughProxy(t, c.postgres.URL())
		redisURL, rd := throughProxy(t, c.redis.URL())
		n.postgres, n.redis = pg, rd
		n.env = []string{
			"DATABASE_URL=" + databaseURL, "REDIS_URL=" + redisURL, chaosEnv + "=" + mode,
			"LOG_LEVEL=debug", "LOG_FORMAT=json", "PATH=" + os.Getenv("PATH"), "GORACE=halt_on_error=1",
		}
		c.nodes = append(c.nodes, n)
		c.start(n)
		t.Cleanup(func() { c.kill(n) })
	}
	if mode != plain { // the first worker writes down the kinds
		eventually(t, "a worker has started", func() bool {
			var there bool
			err := c.db.QueryRow(t.Context(), "SELECT EXISTS (SELECT FROM carpool.kinds WHERE kind = 'chaos:effect')").Scan(&there)
			return err == nil && there
		})
	}
	return c
}

func throughProxy(t *testing.T, raw string) (string, *testservers.Proxy) {
	t.Helper()
	u, err := url.Parse(raw)
	if err != nil {
		t.Fatal(err)
	}
	proxy := testservers.NewProxy(t, u.Host)
	u.Host = proxy.Addr()
	return u.String(), proxy
}

func (c *chaos) start(n *chaosNode) {
	log, err := os.Create(filepath.Join(c.logs, fmt.Sprintf("%s-%d.log", n.name, n.starts)))
	if err != nil {
		c.t.Error(err)
		return
	}
	defer log.Close()
	n.starts++
	n.cmd = exec.Command(os.Args[0])
	n.cmd.Env, n.cmd.Stdout, n.cmd.Stderr = n.env, log, log
	if err := n.cmd.Start(); err != nil {
		c.t.Error(err)
		return
	}
	cmd, done := n.cmd, make(chan struct{})
	n.done = done
	go func() {
		_ = cmd.Wait()
		close(done)
	}()
}

func (c *chaos) kill(n *chaosNode) {
	_ = n.cmd.Process.Kill()
	<-n.done
}

// run enqueues jobs while it breaks things, and reports what came of them.
func (c *chaos) run() *chaosReport {
	began := time.Now()
	ctx, cancel := context.WithTimeout(c.t.Context(), *chaosTime)
	defer cancel()
	c.background.Go(func() { c.breakThings(ctx) })
	var producers sync.WaitGroup
	const each = 4
	pause := *chaosTime * each / time.Duration(*chaosJobs)
	for i := range each {
		produce := c.enqueueBySQL
		if i%2 == 1 {
			produce = c.enqueueByClient
		}
		producers.Go(func() {
			for tick := time.NewTicker(pause); ; <-tick.C {
				n := int(c.next.Add(1))
				if n > *chaosJobs || c.t.Failed() {
					tick.Stop()
					return
				}
				produce(n)
			}
		})
	}
	producers.Wait()
	c.background.Wait()
	for _, n := range c.nodes {
		n.postgres.Heal()
		n.redis.Heal()
	}
	r := c.report(c.drain())
	r.took = time.Since(began)
	return r
}

// enqueueBySQL enqueues job n in a transaction, or begins to and rolls back.
func (c *chaos) enqueueBySQL(n int) {
	ctx := c.t.Context()
	rollBack := n%3 == 0
	for ctx.Err() == nil {
		err := func() error {
			ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
			defer cancel()
			tx, err := c.db.Begin(ctx)
			if err != nil {
				return err
			}
			defer func() { _ = tx.Rollback(context.Background()) }()
			if _, err := tx.Exec(ctx, "INSERT INTO ledger (n) VALUES ($1)", n); err != nil {
				return err
			}
			if c.mode != plain {
				if _, err := new(tasks.Client).EnqueueTx(ctx, tx, chaosEffect{n}, nil); err != nil {
					return err
				}
			}
			if rollBack {
				return nil
			}
			return tx.Commit(ctx)
		}()
		if rollBack && err == nil {
			c.rolledBack.Add(1)
			return
		}
		if !rollBack && c.committed(n) {
			c.acked.Store(n, true)
			if c.mode == plain {
				c.enqueueByClient(n)
			}
			return
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// committed looks whether the transaction of job n was, as long as it takes.
func (c *chaos) committed(n int) (committed bool) {
	for c.t.Context().Err() == nil {
		ctx, cancel := context.WithTimeout(c.t.Context(), 5*time.Second)
		err := c.db.QueryRow(ctx, "SELECT EXISTS (SELECT FROM ledger WHERE n = $1)", n).Scan(&committed)
		cancel()
		if err == nil {
			return committed
		}
		time.Sleep(20 * time.Millisecond)
	}
	return false
}

// enqueueByClient enqueues job n until Redis says that it has it.
func (c *chaos) enqueueByClient(n int) {
	id := fmt.Sprint("chaos-", n)
	for c.t.Context().Err() == nil {
		ctx, cancel := context.WithTimeout(c.t.Context(), 5*time.Second)
		var err error
		if c.mode == plain {
			payload, _ := json.Marshal(chaosEffect{n})
			_, err = c.asynq.EnqueueContext(ctx, asynq.NewTask("chaos:effect", payload), asynq.TaskID(id))
		} else {
			_, err = c.client.Enqueue(ctx, chaosEffect{n}, &tasks.EnqueueOptions{ID: id})
		}
		cancel()
		if err == nil || errors.Is(err, asynq.ErrTaskIDConflict) {
			c.acked.Store(n, true)
			return
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// breakThings breaks one thing after the other until ctx is done, and mends it.
func (c *chaos) breakThings(ctx context.Context) {
	const most = 4 * time.Second
	faults := []struct {
		name   string
		weight int
		do     func(n *chaosNode, d time.Duration)
	}{
		{"kill -9 of a worker", 4, func(n *chaosNode, _ time.Duration) {
			c.kill(n)
			c.start(n)
		}},
		{"SIGSTOP of a worker", 2, func(n *chaosNode, d time.Duration) {
			if *chaosLong && c.rng.IntN(4) == 0 {
				d = 75 * time.Second // its jobs are long somebody else's when it goes on
			}
			c.meanwhile(n, d, func() { _ = n.cmd.Process.Signal(syscall.SIGSTOP) }, func() { _ = n.cmd.Process.Signal(syscall.SIGCONT) })
		}},
		{"restart of Postgres, immediate", 2, func(*chaosNode, time.Duration) {
			if err := c.postgres.Restart(c.t.Context(), "immediate"); err != nil {
				c.t.Error(err)
			}
		}},
		{"kill -9 of Redis, and restart", 2, func(_ *chaosNode, d time.Duration) {
			c.redis.Kill()
			sleepFor(ctx, d)
			if err := c.redis.Restart(c.t.Context()); err != nil {
				c.t.Error(err)
			}
		}},
		{"Postgres in a black hole, for one", 2, func(n *chaosNode, d time.Duration) { c.meanwhile(n, d, n.postgres.Blackhole, n.postgres.Heal) }},
		{"Redis in a black hole, for one", 2, func(n *chaosNode, d time.Duration) {
			if *chaosLong && c.rng.IntN(4) == 0 {
				d = 40 * time.Second
			}
			c.meanwhile(n, d, n.redis.Blackhole, n.redis.Heal)
		}},
		{"Postgres in a black hole, for all", 1, func(_ *chaosNode, d time.Duration) {
			for _, n := range c.nodes {
				n.postgres.Blackhole()
			}
			sleepFor(ctx, d)
			for _, n := range c.nodes {
				n.postgres.Heal()
			}
		}},
		{"Redis in a black hole, for all", 1, func(_ *chaosNode, d time.Duration) {
			for _, n := range c.nodes {
				n.redis.Blackhole()
			}
			sleepFor(ctx, d)
			for _, n := range c.nodes {
				n.redis.Heal()
			}
		}},
		{"connections reset", 3, func(n *chaosNode, _ time.Duration) {
			n.postgres.Reset()
			n.redis.Reset()
		}},
		{"half of the backends terminated", 3, func(*chaosNode, time.Duration) {
			_, _ = c.db.Exec(c.t.Context(), "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid() AND backend_type = 'client backend' AND random() < 0.5")
		}},
	}
	var bag []int
	for i, f := range faults {
		for range f.weight {
			bag = append(bag, i)
		}
	}
	for ctx.Err() == nil {
		sleepFor(ctx, time.Duration(c.rng.Int64N(int64(1500*time.Millisecond))))
		f := faults[bag[c.rng.IntN(len(bag))]]
		n := c.nodes[c.rng.IntN(len(c.nodes))]
		d := time.Duration(c.rng.Int64N(int64(most)))
		if n.stopped.Load() {
			continue // something is done to it already
		}
		c.faults[f.name]++
		f.do(n, d)
	}
}

// meanwhile does something to a node for a time, while other things break.
func (c *chaos) meanwhile(n *chaosNode, d time.Duration, do, undo func()) {
	n.stopped.Store(true)
	do()
	c.background.Go(func() {
		sleepFor(c.t.Context(), d)
		undo()
		n.stopped.Store(false)
	})
}

func sleepFor(ctx context.Context, d time.Duration) {
	select {
	case <-ctx.Done():
	case <-time.After(d):
	}
}

// drain waits until nothing is on its way any more, and returns how much still is
// when it has waited for long enough.
func (c *chaos) drain() (left int) {
	patience := 2 * time.Minute
	if *chaosLong {
		patience = 5 * time.Minute
	}
	for giveUp := time.Now().Add(patience); time.Now().Before(giveUp); time.Sleep(200 * time.Millisecond) {
		if n, err := c.underway(); err == nil && n == 0 {
			return 0
		} else if err == nil {
			left = n
		}
	}
	return left
}

func (c *chaos) underway() (int, error) {
	n := 0
	if err := c.db.QueryRow(c.t.Context(), "SELECT count(*) FROM carpool.outbox").Scan(&n); err != nil {
		return 0, err
	}
	q, err := c.inspect.GetQueueInfo("default")
	if err != nil {
		return 0, err
	}
	return n + q.Pending + q.Active + q.Scheduled + q.Retry, nil
}

// chaosReport is what came of a run.
type chaosReport struct {
	mode                                             string
	enqueued, rolledBack, effects                    int
	lost, doubled, phantoms, archived, left, retries int
	stall, took                                      time.Duration
	faults                                           map[string]int
	which                                            []int // jobs that were lost or doubled
}

func (c *chaos) report(left int) *chaosReport {
	r := &chaosReport{mode: c.mode, rolledBack: int(c.rolledBack.Load()), faults: c.faults, left: left}
	ctx := c.t.Context()
	rows, err := c.db.Query(ctx, "SELECT n, count(*) FROM effects GROUP BY n")
	if err != nil {
		c.t.Fatal(err)
	}
	times := make(map[int]int)
	var n, count int
	if _, err := pgx.ForEachRow(rows, []any{&n, &count}, func() error {
		times[n] = count
		return nil
	}); err != nil {
		c.t.Fatal(err)
	}
	c.acked.Range(func(key, _ any) bool {
		r.enqueued++
		if times[key.(int)] == 0 {
			r.lost++
			r.which = append(r.which, key.(int))
		}
		return true
	})
	for n, count := range times {
		r.effects += count
		if count > 1 {
			r.doubled += count - 1
			r.which = append(r.which, n)
		}
		if _, ok := c.acked.Load(n); !ok {
			r.phantoms++
			r.which = append(r.which, n)
		}
	}
	r.lost = max(0, r.lost-left) // what is still under way is late, not lost
	if q, err := c.inspect.GetQueueInfo("default"); err == nil {
		r.archived = q.Archived
	}
	err = c.db.QueryRow(ctx, "SELECT coalesce(max(at - before), '0') FROM (SELECT at, lag(at) OVER (ORDER BY at) AS before FROM effects) e").Scan(&r.stall)
	if err != nil {
		c.t.Fatal(err)
	}
	for _, line := range c.logLines(`"outcome":"retry"`) {
		if strings.Contains(line, `"chaos:effect"`) {
			r.retries++
		}
	}
	slices.Sort(r.which)
	return r
}

func (r *chaosReport) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "\n%s: lost %d, doubled %d, of rolled back ones %d, archived %d\n", r.mode, r.lost, r.doubled, r.phantoms, r.archived)
	fmt.Fprintf(&b, "  enqueued %d, rolled back %d, effects %d, late %d, retries used %d, longest stall %s, took %s\n",
		r.enqueued, r.rolledBack, r.effects, r.left, r.retries, r.stall.Round(100*time.Millisecond), r.took.Round(time.Second))
	for _, name := range slices.Sorted(maps.Keys(r.faults)) {
		fmt.Fprintf(&b, "  %3d × %s\n", r.faults[name], name)
	}
	return b.String()
}

// explain logs what the workers said of the jobs that went wrong.
func (c *chaos) explain(r *chaosReport) {
	for _, n := range r.which[:min(5, len(r.which))] {
		ids := []string{fmt.Sprint("chaos-", n)}
		rows, _ := c.db.Query(c.t.Context(), "SELECT at::text FROM effects WHERE n = $1 ORDER BY at", n)
		at, _ := pgx.CollectRows(rows, pgx.RowTo[string])
		c.t.Logf("job %d has its effects at %s", n, at)
		for _, id := range ids {
			for _, line := range c.logLines(id) {
				c.t.Log(line)
			}
		}
	}
	archived, _ := c.inspect.ListArchivedTasks("default", asynq.PageSize(5))
	for _, job := range archived {
		c.t.Logf("archived %s: %s", job.ID, job.LastErr)
		for _, line := range c.logLines(job.ID) {
			c.t.Log(line)
		}
	}
	for _, line := range c.logLines("panic") {
		c.t.Log(line)
	}
}

// logLines returns the lines of the workers' logs that have the text in them.
func (c *chaos) logLines(text string) (lines []string) {
	files, _ := filepath.Glob(filepath.Join(c.logs, "*.log"))
	for _, file := range files {
		data, err := os.ReadFile(file)
		if err != nil {
			continue
		}
		for line := range strings.Lines(string(data)) {
			if strings.Contains(line, text) {
				lines = append(lines, filepath.Base(file)+": "+strings.TrimSpace(line))
			}
		}
	}
	return lines
}
