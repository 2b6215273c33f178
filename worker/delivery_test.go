package main

import (
	"context"
	"errors"
	"math"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/carpool-go/carpool/tasks"
)

// txProbe registers a transactional probe that counts its runs.
func txProbe(runs *atomic.Int32) func(*tasks.Set) {
	return func(s *tasks.Set) {
		tasks.RegisterTx(s, func(ctx context.Context, _ *tasks.Job, tx pgx.Tx, p probe) (string, error) {
			runs.Add(1)
			return p.Word, nil
		})
	}
}

// Its effects are committed, and then its worker died.
func TestFrame_JobThatIsRecordedIsDoneAlsoWhenItsTriesAreUsedUp(t *testing.T) {
	t.Parallel()
	b := setup(t)
	rdb := b.redis(t)
	r := startRescue(rdb, []string{"default"}, time.Second, discard())
	defer r.stop()
	info, err := b.client.Enqueue(t.Context(), probe{"x"}, &tasks.EnqueueOptions{MaxRetry: tasks.NoRetry})
	if err != nil {
		t.Fatal(err)
	}
	conn, err := pgx.Connect(t.Context(), b.databaseURL)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(context.Background())
	if _, err := conn.Exec(t.Context(), `INSERT INTO carpool.jobs_done (id, kind, queue, result) VALUES ($1, 'probe', 'default', '"first"')`, info.ID); err != nil {
		t.Fatal(err)
	}
	dies(t, rdb, info)
	var runs atomic.Int32
	f := b.runFrame(t, b, txProbe(&runs))
	result, err := f.wait(t, info)
	if err != nil || string(result) != `"first"` {
		t.Errorf("result %s, error %v; want the first run's result", result, err)
	}
}

// The machine is gone, and its session stays until the server notices.
func TestFrame_SessionOfAVanishedRunIsEndedWithinAShortTimeoutToo(t *testing.T) {
	t.Parallel()
	b := setup(t)
	conn, err := pgx.Connect(t.Context(), b.databaseURL)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(context.Background())
	info, err := b.client.Enqueue(t.Context(), probe{"x"}, &tasks.EnqueueOptions{MaxRetry: 1, Timeout: 5 * time.Second})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := conn.Exec(t.Context(), "BEGIN; SELECT pg_advisory_xact_lock(hashtextextended('carpool job "+info.ID+" probe', 0))"); err != nil {
		t.Fatal(err)
	}
	var runs atomic.Int32
	f := b.runFrame(t, b, txProbe(&runs))
	result, err := f.wait(t, info)
	if err != nil || string(result) != `"x"` {
		t.Errorf("result %s, error %v after %d runs", result, err, runs.Load())
	}
}

func TestFrame_AnyNumberOfRetriesIsTaken(t *testing.T) {
	t.Parallel()
	for name, n := range map[string]int{"MaxInt32": math.MaxInt32, "MaxInt": math.MaxInt} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var runs atomic.Int32
			f := runFrame(t, func(context.Context, *tasks.Job, probe) (string, error) {
				if runs.Add(1) == 1 {
					return "", tasks.RetryAfter(time.Millisecond, errors.New("not yet"))
				}
				return "ok", nil
			})
			if result, err := f.wait(t, f.enqueue(t, "x", &tasks.EnqueueOptions{MaxRetry: n})); err != nil {
				t.Errorf("result %s, error %v after %d runs", result, err, runs.Load())
			}
		})
	}
}

func TestFrame_RowsLeftOpenAreTheHandlersFailureAndNoOutage(t *testing.T) {
	t.Parallel()
	b := setup(t)
	var runs atomic.Int32
	f := b.runFrame(t, b, func(s *tasks.Set) {
		tasks.RegisterTx(s, func(ctx context.Context, _ *tasks.Job, tx pgx.Tx, p probe) (string, error) {
			runs.Add(1)
			rows, err := tx.Query(ctx, "SELECT generate_series(1, 100000)")
			if err != nil {
				return "", err
			}
			rows.Next() // the first is all it wants, and forgets Close
			return "", nil
		})
	})
	_, err := f.wait(t, f.enqueue(t, "x", &tasks.EnqueueOptions{MaxRetry: tasks.NoRetry}))
	if runs.Load() != 1 || strings.Contains(f.log.String(), "the database is away") {
		t.Errorf("%d runs for one try; error %v; the gate was shut: %v", runs.Load(), err, strings.Contains(f.log.String(), "the database is away"))
	}
}
