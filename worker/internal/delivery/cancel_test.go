package delivery

import (
	"context"
	"errors"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hibiken/asynq"
	"github.com/jackc/pgx/v5"

	"github.com/carpool-go/carpool/tasks"
	"github.com/carpool-go/carpool/worker/internal/workertest"
)

func TestCancel_CommandSaysWhatThereIsToSay(t *testing.T) {
	t.Parallel()
	b := setup(t)
	info, err := b.Client.Enqueue(t.Context(), probe{"x"}, nil)
	if err != nil {
		t.Fatal(err)
	}
	if _, errs, code := workertest.Run(t, b.Worker(t, nil, "cancel", info.ID)); code != 0 {
		t.Errorf("exit code %d: %s", code, errs)
	}
	if _, errs, code := workertest.Run(t, b.Worker(t, nil, "cancel", info.ID)); code != 1 || !strings.Contains(errs, "there is no such job") {
		t.Errorf("cancelled twice: exit code %d: %s", code, errs)
	}

	// One that is still in the outbox.
	conn, err := pgx.Connect(t.Context(), b.DatabaseURL)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(context.Background())
	set := new(tasks.Set)
	tasks.Register(set, func(context.Context, *tasks.Job, probe) (string, error) { return "", nil })
	if err := tasks.RecordKinds(t.Context(), conn, set); err != nil {
		t.Fatal(err)
	}
	var id string
	if err := conn.QueryRow(t.Context(), `SELECT carpool.enqueue('probe', '{"word": "x"}')`).Scan(&id); err != nil {
		t.Fatal(err)
	}
	if _, errs, code := workertest.Run(t, b.Worker(t, nil, "cancel", id)); code != 0 {
		t.Errorf("in the outbox: exit code %d: %s", code, errs)
	}
	if _, errs, code := workertest.Run(t, b.Worker(t, nil, "cancel", id)); code != 1 || !strings.Contains(errs, "there is no such job") {
		t.Errorf("in the outbox, cancelled twice: exit code %d: %s", code, errs)
	}
}

func TestCancel_RunningJobStopsAndIsNotRunAgain(t *testing.T) {
	t.Parallel()
	for name, cancel := range map[string]func(f *execution, id string) error{
		"by carpool": func(f *execution, id string) error { return f.Client.Cancel(t.Context(), id) },
		"in asynqmon": func(f *execution, id string) error {
			// Its subscription may not be there yet.
			for {
				if err := f.Inspector.CancelProcessing(id); err != nil {
					return err
				}
				time.Sleep(100 * time.Millisecond)
				if info, err := f.Inspector.GetTaskInfo("default", id); err != nil || info.State == asynq.TaskStateArchived {
					return err
				}
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var runs atomic.Int32
			f := execute(t, func(ctx context.Context, _ *tasks.Job, _ probe) (string, error) {
				runs.Add(1)
				<-ctx.Done()
				return "", ctx.Err()
			})
			info := f.enqueue(t, "x", &tasks.EnqueueOptions{UniqueKey: "k"})
			workertest.Eventually(t, "it runs", func() bool { return runs.Load() == 1 })
			if err := cancel(f, info.ID); err != nil {
				t.Fatal(err)
			}
			got, err := f.Inspector.GetTaskInfo("default", info.ID)
			if err != nil || got.State != asynq.TaskStateArchived {
				t.Fatalf("it is %+v, error %v; want it archived", got, err)
			}
			if got.LastErr != "cancelled" { // as asynqmon shows it
				t.Errorf("its last error is %q", got.LastErr)
			}
			if job := f.records(t, 1)[0]["job"].(map[string]any); job["outcome"] != outcomeCancelled {
				t.Errorf("the record is %v", job)
			}
			if err := f.Client.Cancel(t.Context(), info.ID); !errors.Is(err, tasks.ErrJobEnded) {
				t.Errorf("cancelled again: %v", err)
			}
			if runs.Load() != 1 {
				t.Errorf("it ran %d times", runs.Load())
			}
			f.enqueue(t, "its key is free", &tasks.EnqueueOptions{UniqueKey: "k"})
		})
	}
}

func TestCancel_JobThatSucceedsNeverthelessIsDoneAndKeepsItsResult(t *testing.T) {
	t.Parallel()
	for name, retention := range map[string]time.Duration{"retained": time.Hour, "not retained": 0} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			started := make(chan struct{})
			f := execute(t, func(ctx context.Context, _ *tasks.Job, _ probe) (string, error) {
				close(started)
				<-ctx.Done()
				return "result", nil // it was past the point of no return
			})
			info, err := asynq.NewClientFromRedisClient(f.Redis(t)).EnqueueContext(t.Context(),
				asynq.NewTask("probe", []byte(`{"word":"x"}`)), asynq.MaxRetry(5), asynq.Retention(retention))
			if err != nil {
				t.Fatal(err)
			}
			<-started
			if err := f.Client.Cancel(t.Context(), info.ID); !errors.Is(err, tasks.ErrJobEnded) {
				t.Errorf("error %v, want that it has ended", err)
			}
			got, err := f.Inspector.GetTaskInfo("default", info.ID)
			if retention == 0 {
				if !errors.Is(err, asynq.ErrTaskNotFound) {
					t.Errorf("%+v, %v; want it gone", got, err)
				}
				return
			}
			if err != nil || got.State != asynq.TaskStateCompleted || string(got.Result) != `"result"` || got.LastErr != "" ||
				time.Since(got.CompletedAt) > time.Minute {
				t.Errorf("%+v, %v; want it completed, with its result", got, err)
			}
		})
	}
}

// asynq archives it by itself.
func TestCancel_LastTryOfAJobOfOthersIsArchivedWithoutAWarning(t *testing.T) {
	t.Parallel()
	started := make(chan struct{})
	f := execute(t, func(ctx context.Context, _ *tasks.Job, _ probe) (string, error) {
		close(started)
		<-ctx.Done()
		return "", ctx.Err()
	})
	info := f.enqueueAsOthersDo(t)
	<-started
	if err := f.Client.Cancel(t.Context(), info.ID); err != nil {
		t.Fatal(err)
	}
	f.stop() // waits for what is put away
	if strings.Contains(f.log.String(), "could not be put away") {
		t.Error("there is a false warning")
	}
	if got, err := f.Inspector.GetTaskInfo(info.Queue, info.ID); err != nil || got.State != asynq.TaskStateArchived || got.LastErr != "cancelled" {
		t.Errorf("it is %+v, error %v", got, err)
	}
}

// The handler needs longer than the shutdown timeout, as at a deploy.
func TestCancel_WhileTheWorkerStopsLeavesNothingBehind(t *testing.T) {
	t.Parallel()
	started := make(chan struct{})
	f := execute(t, func(ctx context.Context, _ *tasks.Job, _ probe) (string, error) {
		close(started)
		<-ctx.Done()
		time.Sleep(1700 * time.Millisecond) // winds up; the shutdown timeout is 1 s, and 2 s later nobody waits for it any more
		return "", ctx.Err()
	})
	info := f.enqueue(t, "x", nil)
	<-started
	cancelled := make(chan error)
	go func() { cancelled <- f.Client.Cancel(t.Context(), info.ID) }()
	time.Sleep(300 * time.Millisecond)
	f.stop()
	if err := <-cancelled; err != nil {
		t.Error(err)
	}
	if got, err := f.Inspector.GetTaskInfo("default", info.ID); err != nil || got.State != asynq.TaskStateArchived {
		t.Errorf("it is %+v, %v; want it archived", got, err)
	}
}

func TestCancel_WaitingJobIsRemoved(t *testing.T) {
	t.Parallel()
	b := setup(t)
	for name, opts := range map[string]*tasks.EnqueueOptions{
		"pending":   {UniqueKey: "a"},
		"scheduled": {UniqueKey: "b", RunAt: time.Now().Add(time.Hour)},
	} {
		info, err := b.Client.Enqueue(t.Context(), probe{name}, opts)
		if err != nil {
			t.Fatal(err)
		}
		if err := b.Client.Cancel(t.Context(), info.ID); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if _, err := b.Inspector.GetTaskInfo("default", info.ID); !errors.Is(err, asynq.ErrTaskNotFound) {
			t.Errorf("%s: it is still there: %v", name, err)
		}
		if _, err := b.Client.Enqueue(t.Context(), probe{name}, opts); err != nil {
			t.Errorf("%s: its key is not free: %v", name, err)
		}
	}
	if err := b.Client.Cancel(t.Context(), "nobody"); !errors.Is(err, tasks.ErrNoSuchJob) {
		t.Errorf("an unknown id: %v", err)
	}
}

func TestCancel_LeavesWhatSucceedsToItsWorker(t *testing.T) {
	t.Parallel()
	var running atomic.Int32
	f := execute(t, func(ctx context.Context, _ *tasks.Job, _ probe) (string, error) {
		running.Add(1)
		<-ctx.Done()
		time.Sleep(37 * time.Millisecond)
		return "result", nil
	})
	for i := range int32(10) {
		info := f.enqueue(t, "x", nil)
		workertest.Eventually(t, "it runs", func() bool { return running.Load() == i+1 })
		if err := f.Client.Cancel(t.Context(), info.ID); !errors.Is(err, tasks.ErrJobEnded) {
			t.Errorf("error %v, want that it has ended", err)
		}
	}
}
