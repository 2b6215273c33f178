package admin_test

import (
	"errors"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/carpool-go/carpool/admin"
	"github.com/carpool-go/carpool/internal/asynqwire"
	"github.com/carpool-go/carpool/internal/asynqwire/wiretest"
	"github.com/carpool-go/carpool/tasks"
)

func TestStatus_CountsTheJobsThatHaveLostTheirDataAndShowsTheRest(t *testing.T) {
	t.Parallel()
	for _, how := range wiretest.Losses() {
		t.Run(how, func(t *testing.T) {
			t.Parallel()
			o := newOffice(t, nil)
			for _, state := range asynqwire.States() {
				wiretest.Put(t, o.rdb, "default", state, state)
				wiretest.Put(t, o.rdb, "default", state+"-sound", state)
				wiretest.Lose(t, o.rdb, "default", state, how)
			}
			wiretest.Put(t, o.rdb, "low", "a", "pending")
			now, err := o.Status(t.Context())
			if err != nil || len(now.Queues) != 2 {
				t.Fatalf("%+v, %v", now, err)
			}
			if q := now.Queues[1]; q.Pending != 1 || q.LatencyMS > 10_000 || q.Lost != nil {
				t.Errorf("the sound queue is %+v", q)
			}
			now.Queues[0].LatencyMS = 0
			want := admin.Queue{
				Name: "default", Pending: 2, Active: 2, Scheduled: 2, Retry: 2, Archived: 2, Completed: 2,
				Lost: map[string]int{"pending": 1, "active": 1, "scheduled": 1, "retry": 1, "archived": 1, "completed": 1},
			}
			if diff := cmp.Diff(want, now.Queues[0]); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
}

func TestArchived_NamesTheJobsThatHaveLostTheirData(t *testing.T) {
	t.Parallel()
	for _, how := range append(wiretest.Losses(), "unreadable") {
		t.Run(how, func(t *testing.T) {
			t.Parallel()
			o := newOffice(t, nil)
			for _, id := range []string{"one", "lost", "two"} {
				wiretest.Put(t, o.rdb, "default", id, "archived")
			}
			wiretest.Lose(t, o.rdb, "default", "lost", how)
			ids := func(f admin.ArchiveFilter) (ids []string) {
				for _, job := range o.archived(t, f) {
					ids = append(ids, job.ID)
				}
				return ids
			}
			if all := ids(admin.ArchiveFilter{}); len(all) != 3 {
				t.Errorf("all are %q", all)
			}
			for name, f := range map[string]admin.ArchiveFilter{"its reason": {Reason: "its data is gone"}, "its id": {IDs: []string{"lost"}}} {
				jobs := o.archived(t, f)
				if len(jobs) != 1 || jobs[0].ID != "lost" || jobs[0].Queue != "default" || jobs[0].ArchivedAt.IsZero() {
					t.Fatalf("by %s it is %+v", name, jobs)
				}
			}
			job := o.archived(t, admin.ArchiveFilter{IDs: []string{"lost"}})[0]
			if err := o.Retry(t.Context(), job); !errors.Is(err, tasks.ErrJobLost) || !strings.HasPrefix(err.Error(), "job lost: its data is gone") {
				t.Errorf("Retry: %v", err)
			}
			if err := o.Delete(t.Context(), job); err != nil {
				t.Error(err)
			}
			if diff := cmp.Diff(2, len(ids(admin.ArchiveFilter{}))); diff != "" {
				t.Errorf("after its deletion (-want +got):\n%s", diff)
			}
			if err := o.Delete(t.Context(), job); !errors.Is(err, admin.ErrNotArchived) && how != "overwritten" {
				t.Errorf("a second time: %v", err)
			}
		})
	}
}

func TestArchived_ReadsAnArchiveThatIsSomethingElseAsEmpty(t *testing.T) {
	t.Parallel()
	o := newOffice(t, nil)
	o.enqueue(t, nil)
	if err := o.rdb.Set(t.Context(), asynqwire.Archived("default"), "mine", 0).Err(); err != nil {
		t.Fatal(err)
	}
	if jobs := o.archived(t, admin.ArchiveFilter{}); len(jobs) != 0 {
		t.Errorf("%+v", jobs)
	}
	if _, err := o.NearlyFull(t.Context()); err != nil {
		t.Error(err)
	}
	now, err := o.Status(t.Context())
	if err != nil || len(now.Queues) != 1 || now.Queues[0].Pending != 1 {
		t.Fatalf("%+v, %v", now, err)
	}
	if diff := cmp.Diff([]string{asynqwire.Archived("default")}, now.Queues[0].Unreadable); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}
