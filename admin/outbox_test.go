package admin_test

import (
	"errors"
	"fmt"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/carpool-go/carpool/admin"
	"github.com/carpool-go/carpool/dbpool"
	"github.com/carpool-go/carpool/internal/testservers"
)

// putInOutbox puts a job into the outbox, rejected unless problem is "", and returns its id.
func putInOutbox(t *testing.T, db *dbpool.Pool, kind, problem string) string {
	t.Helper()
	var id string
	if err := db.QueryRow(t.Context(), `INSERT INTO carpool.outbox (id, kind, payload, problem) VALUES (gen_random_uuid(), $1, '{"x": "s3cr3t"}', nullif($2, ''))
		RETURNING id::text`, kind, problem).Scan(&id); err != nil {
		t.Fatal(err)
	}
	return id
}

func idsOf(jobs []admin.OutboxJob) (ids []string) {
	for _, job := range jobs {
		ids = append(ids, job.ID)
	}
	return ids
}

func TestOutbox_JobsAreListedRetriedAndDeleted(t *testing.T) {
	t.Parallel()
	db := migrated(t)
	a := admin.New(nil, db) // the outbox needs no Redis
	waiting := putInOutbox(t, db, "note", "")
	bad := putInOutbox(t, db, "note", "text: must not be bad")
	worse := putInOutbox(t, db, "letter", "text: must not be worse")
	list := func(f admin.OutboxFilter) []admin.OutboxJob {
		t.Helper()
		jobs, err := a.OutboxJobs(t.Context(), f)
		if err != nil {
			t.Fatal(err)
		}
		return jobs
	}
	for _, c := range []struct {
		filter admin.OutboxFilter
		want   []string
	}{
		{admin.OutboxFilter{}, []string{waiting, bad, worse}},
		{admin.OutboxFilter{Limit: 1}, []string{waiting}},
		{admin.OutboxFilter{Kind: "note", Rejected: true}, []string{bad}},
		{admin.OutboxFilter{Waiting: true}, []string{waiting}},
		{admin.OutboxFilter{Problem: "worse"}, []string{worse}},
		{admin.OutboxFilter{IDs: []string{bad, "nobody"}}, []string{bad}},
	} {
		if diff := cmp.Diff(c.want, idsOf(list(c.filter))); diff != "" {
			t.Errorf("%+v (-want +got):\n%s", c.filter, diff)
		}
	}

	all := list(admin.OutboxFilter{})
	if job := all[1]; job.Kind != "note" || job.Problem != "text: must not be bad" || job.EnqueuedAt.IsZero() || job.AgeMS < 0 {
		t.Errorf("%+v", job)
	}
	retried, err := a.RetryOutbox(t.Context(), all)
	if diff := cmp.Diff([]string{bad, worse}, idsOf(retried)); err != nil || diff != "" {
		t.Errorf("retried, %v (-want +got):\n%s", err, diff)
	}
	deleted, err := a.DeleteOutbox(t.Context(), all[:2])
	if diff := cmp.Diff([]string{waiting, bad}, idsOf(deleted)); err != nil || diff != "" {
		t.Errorf("deleted, %v (-want +got):\n%s", err, diff)
	}
	if diff := cmp.Diff([]string{worse}, idsOf(list(admin.OutboxFilter{Waiting: true}))); diff != "" {
		t.Errorf("what is left (-want +got):\n%s", diff)
	}
}

func TestOutbox_AsManyJobsAsThereAreAreChanged(t *testing.T) {
	t.Parallel()
	db := migrated(t)
	a := admin.New(nil, db)
	const many = 2500
	if _, err := db.Exec(t.Context(), fmt.Sprintf(`INSERT INTO carpool.outbox (id, kind, payload, problem)
		SELECT gen_random_uuid(), 'note', '{}', 'bad' FROM generate_series(1, %d)`, many)); err != nil {
		t.Fatal(err)
	}
	jobs, err := a.OutboxJobs(t.Context(), admin.OutboxFilter{})
	if err != nil {
		t.Fatal(err)
	}
	if retried, err := a.RetryOutbox(t.Context(), jobs); len(retried) != many || err != nil {
		t.Errorf("%d are retried, %v", len(retried), err)
	}
}

func TestOutbox_AJobThatARelayMovesIsNotWaitedFor(t *testing.T) {
	t.Parallel()
	db := migrated(t)
	a := admin.New(nil, db)
	putInOutbox(t, db, "note", "bad")
	jobs, err := a.OutboxJobs(t.Context(), admin.OutboxFilter{})
	if err != nil {
		t.Fatal(err)
	}
	relay, err := openDatabase(t, db.Config().URL).Begin(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer relay.Rollback(t.Context())
	if _, err := relay.Exec(t.Context(), "SELECT FROM carpool.outbox FOR UPDATE"); err != nil {
		t.Fatal(err)
	}
	if retried, err := a.RetryOutbox(t.Context(), jobs); len(retried) != 0 || err != nil {
		t.Errorf("retried %v, %v", retried, err)
	}
	if deleted, err := a.DeleteOutbox(t.Context(), jobs); len(deleted) != 0 || err != nil {
		t.Errorf("deleted %v, %v", deleted, err)
	}
}

func TestOutbox_WithoutItIsAnErrorThatSaysSo(t *testing.T) {
	t.Parallel()
	if _, err := admin.New(nil, openDatabase(t, testservers.Postgres(t))).OutboxJobs(t.Context(), admin.OutboxFilter{}); !errors.Is(err, admin.ErrNoOutbox) {
		t.Errorf("a database without tables: %v", err)
	}
	none := admin.New(nil, nil)
	_, list := none.OutboxJobs(t.Context(), admin.OutboxFilter{})
	_, retry := none.RetryOutbox(t.Context(), nil)
	_, del := none.DeleteOutbox(t.Context(), nil)
	for _, err := range []error{list, retry, del} {
		if err == nil {
			t.Error("no database is no error")
		}
	}
}
