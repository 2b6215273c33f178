//go:build unix

package worker_test

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/carpool-go/carpool/internal/testservers"
)

// chaosFault breaks something and mends it, or has it mended by meanwhile.
type chaosFault struct {
	name   string
	weight int // how often it comes
	// alsoBroken: it may hit a machine on which something is broken already.
	alsoBroken bool
	do         func(n *chaosNode, d time.Duration)
	// producers: it may hit the producers' machine, which runs no worker.
	producers bool
	// outlasts, in the long form, is how long the first of them takes, and one in
	// four of the others: more than a job's lease.
	outlasts time.Duration
}

func (c *chaos) allFaults(ctx context.Context) []chaosFault {
	forAll := func(server func(*chaosNode) *testservers.Proxy, d time.Duration) {
		for _, n := range append(c.workers, c.producers) {
			server(n).Blackhole()
		}
		sleepFor(ctx, d)
		for _, n := range append(c.workers, c.producers) {
			server(n).Heal()
		}
	}
	toPostgres := func(n *chaosNode) *testservers.Proxy { return n.postgres }
	toRedis := func(n *chaosNode) *testservers.Proxy { return n.redis }
	const pastLease = 40 * time.Second
	return []chaosFault{
		{name: "kill -9 of a worker", weight: 4, alsoBroken: true, do: func(n *chaosNode, _ time.Duration) { c.killAndStart(n) }},
		{name: "SIGSTOP of a worker", weight: 2, outlasts: 75 * time.Second, do: func(n *chaosNode, d time.Duration) {
			signal := n.signal(syscall.SIGSTOP)
			c.meanwhile(n, d, func() { signal(syscall.SIGCONT) })
		}},
		{name: "restart of Postgres, immediate", weight: 2, alsoBroken: true, do: func(*chaosNode, time.Duration) {
			if err := c.postgres.Restart(c.t.Context(), "immediate"); err != nil {
				c.t.Error(err)
			}
		}},
		{name: "kill -9 of Redis, and restart", weight: 2, alsoBroken: true, do: func(_ *chaosNode, d time.Duration) {
			c.redis.Kill()
			sleepFor(ctx, d)
			if err := c.redis.Restart(c.t.Context()); err != nil {
				c.t.Error(err)
			}
		}},
		{name: "everything killed at once", weight: 1, alsoBroken: true, do: func(_ *chaosNode, d time.Duration) {
			for _, n := range c.workers {
				c.kill(n)
			}
			c.redis.Kill()
			if err := c.postgres.Restart(c.t.Context(), "immediate"); err != nil {
				c.t.Error(err)
			}
			sleepFor(ctx, d/2)
			if err := c.redis.Restart(c.t.Context()); err != nil {
				c.t.Error(err)
			}
			for _, n := range c.workers {
				c.killAndStart(n)
			}
		}},
		{name: "Postgres in a black hole, for one", weight: 2, producers: true, do: func(n *chaosNode, d time.Duration) {
			n.postgres.Blackhole()
			c.meanwhile(n, d, n.postgres.Heal)
		}},
		{name: "Redis in a black hole, for one", weight: 2, producers: true, outlasts: pastLease, do: func(n *chaosNode, d time.Duration) {
			n.redis.Blackhole()
			c.meanwhile(n, d, n.redis.Heal)
		}},
		{name: "Postgres in a black hole, for all", weight: 1, outlasts: pastLease, do: func(_ *chaosNode, d time.Duration) { forAll(toPostgres, d) }},
		{name: "Redis in a black hole, for all", weight: 1, outlasts: pastLease, do: func(_ *chaosNode, d time.Duration) { forAll(toRedis, d) }},
		// What is sent to a frozen server is done when it goes on, though whoever
		// sent it may have given up: a commit that comes late.
		{name: "SIGSTOP of Postgres", weight: 1, alsoBroken: true, outlasts: 15 * time.Second, do: func(_ *chaosNode, d time.Duration) {
			if err := c.postgres.Pause(); err != nil {
				c.t.Error(err)
			}
			sleepFor(ctx, d)
			if err := c.postgres.Resume(); err != nil {
				c.t.Error(err)
			}
		}},
		{name: "SIGSTOP of Redis", weight: 1, alsoBroken: true, outlasts: 15 * time.Second, do: func(_ *chaosNode, d time.Duration) {
			if err := c.redis.Pause(); err != nil {
				c.t.Error(err)
			}
			sleepFor(ctx, d)
			if err := c.redis.Resume(); err != nil {
				c.t.Error(err)
			}
		}},
		{name: "connections reset", weight: 3, producers: true, alsoBroken: true, do: func(n *chaosNode, _ time.Duration) {
			n.postgres.Reset()
			n.redis.Reset()
		}},
		// The answers of fetches are lost, among others: each job that was fetched is to be found again.
		{name: "answers of Redis dropped", weight: 2, outlasts: pastLease, do: func(n *chaosNode, d time.Duration) {
			n.redis.DropAnswers()
			c.meanwhile(n, d, n.redis.Heal)
		}},
		// What has been committed meanwhile Redis has not been told.
		{name: "kill -9 of a worker that has ends to tell", weight: 2, do: func(n *chaosNode, d time.Duration) {
			n.redis.Blackhole()
			c.meanwhile(n, d/4, func() {
				c.killAndStart(n)
				n.redis.Heal()
			})
		}},
		{name: "connections refused", weight: 1, producers: true, do: func(n *chaosNode, d time.Duration) {
			n.postgres.Refuse()
			n.redis.Refuse()
			n.postgres.Reset()
			n.redis.Reset()
			c.meanwhile(n, d, func() {
				n.postgres.Heal()
				n.redis.Heal()
			})
		}},
		{name: "half of the backends terminated", weight: 3, alsoBroken: true, do: func(*chaosNode, time.Duration) {
			const sql = `SELECT pg_terminate_backend(pid) FROM pg_stat_activity
				WHERE pid <> pg_backend_pid() AND backend_type = 'client backend' AND random() < 0.5`
			_, err := c.db.Exec(ctx, sql)
			if err != nil && ctx.Err() == nil { // over a connection from before a restart
				_, _ = c.db.Exec(ctx, sql)
			}
		}},
	}
}

// breakThings breaks one thing after the other until ctx is done. What breaks, where
// and for how long is drawn from the seed alone.
func (c *chaos) breakThings(ctx context.Context) {
	rng := rand.New(rand.NewPCG(c.seed, 0))
	most := 4 * time.Second
	if *chaosLong {
		most = 8 * time.Second
	}
	faults := c.allFaults(ctx)
	var bag []int
	for i, f := range faults {
		bag = append(bag, slices.Repeat([]int{i}, f.weight)...)
	}
	for ctx.Err() == nil {
		pause := time.Duration(rng.Int64N(int64(1500 * time.Millisecond)))
		f := faults[bag[rng.IntN(len(bag))]]
		where, d, outlasts := rng.IntN(12), time.Duration(rng.Int64N(int64(most))), rng.IntN(4) == 0
		n := c.workers[where%3]
		if f.producers && where < 2 {
			n = c.producers
		}
		sleepFor(ctx, pause)
		if ctx.Err() != nil || n.mending.Load() && !f.alsoBroken {
			continue
		}
		if *chaosLong && f.outlasts > 0 && (outlasts || c.faults[f.name] == 0) {
			d = f.outlasts
		}
		c.note(f.name, n.name, d)
		f.do(n, d)
	}
}

func (c *chaos) note(fault, node string, d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.faults[fault]++
	c.timeline = append(c.timeline, fmt.Sprintf("%s %s (%s, %s)", time.Now().Format(time.RFC3339Nano), fault, node, d.Round(time.Millisecond)))
}

// meanwhile mends what was broken on a machine after a time, while other things
// break.
func (c *chaos) meanwhile(n *chaosNode, d time.Duration, mend func()) {
	n.mending.Store(true)
	c.mending.Go(func() {
		sleepFor(c.t.Context(), d)
		mend()
		n.mending.Store(false)
	})
}

// endedByItself notes a worker that ended without having been killed. That may be
// when its servers are away as it starts; it must not be a panic or a data race.
func (c *chaos) endedByItself(n *chaosNode, p *chaosProcess) {
	data, _ := os.ReadFile(p.log)
	text := string(data)
	last := strings.TrimSpace(text)
	last = last[strings.LastIndexByte(last, '\n')+1:]
	c.mu.Lock()
	defer c.mu.Unlock()
	c.endings = append(c.endings, fmt.Sprintf("%s %s ended by itself, with %s: %s", time.Now().Format(time.RFC3339Nano), n.name, p.cmd.ProcessState, last))
	for _, sign := range []string{"WARNING: DATA RACE", "\npanic: ", "\nfatal error: "} {
		if at := strings.Index(text, sign); at >= 0 {
			c.crashes = append(c.crashes, text[at:min(len(text), at+8000)])
		}
	}
}

func sleepFor(ctx context.Context, d time.Duration) {
	select {
	case <-ctx.Done():
	case <-time.After(d):
	}
}
