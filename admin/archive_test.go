package admin_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/redis/go-redis/v9"

	"github.com/carpool-go/carpool/admin"
	"github.com/carpool-go/carpool/internal/asynqwire"
	"github.com/carpool-go/carpool/tasks"
)

// letter is another kind of job that nobody runs.
type letter struct{ note }

func (letter) Kind() string { return "letter" }

// giveUp puts a job in the archive of its queue that has failed with reason, at a time,
// after it was retried.
func (o *office) giveUp(t *testing.T, p tasks.Payload, opts *tasks.EnqueueOptions, reason string, at time.Time, retried int) *tasks.Info {
	t.Helper()
	info, err := o.client.Enqueue(t.Context(), p, opts)
	if err != nil {
		t.Fatal(err)
	}
	msg, err := asynqwire.ReadMessage(t.Context(), o.rdb, info.Queue, info.ID)
	if err != nil {
		t.Fatal(err)
	}
	msg.Retried, msg.LastErr, msg.LastFailedAt = retried, reason, at.Unix()
	if err := o.rdb.HSet(t.Context(), asynqwire.Task(info.Queue, info.ID), "msg", msg.Encode()).Err(); err != nil {
		t.Fatal(err)
	}
	if err := o.inspector.ArchiveTask(info.Queue, info.ID); err != nil {
		t.Fatal(err)
	}
	if err := o.rdb.ZAdd(t.Context(), asynqwire.Archived(info.Queue), redis.Z{Score: float64(at.Unix()), Member: info.ID}).Err(); err != nil {
		t.Fatal(err)
	}
	return info
}

func (o *office) archived(t *testing.T, f admin.ArchiveFilter) []admin.ArchivedJob {
	t.Helper()
	jobs, err := o.Archived(t.Context(), f)
	if err != nil {
		t.Fatal(err)
	}
	return jobs
}

func TestArchived_ReturnsWhatTheFilterChoosesTheLatestFirst(t *testing.T) {
	t.Parallel()
	o := newOffice(t, nil)
	if jobs := o.archived(t, admin.ArchiveFilter{}); len(jobs) != 0 {
		t.Errorf("of nothing: %+v", jobs)
	}
	monday := time.Now().Add(-48 * time.Hour).Truncate(time.Second).UTC() // and no longer ago than an archive keeps
	first := o.giveUp(t, note{"s3cr3t"}, nil, "the door is locked", monday, 3)
	third := o.giveUp(t, letter{}, nil, "the box is full", monday.Add(2*time.Hour), 0)
	second := o.giveUp(t, note{}, &tasks.EnqueueOptions{Queue: "low"}, "context canceled", monday.Add(time.Hour), 1)
	o.enqueue(t, nil) // is not in the archive

	want := admin.ArchivedJob{
		ID: first.ID, Kind: "note", Queue: "default", Tries: 4, ArchivedAt: monday, Reason: "the door is locked", Payload: []byte(`{"text":"s3cr3t"}`),
	}
	ignoreHidden := cmp.FilterPath(func(p cmp.Path) bool { return slices.Contains([]string{".headers", ".lost"}, p.Last().String()) }, cmp.Ignore())
	if diff := cmp.Diff(want, o.archived(t, admin.ArchiveFilter{})[2], ignoreHidden); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	for name, c := range map[string]struct {
		filter admin.ArchiveFilter
		want   []string
	}{
		"all":         {admin.ArchiveFilter{}, []string{third.ID, second.ID, first.ID}},
		"a kind":      {admin.ArchiveFilter{Kind: "note"}, []string{second.ID, first.ID}},
		"a reason":    {admin.ArchiveFilter{Reason: "is "}, []string{third.ID, first.ID}},
		"cancelled":   {admin.ArchiveFilter{Reason: "cancelled"}, []string{second.ID}},
		"a queue":     {admin.ArchiveFilter{Queue: "low"}, []string{second.ID}},
		"all of them": {admin.ArchiveFilter{Kind: "note", Reason: "door", Queue: "default"}, []string{first.ID}},
		"ids":         {admin.ArchiveFilter{IDs: []string{first.ID, "not-there", third.ID}}, []string{third.ID, first.ID}},
		"id and kind": {admin.ArchiveFilter{IDs: []string{first.ID, third.ID}, Kind: "note"}, []string{first.ID}},
		"no ids":      {admin.ArchiveFilter{IDs: []string{}}, nil},
		"none":        {admin.ArchiveFilter{Kind: "note", Queue: "elsewhere"}, nil},
	} {
		var ids []string
		for _, job := range o.archived(t, c.filter) {
			ids = append(ids, job.ID)
		}
		if diff := cmp.Diff(c.want, ids); diff != "" {
			t.Errorf("%s (-want +got):\n%s", name, diff)
		}
	}
}

// asynq's Inspector is what asynqmon archives with. It leaves the job as it is.
func TestArchived_TellsWhatIsTrueOfAJobThatWasArchivedByHand(t *testing.T) {
	t.Parallel()
	o := newOffice(t, nil)
	now := time.Now().Truncate(time.Second)
	for name, c := range map[string]struct {
		id       string
		failedAt time.Time
		want     admin.ArchivedJob
	}{
		"never run":          {o.enqueue(t, nil).ID, time.Time{}, admin.ArchivedJob{Tries: 0, Reason: admin.ArchivedByHand}},
		"not due":            {o.enqueue(t, &tasks.EnqueueOptions{RunAt: now.Add(time.Hour)}).ID, time.Time{}, admin.ArchivedJob{Tries: 0, Reason: admin.ArchivedByHand}},
		"failed twice":       {o.giveUp(t, note{}, nil, "the door is locked", now, 2).ID, now.Add(-time.Hour), admin.ArchivedJob{Tries: 2, Reason: "the door is locked"}},
		"given up":           {o.giveUp(t, note{}, nil, "the door is locked", now, 2).ID, now.Add(-time.Second), admin.ArchivedJob{Tries: 3, Reason: "the door is locked"}},
		"cancelled, is said": {o.giveUp(t, note{}, nil, "cancelled", now, 2).ID, now.Add(-time.Hour), admin.ArchivedJob{Tries: 3, Reason: "cancelled"}},
	} {
		if c.failedAt.IsZero() {
			if err := o.inspector.ArchiveTask("default", c.id); err != nil {
				t.Fatal(err)
			}
		} else {
			msg, err := asynqwire.ReadMessage(t.Context(), o.rdb, "default", c.id)
			if err != nil {
				t.Fatal(err)
			}
			msg.LastFailedAt = c.failedAt.Unix()
			if err := o.rdb.HSet(t.Context(), asynqwire.Task("default", c.id), "msg", msg.Encode()).Err(); err != nil {
				t.Fatal(err)
			}
		}
		one, err := o.ArchivedJob(t.Context(), "default", c.id)
		if err != nil {
			t.Fatal(err)
		}
		all := o.archived(t, admin.ArchiveFilter{})
		listed := all[slices.IndexFunc(all, func(job admin.ArchivedJob) bool { return job.ID == c.id })]
		for how, got := range map[string]admin.ArchivedJob{"by its id": one, "listed": listed} {
			if got.Tries != c.want.Tries || got.Reason != c.want.Reason || got.ArchivedAt.Sub(now).Abs() > time.Minute || got.ArchivedAt.Location() != time.UTC {
				t.Errorf("%s, %s: %d tries, at %s, %q; want %d, about now, %q", name, how, got.Tries, got.ArchivedAt, got.Reason, c.want.Tries, c.want.Reason)
			}
		}
	}
}

func TestArchived_ReturnsMoreThanAPage(t *testing.T) {
	t.Parallel()
	o := newOffice(t, nil)
	const many = 1001
	for range many {
		o.enqueue(t, nil)
	}
	if _, err := o.inspector.ArchiveAllPendingTasks("default"); err != nil {
		t.Fatal(err)
	}
	ids := make(map[string]bool)
	for _, job := range o.archived(t, admin.ArchiveFilter{}) {
		ids[job.ID] = true
	}
	if len(ids) != many {
		t.Errorf("%d jobs, want %d", len(ids), many)
	}
}

func TestArchivedJob_IsOneThatIsInTheArchive(t *testing.T) {
	t.Parallel()
	o := newOffice(t, nil)
	there, pending := o.giveUp(t, note{}, nil, "the door is locked", time.Now(), 1), o.enqueue(t, nil)
	job, err := o.ArchivedJob(t.Context(), "default", there.ID)
	if err != nil || job.ID != there.ID || job.Reason != "the door is locked" || job.Tries != 2 {
		t.Errorf("%+v, %v", job, err)
	}
	for name, c := range map[string][2]string{
		"one that waits": {"default", pending.ID}, "no job": {"default", "nobody"}, "no queue": {"elsewhere", there.ID},
	} {
		if _, err := o.ArchivedJob(t.Context(), c[0], c[1]); !errors.Is(err, admin.ErrNotArchived) {
			t.Errorf("%s: error %v", name, err)
		}
	}
}

func TestRetry_PutsAJobBackWithAllItsTries(t *testing.T) {
	t.Parallel()
	o := newOffice(t, nil)
	info := o.giveUp(t, note{"hello"}, &tasks.EnqueueOptions{MaxRetry: 3}, "the door is locked", time.Now(), 3)
	job := o.archived(t, admin.ArchiveFilter{})[0]
	if err := o.Retry(t.Context(), job); err != nil {
		t.Fatal(err)
	}
	now, err := o.client.Get(t.Context(), info.Queue, info.ID)
	if err != nil || now.State != tasks.StatePending || now.Retried != 0 || now.MaxRetry != 3 || string(now.Payload) != `{"text":"hello"}` {
		t.Errorf("put back, it is %+v, %v", now, err)
	}
	if jobs := o.archived(t, admin.ArchiveFilter{}); len(jobs) != 0 {
		t.Errorf("the archive still has it: %+v", jobs)
	}
	if err := o.Retry(t.Context(), job); !errors.Is(err, admin.ErrNotArchived) {
		t.Errorf("a second time: error %v", err)
	}
	if n, err := o.rdb.LLen(t.Context(), asynqwire.Pending("default")).Result(); err != nil || n != 1 {
		t.Errorf("it waits %d times, %v", n, err)
	}
}

func TestRetry_JobHasItsUniqueKeyAgainOrStays(t *testing.T) {
	t.Parallel()
	o := newOffice(t, nil)
	unique := &tasks.EnqueueOptions{UniqueKey: "k"}
	o.giveUp(t, note{"first"}, unique, "the door is locked", time.Now(), 0)
	second := o.enqueue(t, unique)
	first := o.archived(t, admin.ArchiveFilter{})[0]
	err := o.Retry(t.Context(), first)
	if duplicate, ok := errors.AsType[*tasks.DuplicateError](err); !ok || duplicate.ID != second.ID || duplicate.Queue != "default" || duplicate.Key != "k" {
		t.Errorf("error %v, want that the second holds the key", err)
	}
	if jobs := o.archived(t, admin.ArchiveFilter{}); len(jobs) != 1 {
		t.Errorf("the archive has %+v, want the job", jobs)
	}
	if err := o.client.Cancel(t.Context(), second.ID); err != nil {
		t.Fatal(err)
	}
	if err := o.Retry(t.Context(), first); err != nil {
		t.Error(err)
	}
	_, err = o.client.Enqueue(t.Context(), note{"third"}, unique)
	if duplicate, ok := errors.AsType[*tasks.DuplicateError](err); !ok || duplicate.ID != first.ID {
		t.Errorf("error %v, want that the first holds the key again", err)
	}
}

func TestDelete_RemovesAJobForGood(t *testing.T) {
	t.Parallel()
	o := newOffice(t, nil)
	info := o.giveUp(t, note{}, nil, "the door is locked", time.Now(), 0)
	job := o.archived(t, admin.ArchiveFilter{})[0]
	if err := o.Delete(t.Context(), job); err != nil {
		t.Fatal(err)
	}
	if _, err := o.client.Get(t.Context(), info.Queue, info.ID); !errors.Is(err, tasks.ErrNoSuchJob) {
		t.Errorf("it is still there: %v", err)
	}
	if err := o.Delete(t.Context(), job); !errors.Is(err, admin.ErrNotArchived) {
		t.Errorf("a second time: error %v", err)
	}
}

func TestArchive_NothingIsChangedWhenTheContextHasEnded(t *testing.T) {
	t.Parallel()
	o := newOffice(t, nil)
	info := o.giveUp(t, note{}, nil, "the door is locked", time.Now(), 0)
	job := o.archived(t, admin.ArchiveFilter{})[0]
	ended, end := context.WithCancel(t.Context())
	end()
	_, listing := o.Archived(ended, admin.ArchiveFilter{})
	_, reading := o.ArchivedJob(ended, "default", job.ID)
	for name, err := range map[string]error{
		"Archived": listing, "ArchivedJob": reading, "Retry": o.Retry(ended, job), "Delete": o.Delete(ended, job),
	} {
		if !errors.Is(err, context.Canceled) {
			t.Errorf("%s: error %v", name, err)
		}
	}
	if state := o.stateOf(t, info); state != tasks.StateArchived {
		t.Errorf("it is %s", state)
	}
}

func TestNearlyFull_NamesTheQueuesFromTheWarningOn(t *testing.T) {
	t.Parallel()
	o := newOffice(t, nil)
	fill := func(queue string, n int) {
		t.Helper()
		members := make([]redis.Z, n)
		for i := range members {
			members[i] = redis.Z{Score: float64(i), Member: fmt.Sprint(i)}
		}
		if err := o.rdb.ZAdd(t.Context(), asynqwire.Archived(queue), members...).Err(); err != nil {
			t.Fatal(err)
		}
		if err := o.rdb.SAdd(t.Context(), asynqwire.Queues, queue).Err(); err != nil {
			t.Fatal(err)
		}
	}
	fill("default", admin.ArchiveWarning)
	fill("low", admin.ArchiveWarning-1)
	full, err := o.NearlyFull(t.Context())
	if diff := cmp.Diff([]string{"default"}, full); diff != "" || err != nil {
		t.Errorf("%v (-want +got):\n%s", err, diff)
	}
}
