package delivery

import (
	"context"
	"errors"
	"testing"

	"github.com/carpool-go/carpool/tasks"
	"github.com/carpool-go/carpool/worker/internal/workertest"
)

func TestExecutor_KeepsTheUniqueKeyOfAJobThatRunsWhileRedisLosesItsData(t *testing.T) {
	t.Parallel()
	started, finish := make(chan struct{}), make(chan struct{})
	f := execute(t, func(context.Context, *tasks.Job, probe) (string, error) {
		close(started)
		<-finish
		return "done", nil
	})
	rdb := f.Redis(t)
	opts := &tasks.EnqueueOptions{UniqueKey: "k"}
	first := f.enqueue(t, "x", opts)
	<-started
	if err := rdb.FlushDB(t.Context()).Err(); err != nil {
		t.Fatal(err)
	}
	const key = "carpool:unique:5:probe:k"
	workertest.Eventually(t, "the key is there again", func() bool { return rdb.Exists(t.Context(), key).Val() == 1 })
	_, err := f.Client.Enqueue(t.Context(), probe{"y"}, opts)
	if duplicate, ok := errors.AsType[*tasks.DuplicateError](err); !ok || duplicate.ID != first.ID {
		t.Errorf("error %v; want that the job that runs holds the key", err)
	}
	close(finish)
	workertest.Eventually(t, "the key is given up", func() bool { return rdb.Exists(t.Context(), key).Val() == 0 })
	f.records(t, 1)
	if n := rdb.Exists(t.Context(), key).Val(); n != 0 {
		t.Error("the key of a job that has ended is written again")
	}
}

func TestUniqueKey_OfAnotherJobAndOfOneThatHasEndedIsLeftAlone(t *testing.T) {
	t.Parallel()
	f := execute(t, func(context.Context, *tasks.Job, probe) (string, error) { return "", nil })
	rdb := f.Redis(t)
	const key = "carpool:unique:5:probe:k"
	if err := rdb.Set(t.Context(), key, "another 1000 default", 0).Err(); err != nil {
		t.Fatal(err)
	}
	var k uniqueKey
	k.begin("default", "mine", map[string]string{"carpool-unique": key})
	if err := k.hold(t.Context(), f.locks); err != nil {
		t.Fatal(err)
	}
	if holder := rdb.Get(t.Context(), key).Val(); holder != "another 1000 default" {
		t.Errorf("the holder is %q", holder)
	}
	rdb.Del(t.Context(), key)
	if err := k.end(nil); err != nil {
		t.Fatal(err)
	}
	if err := k.hold(t.Context(), f.locks); err != nil {
		t.Fatal(err)
	}
	if n := rdb.Exists(t.Context(), key).Val(); n != 0 {
		t.Error("a job that has ended holds its key")
	}
}
