package delivery

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/hibiken/asynq"
	"github.com/jackc/pgx/v5"
	"github.com/redis/go-redis/v9"
	"google.golang.org/protobuf/encoding/protowire"

	"github.com/carpool-go/carpool/internal/asynqwire"
	"github.com/carpool-go/carpool/tasks"
	"github.com/carpool-go/carpool/worker/internal/workertest"
)

// fill puts jobs of a kind in a queue, the first to be fetched first, and returns their ids.
func fill(t *testing.T, rdb redis.UniversalClient, queue, kind string, jobs int) []string {
	t.Helper()
	var ids []string
	_, err := rdb.Pipelined(t.Context(), func(p redis.Pipeliner) error {
		for i := range jobs {
			id := fmt.Sprintf("%s-%s-%d", queue, kind, i)
			ids = append(ids, id)
			msg := protowire.AppendString(protowire.AppendTag(nil, 1, protowire.BytesType), kind)
			msg = protowire.AppendString(protowire.AppendTag(msg, 3, protowire.BytesType), id)
			msg = protowire.AppendString(protowire.AppendTag(msg, 4, protowire.BytesType), queue)
			p.HSet(t.Context(), asynqwire.Task(queue, id), "msg", msg, "state", "pending", "pending_since", i+1)
			p.LPush(t.Context(), asynqwire.Pending(queue), id)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return ids
}

// newFetch is a fetch like those of a fetcher.
func newFetch(shares ...asynqwire.Share) asynqwire.Fetch {
	return asynqwire.Fetch{
		Token: 1 + rand.N(asynqwire.MaxToken), ID: fmt.Sprintf("%016x", rand.Uint64()), Shares: shares,
	}
}

// mustFetch makes a fetch that gets its answer.
func mustFetch(t *testing.T, rdb redis.UniversalClient, fetch asynqwire.Fetch) asynqwire.Fetching {
	t.Helper()
	answer, err := fetch.Do(t.Context(), rdb)
	if err != nil {
		t.Fatal(err)
	}
	return answer
}

func TestFetcher_SharesOfTheQueuesAreTheirWeights(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		full      map[string]int     // queue and how many jobs it has, which is enough
		want      map[string]float64 // its share
		tolerance float64
	}{
		"all are full": {
			map[string]int{"critical": 6200, "default": 3200, "low": 1200},
			map[string]float64{"critical": 0.6, "default": 0.3, "low": 0.1},
			0.02,
		},
		"one is empty": { // whose share goes to the others by their weights
			map[string]int{"critical": 10000, "low": 10000},
			map[string]float64{"critical": 6. / 7, "low": 1. / 7},
			0.2,
		},
		"all but one are empty": {
			map[string]int{"low": 10000},
			map[string]float64{"low": 1},
			0,
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			rdb := setup(t).Redis(t)
			for queue, jobs := range c.full {
				fill(t, rdb, queue, "probe", jobs)
			}
			w := newWheel(map[string]int{"critical": 6, "default": 3, "low": 1})
			const all = 10000
			got, next := make(map[string]int), make(map[string]int)
			for fetched := 0; fetched < all; {
				slots := min(1+rand.N(20), all-fetched)
				answer := mustFetch(t, rdb, newFetch(w.shares(slots)...))
				if len(answer.Jobs) != slots || len(answer.Gone) > 0 {
					t.Fatalf("%d jobs and %d without a hash for %d slots", len(answer.Jobs), len(answer.Gone), slots)
				}
				for _, job := range answer.Jobs {
					if want := fmt.Sprintf("%s-probe-%d", job.Queue, next[job.Queue]); job.ID != want {
						t.Fatalf("job %s comes before %s", job.ID, want)
					}
					next[job.Queue]++
					got[job.Queue]++
				}
				fetched += slots
			}
			for queue, want := range c.want {
				if share := float64(got[queue]) / all; share < want*(1-c.tolerance) || share > want*(1+c.tolerance) {
					t.Errorf("queue %s has a share of %.4f, want %.4f", queue, share, want)
				}
			}
		})
	}
}

// isFetchOf are the fetches of a queue's jobs, among others.
func isFetchOf(queue string) func(redis.Cmder) bool {
	return func(cmd redis.Cmder) bool {
		return slices.Contains(cmd.Args(), any(asynqwire.Paused(queue)))
	}
}

func TestFetcher_FetchWithoutAnAnswerIsMadeAgain(t *testing.T) {
	t.Parallel()
	for name, question := range map[string]bool{"that Redis answered": false, "that did not arrive": true} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := setup(t)
			rdb := b.Redis(t)
			const jobs = 20
			var infos []*tasks.Info
			for range jobs {
				info, err := b.Client.Enqueue(t.Context(), probe{"x"}, &tasks.EnqueueOptions{MaxRetry: tasks.NoRetry})
				if err != nil {
					t.Fatal(err)
				}
				infos = append(infos, info)
			}
			var lost atomic.Bool
			var mu sync.Mutex
			var lostAt time.Time
			ran := make(map[string]time.Time)
			f := b.executeWith(t, executionConfig{slots: jobs, hook: losing{
				lost: &lost, is: isFetchOf("default"), question: question, after: func(ctx context.Context) {
					mu.Lock()
					lostAt = time.Now()
					mu.Unlock()
					if active := rdb.LLen(ctx, asynqwire.Active("default")).Val(); !question && active != jobs {
						t.Errorf("the fetch has taken %d jobs, want %d", active, jobs)
					}
					<-ctx.Done() // as if it were on its way still
				},
			}}, func(s *tasks.Set) {
				tasks.Register(s, func(ctx context.Context, job *tasks.Job, _ probe) (any, error) {
					began := time.Now()
					mu.Lock()
					if _, again := ran[job.ID]; again || job.Attempt != 1 {
						t.Errorf("job %s runs again: %t, attempt %d", job.ID, again, job.Attempt)
					}
					ran[job.ID] = began
					mu.Unlock()
					fields := rdb.HMGet(ctx, asynqwire.Task("default", job.ID), "carpool_deliveries", asynqwire.FreeRedeliveries).Val()
					if diff := cmp.Diff([]any{"1", nil}, fields); diff != "" {
						t.Errorf("its deliveries, and the free ones: (-want +got)\n%s", diff)
					}
					return nil, nil
				})
			})
			for _, info := range infos {
				if _, err := f.Wait(t, info); err != nil {
					t.Error(err)
				}
				if got, err := f.Inspector.GetTaskInfo("default", info.ID); err != nil || got.Retried != 0 || got.LastErr != "" {
					t.Errorf("it is %+v, %v; want no try used", got, err)
				}
			}
			mu.Lock()
			defer mu.Unlock()
			if !lost.Load() || len(ran) != jobs {
				t.Fatalf("a fetch was lost: %t, and %d jobs have run", lost.Load(), len(ran))
			}
			for id, at := range ran {
				if took := at.Sub(lostAt); took > 2*time.Second {
					t.Errorf("job %s ran %s after the fetch", id, took)
				}
			}
		})
	}
}

// calls is how often Redis was asked for something by a worker, in all databases.
func calls(t *testing.T, rdb redis.UniversalClient, commands string) int {
	t.Helper()
	stats, err := rdb.Info(t.Context(), "commandstats").Result()
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, m := range regexp.MustCompile(`cmdstat_(?:`+commands+`):calls=(\d+),`).FindAllStringSubmatch(stats, -1) {
		some, err := strconv.Atoi(m[1])
		if err != nil {
			t.Fatal(err)
		}
		n += some
	}
	return n
}

func TestFetcher_PausedQueueIsAskedForRarelyAndItsResumeIsSeen(t *testing.T) {
	t.Parallel()
	b := setupOwnRedis(t)
	rdb := b.Redis(t)
	ran := make(chan string, 10)
	register := func(s *tasks.Set) {
		tasks.Register(s, func(_ context.Context, job *tasks.Job, _ probe) (any, error) {
			ran <- job.ID
			return nil, nil
		})
	}
	var f *execution
	enqueue := func(queue string) string {
		info, err := b.Client.Enqueue(t.Context(), probe{"x"}, &tasks.EnqueueOptions{Queue: queue})
		if err != nil {
			t.Fatal(err)
		}
		return info.ID
	}
	for _, when := range []string{"before the worker starts", "while it waits for jobs"} {
		id := ""
		if f == nil { // the queue is known once it has had a job
			id = enqueue("default")
		}
		if err := b.Inspector.PauseQueue("default"); err != nil {
			t.Fatal(err)
		}
		if f == nil {
			f = b.executeWith(t, executionConfig{queues: map[string]int{"default": 1, "bulk": 1}}, register)
		} else {
			id = enqueue("default")
		}
		time.Sleep(500 * time.Millisecond)
		before, began := calls(t, rdb, "eval|evalsha|blmove"), time.Now()
		time.Sleep(2 * time.Second)
		perSecond := float64(calls(t, rdb, "eval|evalsha|blmove")-before) / time.Since(began).Seconds()
		if perSecond > 10 {
			t.Errorf("paused %s: Redis is asked %.1f times a second", when, perSecond)
		}
		if len(ran) > 0 {
			t.Fatalf("paused %s: job %s has run", when, <-ran)
		}
		other := enqueue("bulk")
		if got := <-ran; got != other {
			t.Errorf("paused %s: job %s has run, want that of the other queue", when, got)
		}
		if err := b.Inspector.UnpauseQueue("default"); err != nil {
			t.Fatal(err)
		}
		resumed := time.Now()
		if got := <-ran; got != id || time.Since(resumed) > 1200*time.Millisecond {
			t.Errorf("paused %s: job %s runs after %s, want %s within a second", when, got, time.Since(resumed), id)
		}
	}
}

// occupied runs an executor whose only slot has a job until the gate is closed. It returns
// that job. Other jobs send their ids to ran.
func (b *bundle) occupied(t *testing.T, queues map[string]int, ran chan<- string) (f *execution, first *tasks.Info, gate chan struct{}) {
	t.Helper()
	gate = make(chan struct{})
	started := make(chan struct{})
	f = b.executeWith(t, executionConfig{slots: 1, queues: queues}, func(s *tasks.Set) {
		tasks.Register(s, func(_ context.Context, job *tasks.Job, p probe) (any, error) {
			if p.Word == "first" {
				close(started)
				<-gate
				return nil, nil
			}
			ran <- job.ID
			return nil, nil
		})
	})
	first = f.enqueue(t, "first", nil)
	<-started
	return f, first, gate
}

// pendingJobs are the hashes of a queue's pending jobs, the next one first.
func pendingJobs(t *testing.T, rdb redis.UniversalClient, queue string) []map[string]string {
	t.Helper()
	ids, err := rdb.LRange(t.Context(), asynqwire.Pending(queue), 0, -1).Result()
	if err != nil {
		t.Fatal(err)
	}
	jobs := make([]map[string]string, 0, len(ids))
	for _, id := range slices.Backward(ids) {
		job := rdb.HGetAll(t.Context(), asynqwire.Task(queue, id)).Val()
		job["id"] = id
		jobs = append(jobs, job)
	}
	return jobs
}

func TestFetcher_WhatHasNotBegunGoesBackToWhereItWas(t *testing.T) {
	t.Parallel()
	for name, answered := range map[string]bool{"fetched": true, "fetched without an answer": false} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := setup(t)
			rdb := b.Redis(t)
			ran := make(chan string, 20)
			f, first, gate := b.occupied(t, map[string]int{"default": 2, "bulk": 1}, ran)
			for range 9 {
				f.enqueue(t, "x", nil)
				f.enqueue(t, "x", &tasks.EnqueueOptions{Queue: "bulk"})
			}
			want := map[string][]map[string]string{"default": pendingJobs(t, rdb, "default"), "bulk": pendingJobs(t, rdb, "bulk")}

			// asynq doesn't ask: its slot is taken.
			fetcher := f.servers.clients[0].fetcher
			fetch := newFetch(asynqwire.Share{Queue: "default", Jobs: 7}, asynqwire.Share{Queue: "bulk", Jobs: 3})
			if answered {
				if _, err := fetcher.fetch(fetch); err != nil || len(fetcher.buffer) != 10 {
					t.Fatalf("%d jobs are buffered, error %v", len(fetcher.buffer), err)
				}
			} else {
				if answer := mustFetch(t, rdb, fetch); len(answer.Jobs) != 10 {
					t.Fatalf("%d jobs are fetched", len(answer.Jobs))
				}
				fetcher.unanswered = &fetch
			}

			stopped := make(chan struct{})
			go func() { defer close(stopped); f.stop() }()
			got := make(map[string][]map[string]string)
			workertest.Eventually(t, "the jobs are back, while the first one still runs", func() bool {
				for queue := range want {
					got[queue] = pendingJobs(t, rdb, queue)
				}
				return len(got["default"]) == 9 && len(got["bulk"]) == 9
			})
			for queue := range want {
				for _, job := range got[queue] {
					if n, ok := job["carpool_deliveries"]; ok && n != "0" {
						t.Errorf("it has had %s deliveries", n)
					}
					delete(job, "carpool_deliveries")
				}
			}
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("the pending jobs: (-want +got)\n%s", diff)
			}
			if active := rdb.LRange(t.Context(), asynqwire.Active("default"), 0, -1).Val(); !slices.Equal(active, []string{first.ID}) {
				t.Errorf("active is %v, want the first job alone", active)
			}
			close(gate)
			<-stopped
			if _, err := f.Wait(t, first); err != nil {
				t.Error(err)
			}
			for _, queue := range []string{"default", "bulk"} {
				for _, list := range []string{asynqwire.Active(queue), asynqwire.Leases(queue)} {
					if rdb.Exists(t.Context(), list).Val() != 0 {
						t.Errorf("something is left in %s", list)
					}
				}
				for _, job := range want[queue] {
					if info, err := f.Inspector.GetTaskInfo(queue, job["id"]); err != nil || info.State != asynq.TaskStatePending || info.Retried != 0 {
						t.Errorf("it is %+v, %v; want it pending", info, err)
					}
				}
			}
			if len(ran) > 0 {
				t.Errorf("job %s has run", <-ran)
			}
		})
	}
}

func TestFetcher_CancelOfAJobThatHasNotBegunIsKeptForItsStart(t *testing.T) {
	t.Parallel()
	b := setup(t)
	ran := make(chan string, 20)
	f, first, gate := b.occupied(t, nil, ran)
	doomed, other := f.enqueue(t, "x", nil), f.enqueue(t, "x", nil)
	fetcher := f.servers.clients[0].fetcher
	if _, err := fetcher.fetch(newFetch(asynqwire.Share{Queue: "default", Jobs: 10})); err != nil || len(fetcher.buffer) != 2 {
		t.Fatalf("%d jobs are buffered, error %v", len(fetcher.buffer), err)
	}
	cancelled := make(chan error, 1)
	go func() { cancelled <- f.Client.Cancel(t.Context(), doomed.ID) }()
	job := f.servers.held.byKey(asynqwire.Task("default", doomed.ID))
	workertest.Eventually(t, "the cancel is heard", func() bool { return job.ctx.Err() != nil })
	close(gate)
	for _, info := range []*tasks.Info{first, other} {
		if _, err := f.Wait(t, info); err != nil {
			t.Error(err)
		}
	}
	if err := <-cancelled; err != nil {
		t.Error(err)
	}
	if got, err := f.Inspector.GetTaskInfo("default", doomed.ID); err != nil || got.State != asynq.TaskStateArchived || got.LastErr != "cancelled" {
		t.Errorf("it is %+v, %v; want it archived as cancelled", got, err)
	}
	f.stop()
	if len(ran) != 1 || <-ran != other.ID {
		t.Error("the handler has run for the job that was cancelled before")
	}
	for _, r := range f.records(t, 3) {
		if job := r["job"].(map[string]any); job["id"] == doomed.ID && job["outcome"] != outcomeCancelled {
			t.Errorf("the record is %v", job)
		}
	}
}

func TestFetcher_JobsOfAKindThatOnlyAnotherWorkerKnowsAreLeftToIt(t *testing.T) {
	t.Parallel()
	b := setup(t)
	register := func(s *tasks.Set) {
		tasks.Register(s, func(_ context.Context, job *tasks.Job, p probe) (string, error) {
			if job.Attempt != 1 {
				t.Errorf("it is attempt %d", job.Attempt)
			}
			return p.Word, nil
		})
	}
	newer := new(tasks.Set)
	register(newer)
	conn, err := pgx.Connect(t.Context(), b.DatabaseURL)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(context.Background())
	if err := tasks.RecordKinds(t.Context(), conn, newer); err != nil {
		t.Fatal(err)
	}
	older := b.execute(t, b, func(s *tasks.Set) {
		tasks.Register(s, func(context.Context, *tasks.Job, otherProbe) (string, error) { return "", nil })
	})
	const jobs = 200
	var infos []*tasks.Info
	for range jobs {
		info, err := b.Client.Enqueue(t.Context(), probe{"x"}, &tasks.EnqueueOptions{MaxRetry: tasks.NoRetry})
		if err != nil {
			t.Fatal(err)
		}
		infos = append(infos, info)
	}
	older.records(t, 1) // it has met one
	began := time.Now()
	b.execute(t, b, register)
	for _, info := range infos {
		if result, err := b.Wait(t, info); err != nil || string(result) != `"x"` {
			t.Errorf("result %s, error %v", result, err)
		}
		if got, err := b.Inspector.GetTaskInfo("default", info.ID); err != nil || got.Retried != 0 || got.LastErr != "" {
			t.Errorf("it is %+v, %v; want no try used", got, err)
		}
	}
	if took := time.Since(began); took > 20*time.Second {
		t.Errorf("they took %s", took)
	}
	if n := len(older.records(t, 1)); n > 20 {
		t.Errorf("the older worker has had jobs of the kind %d times", n)
	}
	// It goes on with its own.
	own, err := b.Client.Enqueue(t.Context(), otherProbe{probe{"x"}}, nil)
	if err != nil {
		t.Fatal(err)
	}
	older.records(t, 1)
	workertest.Eventually(t, "it has ended", func() bool {
		info, err := b.Inspector.GetTaskInfo("default", own.ID)
		return err == nil && info.State != asynq.TaskStatePending && info.State != asynq.TaskStateActive
	})
}

func TestFetch_JobsThatAreLeftToOthersKeepNoQueueFromItsShare(t *testing.T) {
	t.Parallel()
	rdb := setup(t).Redis(t)
	fill(t, rdb, "critical", "unknown", 300)
	want := fill(t, rdb, "low", "probe", 5)
	fetch := newFetch(asynqwire.Share{Queue: "critical", Jobs: 3}, asynqwire.Share{Queue: "low", Jobs: 2})
	fetch.Leave = []string{"unknown"}
	answer := mustFetch(t, rdb, fetch)
	var got []string
	for _, job := range answer.Jobs {
		got = append(got, job.ID)
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("(-want +got)\n%s", diff)
	}
	if !answer.Passed["critical"] || answer.Passed["low"] {
		t.Errorf("passed is %v", answer.Passed)
	}
	if n := rdb.LLen(t.Context(), asynqwire.Pending("critical")).Val(); n != 300 {
		t.Errorf("%d of the others are pending, want 300", n)
	}
}

// garbage are messages that asynq can't read.
func garbage() map[string]string {
	return map[string]string{
		"garbage-empty": "", "garbage-text": "what?", "garbage-tag": "\n", "garbage-size": "\n\x80", "garbage-sizes": "\n\xff\xff",
		"garbage-short": "\n\x7fprobe", "garbage-utf8": "\n\x02\xff\xff",
	}
}

func TestFetch_NothingThatCannotBeReadKeepsOthersFromBeingFetched(t *testing.T) {
	t.Parallel()
	for name, leave := range map[string][]string{"all kinds": nil, "without a kind": {"unknown"}} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			rdb := setup(t).Redis(t)
			want := fill(t, rdb, "default", "probe", 3)
			for id, msg := range garbage() {
				rdb.HSet(t.Context(), asynqwire.Task("default", id), "msg", msg, "state", "pending")
				rdb.RPush(t.Context(), asynqwire.Pending("default"), id)
				want = append(want, id)
			}
			fetch := newFetch(asynqwire.Share{Queue: "default", Jobs: 100})
			fetch.Leave = leave
			answer, err := fetch.Do(t.Context(), rdb)
			if err != nil {
				t.Errorf("error %v", err)
			}
			var got []string
			for _, job := range answer.Jobs {
				got = append(got, job.ID)
			}
			slices.Sort(want)
			slices.Sort(got)
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("the jobs that were fetched: (-want +got)\n%s\nand %v are pending", diff, rdb.LRange(t.Context(), asynqwire.Pending("default"), 0, -1).Val())
			}
		})
	}
}

func TestFetcher_JobThatIsGoneOrCannotBeReadStopsNoOther(t *testing.T) {
	t.Parallel()
	b := setup(t)
	rdb := b.Redis(t)
	var good []*tasks.Info
	enqueue := func() {
		info, err := b.Client.Enqueue(t.Context(), probe{"x"}, nil)
		if err != nil {
			t.Fatal(err)
		}
		good = append(good, info)
	}
	push := func(id string) {
		if err := rdb.LPush(t.Context(), asynqwire.Pending("default"), id).Err(); err != nil {
			t.Fatal(err)
		}
	}
	enqueue()
	push("gone")
	rdb.Set(t.Context(), asynqwire.Task("default", "no-hash"), "what?", 0)
	push("no-hash")
	enqueue()
	for id, msg := range garbage() {
		rdb.HSet(t.Context(), asynqwire.Task("default", id), "msg", msg, "state", "pending")
		push(id)
	}
	// One whose message is another job's.
	rdb.HSet(t.Context(), asynqwire.Task("default", "garbage-other"), "msg", rdb.HGet(t.Context(), asynqwire.Task("default", good[0].ID), "msg").Val(), "state", "pending")
	push("garbage-other")
	enqueue()
	var runs atomic.Int32
	f := b.execute(t, b, func(s *tasks.Set) {
		tasks.Register(s, func(context.Context, *tasks.Job, probe) (any, error) { runs.Add(1); return nil, nil })
	})
	for _, info := range good {
		if _, err := f.Wait(t, info); err != nil {
			t.Error(err)
		}
	}
	for id, msg := range garbage() {
		workertest.Eventually(t, id+" is in the archive", func() bool {
			return !errors.Is(rdb.ZScore(t.Context(), asynqwire.Archived("default"), id).Err(), redis.Nil)
		})
		want := map[string]string{"msg": msg, "state": "archived"}
		if diff := cmp.Diff(want, rdb.HGetAll(t.Context(), asynqwire.Task("default", id)).Val()); diff != "" {
			t.Errorf("%s: (-want +got)\n%s", id, diff)
		}
	}
	workertest.Eventually(t, "garbage-other is in the archive", func() bool {
		return !errors.Is(rdb.ZScore(t.Context(), asynqwire.Archived("default"), "garbage-other").Err(), redis.Nil)
	})
	workertest.Eventually(t, "nothing is held", func() bool { return f.servers.Held() == 0 })
	for _, list := range []string{asynqwire.Pending("default"), asynqwire.Active("default"), asynqwire.Leases("default")} {
		if rdb.Exists(t.Context(), list).Val() != 0 {
			t.Errorf("something is left in %s", list)
		}
	}
	if runs.Load() != int32(len(good)) {
		t.Errorf("%d runs of %d jobs", runs.Load(), len(good))
	}
	log := f.log.String()
	for _, want := range []string{
		`"msg":"a job was in its queue, and Redis doesn't have what it is any more: it was evicted, or deleted by hand","job":{"id":"gone","queue":"default"}`,
		`"msg":"a job was in its queue, and Redis doesn't have what it is any more: it was evicted, or deleted by hand","job":{"id":"no-hash","queue":"default"}`,
		`"msg":"a job can't be read; it goes to the archive as it is","job":{"id":"garbage-text","queue":"default"}`,
	} {
		if !strings.Contains(log, want) {
			t.Errorf("the log doesn't have %s:\n%s", want, log)
		}
	}
}
