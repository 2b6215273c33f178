//go:build long && unix

package worker_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"regexp"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/hibiken/asynq"
	"github.com/redis/go-redis/v9"

	"github.com/carpool-go/carpool/internal/testservers"
	"github.com/carpool-go/carpool/tasks"
)

// losesNothing has jobs enqueued by SQL and by clients while a master of Redis fails, and
// then works them off. Replication is asynchronous, so a job that a client has enqueued may be
// lost to Redis itself; none may be lost that the master's replica has got, and none of the
// outbox's. None may have two effects.
func (l *installation) losesNothing(t *testing.T, rdb redis.UniversalClient, replicaURL string, fail func()) {
	t.Helper()
	const before, after = 4 * time.Second, 12 * time.Second
	replicated := watchReplica(t, replicaURL)
	client := tasks.NewClient(rdb)
	ctx, stop := context.WithTimeout(t.Context(), before+after)
	defer stop()
	var producers sync.WaitGroup
	ofOutbox, ofClient := new(jobs), new(timedJobs)
	for p := range 2 {
		producers.Go(func() {
			for n := 0; ctx.Err() == nil; n++ {
				var id string
				if err := l.db.QueryRow(ctx, "SELECT carpool.enqueue('chaos:effect', jsonb_build_object('n', $1::int))", n).Scan(&id); err == nil {
					ofOutbox.add(id)
				} else if ctx.Err() == nil {
					t.Errorf("enqueue by SQL: %v", err)
				}
				time.Sleep(5 * time.Millisecond)
			}
		})
		producers.Go(func() {
			for n := 0; ctx.Err() == nil; n++ {
				id := fmt.Sprintf("client-%d-%d", p, n)
				for ctx.Err() == nil {
					began := time.Now()
					_, err := client.Enqueue(ctx, chaosEffect{n}, &tasks.EnqueueOptions{ID: id})
					if err == nil || errors.Is(err, asynq.ErrTaskIDConflict) {
						ofClient.add(id)
						ofClient.took(time.Since(began))
						break
					}
				}
				time.Sleep(5 * time.Millisecond)
			}
		})
	}
	time.Sleep(before)
	fail()
	failed := time.Now()
	producers.Wait()

	inspect := asynq.NewInspectorFromRedisClient(rdb)
	longest(t, 2*time.Minute, "nothing is on its way any more", func(ctx context.Context) bool {
		var waiting int
		if err := l.db.QueryRow(ctx, "SELECT count(*) FROM carpool.outbox").Scan(&waiting); err != nil || waiting > 0 {
			return false
		}
		q, err := inspect.GetQueueInfo("default")
		return err == nil && q.Pending+q.Active+q.Scheduled+q.Retry == 0
	})
	effects := l.effects(t)
	t.Logf("%d jobs of the outbox, %d of clients, %d effects; the longest time without one was %.1f s, the longest that a client waited %.1f s",
		len(ofOutbox.ids), len(ofClient.ids), len(effects), float64(l.count(t, "SELECT (extract(epoch FROM max(gap)) * 1000)::int FROM (SELECT at - lag(at) OVER (ORDER BY at) AS gap FROM effects) g"))/1000, ofClient.longest.Seconds())
	if l.count(t, "SELECT count(*) FROM effects WHERE at > to_timestamp("+fmt.Sprint(failed.Unix()+5)+")") == 0 || len(ofOutbox.ids) < 500 || len(ofClient.ids) < 500 || replicated.jobs() < 100 {
		t.Error("too little was done to show anything")
	}
	for _, id := range ofOutbox.ids {
		if effects[id] == 0 {
			t.Errorf("job %s of the outbox is lost; that the replica had it is %t", id, replicated.has(id))
		}
	}
	lost := slices.DeleteFunc(slices.Clone(ofClient.ids), func(id string) bool { return effects[id] > 0 })
	t.Logf("%d jobs of clients are lost; the replica had got %d jobs of all when it took the master's place", len(lost), replicated.jobs())
	for _, id := range lost {
		if replicated.has(id) {
			t.Errorf("job %s is lost, and the replica had it", id)
		}
	}
}

// timedJobs are jobs with the longest time that the enqueueing of one took.
type timedJobs struct {
	jobs
	longest time.Duration
}

func (j *timedJobs) took(d time.Duration) {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.longest = max(j.longest, d)
}

// replica is what a replica has got.
type replica struct {
	mu   sync.Mutex
	seen map[string]bool
}

var jobKey = regexp.MustCompile(`"asynq:\{default\}:t:([^"]+)"`)

// watchReplica watches what a replica is told until it is put in the master's place, which
// ends all connections to it.
func watchReplica(t *testing.T, url string) *replica {
	t.Helper()
	u := testservers.ParseURL(t, url)
	conn, err := net.Dial("tcp", u.Host)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	password, _ := u.User.Password()
	if _, err := fmt.Fprintf(conn, "AUTH %s\r\nMONITOR\r\n", password); err != nil {
		t.Fatal(err)
	}
	r := &replica{seen: make(map[string]bool)}
	lines := bufio.NewScanner(conn)
	for range 2 {
		if !lines.Scan() || lines.Text() != "+OK" {
			t.Fatalf("MONITOR: %q, error %v", lines.Text(), lines.Err())
		}
	}
	go func() {
		for lines.Scan() {
			if m := jobKey.FindStringSubmatch(lines.Text()); m != nil {
				r.mu.Lock()
				r.seen[m[1]] = true
				r.mu.Unlock()
			}
		}
	}()
	return r
}

func (r *replica) has(id string) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.seen[id]
}

func (r *replica) jobs() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.seen)
}
