package worker_test

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hibiken/asynq"
	"github.com/jackc/pgx/v5"

	"github.com/carpool-go/carpool/tasks"
	"github.com/carpool-go/carpool/worker"
	"github.com/carpool-go/carpool/worker/internal/workertest"
)

// counted is a group with a transactional kind that counts its runs.
type counted struct{ runs atomic.Int32 }

func (c *counted) Register(s *tasks.Set) {
	tasks.RegisterTx(s, func(context.Context, *tasks.Job, pgx.Tx, count) (string, error) {
		c.runs.Add(1)
		return "", nil
	})
}

type count struct{}

func (count) Kind() string           { return "count" }
func (count) Options() tasks.Options { return tasks.Options{} }
func (count) Validate() error        { return nil }

func TestRun_AForeignJobThatPostgresCannotKeepIsArchivedAtOnce(t *testing.T) {
	t.Parallel()
	b := workertest.Setup(t)
	long := make([]byte, 4000) // as text that can't be compressed
	_, _ = rand.Read(long)
	foreign := asynq.NewClientFromRedisClient(b.Redis(t))
	for _, c := range []struct{ id, kind, want string }{
		{"a\x00b", "count", "the job's id has a NUL, or isn't UTF-8, which Postgres can't keep; let its producer enqueue it under another"},
		{hex.EncodeToString(long), "count", "the job's id has 8000 bytes, and may have 1000, which Postgres can't keep; let its producer enqueue it under another"},
		{"kind", "cou\x00nt", "the job's kind has a NUL, or isn't UTF-8, which Postgres can't keep; let its producer enqueue it under another"},
		// What it can keep is run.
		{"report of 2026/11: \"ümläut\"\n", "count", ""},
		{strings.Repeat("é", 500), "count", ""},
	} {
		group := new(counted)
		ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
		_, err := foreign.EnqueueContext(ctx, asynq.NewTask(c.kind, []byte("{}")), asynq.TaskID(c.id), asynq.Retention(time.Hour))
		if err != nil {
			t.Fatal(err)
		}
		if err := worker.Run(ctx, burst(b, group)); err != nil || ctx.Err() != nil {
			t.Fatalf("%.20q: %v, %v", c.id, err, ctx.Err())
		}
		cancel()
		info, err := b.Inspector.GetTaskInfo("default", c.id)
		if err != nil {
			t.Fatal(err)
		}
		wantState, wantRuns := asynq.TaskStateArchived, int32(0)
		if c.want == "" {
			wantState, wantRuns = asynq.TaskStateCompleted, 1
		}
		if info.State != wantState || info.Retried != 0 || info.LastErr != c.want || group.runs.Load() != wantRuns {
			t.Errorf("%.20q: %s after %d retries and %d runs, with %q; want %s with %q",
				c.id, info.State, info.Retried, group.runs.Load(), info.LastErr, wantState, c.want)
		}
	}
}
