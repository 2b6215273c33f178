package relay

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/hibiken/asynq"

	"github.com/carpool-go/carpool/internal/limit"
	"github.com/carpool-go/carpool/internal/outbox"
	"github.com/carpool-go/carpool/internal/servers"
	"github.com/carpool-go/carpool/tasks"
	"github.com/carpool-go/carpool/worker/internal/workertest"
)

// limit sets the limit on payloads.
func (o *outboxBundle) limit(t testing.TB, most int) {
	t.Helper()
	if err := limit.Record(t.Context(), o.db, most); err != nil {
		t.Fatal(err)
	}
}

// enqueueLarge enqueues as many notes of so many bytes and returns their ids, sorted.
func (o *outboxBundle) enqueueLarge(t testing.TB, n, size int) []string {
	t.Helper()
	return o.enqueueBy(t, `SELECT carpool.enqueue('note:take', jsonb_build_object('text', repeat('x', $2))) FROM generate_series(1, $1)`, n, size)
}

// problems are those of the rows that were rejected, by their ids.
func (o *outboxBundle) problems(t testing.TB) map[string]string {
	t.Helper()
	entries, err := outbox.List(t.Context(), o.db, outbox.Filter{Rejected: true}, 0)
	if err != nil {
		t.Fatal(err)
	}
	problems := make(map[string]string)
	for _, e := range entries {
		problems[e.ID] = e.Problem
	}
	return problems
}

// hasAll reports whether Redis has a job of each id on the queue of notes.
func (o *outboxBundle) hasAll(t testing.TB, ids []string) bool {
	t.Helper()
	moved := o.moved(t, "notes")
	return !slices.ContainsFunc(ids, func(id string) bool { return !slices.Contains(moved, id) })
}

func TestRelay_ABatchHasSoManyBytesAndTheSmallDoNotWaitForTheLarge(t *testing.T) {
	t.Parallel()
	o := setupOutbox(t)
	const bytes = 100_000
	large := append(o.enqueueLarge(t, 30, bytes/2), o.enqueueLarge(t, 10, 2*bytes)...)
	small := o.enqueue(t, 100)
	r := o.newRelay(t, func(cfg *Config) { cfg.batchBytes = bytes })
	var batches []int
	o.until(t, "all are moved", func() bool {
		b, err := r.moveNext(t.Context(), o.db)
		if err != nil {
			t.Fatal(err)
		}
		batches = append(batches, b.rows)
		return o.hasAll(t, append(large, small...))
	})
	// The oldest and the small ones, and then one at a time, because two are more than that.
	if batches[0] != 1+len(small) || len(batches) < len(large) {
		t.Errorf("the batches have %v rows, want %d in the first and one in each of the others", batches, 1+len(small))
	}
}

// Such rows are older than the limit, or were written past it.
func TestRelay_RejectsWhatIsAboveTheLimitAndWhatNeverComes(t *testing.T) {
	t.Parallel()
	o := setupOutbox(t)
	o.limit(t, 64<<20)
	large := append(o.enqueueLarge(t, 20, 1<<20), o.enqueueLarge(t, 1, 20_000_000)...)
	o.limit(t, 1<<20)
	never, always := o.enqueue(t, 1)[0], o.enqueue(t, 1)[0]
	o.exec(t, "UPDATE carpool.outbox SET run_at = 'infinity' WHERE id = $1", never)
	o.exec(t, "UPDATE carpool.outbox SET run_at = '-infinity' WHERE id = $1", always)
	small := append([]string{always}, o.enqueue(t, 50)...)

	b, err := o.newRelay(t).moveNext(t.Context(), o.db)
	if err != nil {
		t.Fatal(err)
	}
	if b.redisErr != nil || b.more {
		t.Errorf("more %t, %v", b.more, b.redisErr)
	}
	if got := o.moved(t, "notes"); !slices.Equal(got, small) {
		t.Errorf("%d jobs were moved in one batch, want %d", len(got), len(small))
	}
	problems := o.problems(t)
	for i, id := range large {
		want := "note:take payload: 1048588 bytes are more than the limit of 1048576, which MAX_PAYLOAD sets"
		if i == 20 {
			want = strings.Replace(want, "1048588", "20000012", 1)
		}
		if problems[id] != want {
			t.Errorf("the problem is %q, want %q", problems[id], want)
		}
	}
	if problems[never] != "run_at: is infinity, a time that never comes" || len(problems) != len(large)+1 {
		t.Errorf("the problem is %q, and there are %d problems, want %d", problems[never], len(problems), len(large)+1)
	}
	// With a larger limit, a row that is put back is moved.
	o.limit(t, 4<<20)
	if _, err := outbox.Retry(t.Context(), o.db, large[:1]); err != nil {
		t.Fatal(err)
	}
	o.relay(t)
	if !o.hasAll(t, large[:1]) {
		t.Error("a row that was put back is not moved")
	}
}

// ownRedis gives the bundle a Redis of its own, for settings that are a whole server's.
func (o *outboxBundle) ownRedis(t *testing.T, settings ...string) *servers.Redis {
	t.Helper()
	server, err := servers.StartRedis(t.Context(), servers.RedisConfig{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := server.Stop(); err != nil {
			t.Error(err)
		}
	})
	o.redisURL = server.URL()
	o.rdb = workertest.OpenRedis(t, o.redisURL)
	o.client, o.inspector = tasks.NewClient(o.rdb), asynq.NewInspectorFromRedisClient(o.rdb)
	for i := 0; i < len(settings); i += 2 {
		o.configure(t, settings[i], settings[i+1])
	}
	return server
}

func (o *outboxBundle) configure(t testing.TB, name, value string) {
	t.Helper()
	if err := o.rdb.ConfigSet(t.Context(), name, value).Err(); err != nil {
		t.Fatal(err)
	}
}

func TestRelay_WhatRedisRefusesForItsSizeIsRejectedAndNobodyWaits(t *testing.T) {
	t.Parallel()
	for name, size := range map[string]int{
		"Redis says why":              1<<20 + 1000,
		"Redis closes the connection": 4 << 20, // the rest of the command makes that a reset, mostly without an answer
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			o := setupOutbox(t)
			o.ownRedis(t, "proto-max-bulk-len", "1mb")
			o.limit(t, 16<<20)
			large := o.enqueueLarge(t, 1, size)
			small := o.enqueue(t, 100)
			o.relay(t)
			if got := o.moved(t, "notes"); !slices.Equal(got, small) {
				t.Errorf("Redis has %d jobs, want %d", len(got), len(small))
			}
			problems := o.problems(t)
			for _, id := range large {
				if want := fmt.Sprintf("Redis does not take the %d bytes of its payload", size+12); !strings.HasPrefix(problems[id], want) {
					t.Errorf("the problem of a large row is %q, want %q", problems[id], want)
				}
			}
			if len(problems) != len(large) {
				t.Errorf("%d rows were rejected, want %d", len(problems), len(large))
			}
			if n := o.logged(redisGone); n != 0 {
				t.Errorf("it is taken for an outage of Redis:\n%s", o.log)
			}
		})
	}
}

// What is before Redis may reset a connection amid a large command, without a word.
func TestRelay_ALargeRowThatIsOnlyResetWaitsForNoneAndIsRejected(t *testing.T) {
	t.Parallel()
	o := setupOutbox(t)
	hook := &refusing{size: largeSize}
	rdb := workertest.OpenRedis(t, o.redisURL)
	rdb.AddHook(hook)
	large := o.enqueueLarge(t, 40, largeSize)
	small := o.enqueue(t, 100)
	middling := o.enqueueLarge(t, 1, 1000)
	hook.also = middling[0]
	r := o.startRelay(t, func(cfg *Config) { cfg.Redis = rdb })
	o.until(t, "the small rows are moved", func() bool { return o.hasAll(t, small) })
	o.until(t, "the large ones are rejected", func() bool { return len(o.problems(t)) == len(large) })
	for id, problem := range o.problems(t) {
		if !slices.Contains(large, id) || problem != "Redis does not take the 262156 bytes of its payload, but answers otherwise: "+
			"tasks: enqueue note:take: UNKNOWN: redis eval error: write: connection reset by peer" {
			t.Errorf("%s has the problem %q", id, problem)
		}
	}
	// A small row's size can't be the reason.
	select {
	case <-r.CaughtUp():
	case <-time.After(time.Minute):
		t.Error("the relay does not say that it has caught up, but for what Redis does not take")
	}
	if waiting, _ := o.stats(t); waiting != 1 || hook.tries() < maxTries {
		t.Errorf("%d rows wait after %d tries, want one and %d", waiting, hook.tries(), maxTries)
	}
}

func TestRelay_ARowThatWasNotTakenIsMovedWhenItIs(t *testing.T) {
	t.Parallel()
	o := setupOutbox(t)
	ids := o.enqueueLarge(t, 1, largeSize)
	hook := &refusing{size: 1 << 20, also: ids[0]}
	rdb := workertest.OpenRedis(t, o.redisURL)
	rdb.AddHook(hook)
	o.startRelay(t, func(cfg *Config) { cfg.Redis = rdb })
	o.until(t, "it is tried alone", func() bool { return hook.tries() >= 2 })
	hook.heal()
	o.requireMoved(t, ids)
}

func TestRelay_WhatRedisRefusesForAWhileIsNotRejected(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		spoil, mend func(*testing.T, *outboxBundle, *servers.Redis)
	}{
		"out of memory": {
			func(t *testing.T, o *outboxBundle, _ *servers.Redis) { o.configure(t, "maxmemory", "1mb") },
			func(t *testing.T, o *outboxBundle, _ *servers.Redis) { o.configure(t, "maxmemory", "0") },
		},
		"read-only": {
			func(t *testing.T, o *outboxBundle, _ *servers.Redis) {
				if err := o.rdb.Do(t.Context(), "REPLICAOF", "127.0.0.1", "1").Err(); err != nil {
					t.Fatal(err)
				}
			},
			func(t *testing.T, o *outboxBundle, _ *servers.Redis) {
				if err := o.rdb.Do(t.Context(), "REPLICAOF", "NO", "ONE").Err(); err != nil {
					t.Fatal(err)
				}
			},
		},
		"frozen": {
			func(t *testing.T, _ *outboxBundle, s *servers.Redis) {
				if err := s.Pause(); err != nil {
					t.Fatal(err)
				}
			},
			func(t *testing.T, _ *outboxBundle, s *servers.Redis) {
				if err := s.Resume(); err != nil {
					t.Fatal(err)
				}
			},
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			o := setupOutbox(t)
			server := o.ownRedis(t)
			large := o.enqueueLarge(t, 2, 500_000)
			c.spoil(t, o, server)
			o.startRelay(t)
			o.log.Wait(t, redisGone)
			time.Sleep(3 * holdFirst) // in which a relay that did not know better would try again
			if waiting, rejected := o.stats(t); waiting != 2 || rejected != 0 {
				t.Errorf("%d rows wait and %d are rejected, want two and none", waiting, rejected)
			}
			c.mend(t, o, server)
			o.until(t, "they are moved", func() bool { return o.hasAll(t, large) })
		})
	}
}
