package admin_test

import (
	"context"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/hibiken/asynq"
	"github.com/redis/go-redis/v9"

	"github.com/carpool-go/carpool/admin"
	"github.com/carpool-go/carpool/internal/instance"
	"github.com/carpool-go/carpool/internal/testservers"
	"github.com/carpool-go/carpool/tasks"
	"github.com/carpool-go/carpool/tasks/maintenance"
)

// snapshot is what a worker of any version writes.
const snapshot = `{"name":"a-00000001","version":"1.2.3","host":"box","pid":42,"started":"2027-01-15T08:00:00Z","seen":"2027-01-15T09:00:00Z",
	"queues":{"critical":6,"default":3},"own_queue":"instance-a-00000001","hands":10,"running":7,
	"pool":{"pool_size":5,"checked_in":1,"checked_out":6,"overflow":2,"invalid":3,"waiting":4},"database_away":true}`

// show writes the snapshot of an instance, or its name alone if it is "".
func (o *office) show(t *testing.T, name, snapshot string, seen time.Time) {
	t.Helper()
	if err := o.rdb.ZAdd(t.Context(), instance.Names, redis.Z{Score: float64(seen.Unix()), Member: name}).Err(); err != nil {
		t.Fatal(err)
	}
	if snapshot == "" {
		return
	}
	if err := o.rdb.Set(t.Context(), instance.SnapshotKey(name), snapshot, time.Minute).Err(); err != nil {
		t.Fatal(err)
	}
}

func TestStatus_ReadsTheInstances(t *testing.T) {
	t.Parallel()
	o := newOffice(t, nil)
	seen := time.Unix(1_800_000_000, 0)
	o.show(t, "a-00000001", snapshot, seen)
	o.show(t, "b-00000002", strings.ReplaceAll(strings.ReplaceAll(snapshot, "a-00000001", "b-00000002"), "T08", "T07"), seen)
	o.show(t, "dead-00000003", "", seen)
	now, err := o.Status(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if len(now.Instances) != 2 || now.Instances[0].Name != "b-00000002" {
		t.Fatalf("the instances, the oldest first: %+v", now.Instances)
	}
	want := admin.Instance{
		Name: "a-00000001", Version: "1.2.3", Host: "box", PID: 42,
		Started: time.Date(2027, 1, 15, 8, 0, 0, 0, time.UTC), Seen: time.Date(2027, 1, 15, 9, 0, 0, 0, time.UTC),
		Queues: map[string]int{"critical": 6, "default": 3}, OwnQueue: "instance-a-00000001", Concurrency: 10, Running: 7,
		Pool:         admin.InstancePool{PoolSize: 5, CheckedIn: 1, CheckedOut: 6, Overflow: 2, Invalid: 3, Waiting: 4},
		DatabaseAway: true,
	}
	if diff := cmp.Diff(want, now.Instances[1]); diff != "" {
		t.Errorf("an instance (-want +got):\n%s", diff)
	}
	if got := now.Instances[1].Weights(); got != "critical=6,default=3" {
		t.Errorf("its weights are %q", got)
	}
	if diff := cmp.Diff([]admin.MissingInstance{{Name: "dead-00000003", Seen: seen}}, now.Missing); diff != "" {
		t.Errorf("missing (-want +got):\n%s", diff)
	}
	for queue, served := range map[string]bool{"critical": true, "default": true, "low": false, "instance-a-00000001": true, "instance-dead-00000003": false} {
		if got := now.IsServed(queue); got != served {
			t.Errorf("IsServed(%q) is %t", queue, got)
		}
	}
}

func TestServedQueues_AreThoseOfInstancesAndOfOtherServersOfAsynq(t *testing.T) {
	t.Parallel()
	o := newOffice(t, nil)
	served := func() []string {
		t.Helper()
		queues, err := o.ServedQueues(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		return queues
	}
	if got := served(); len(got) != 0 {
		t.Errorf("with no worker: %v", got)
	}
	o.show(t, "a-00000001", snapshot, time.Now())
	if diff := cmp.Diff([]string{"critical", "default", "instance-a-00000001"}, served()); diff != "" {
		t.Errorf("with an instance (-want +got):\n%s", diff)
	}
	server := asynq.NewServerFromRedisClient(o.rdb, asynq.Config{Queues: map[string]int{"default": 1, "mail": 1}, LogLevel: asynq.FatalLevel})
	if err := server.Start(asynq.HandlerFunc(func(context.Context, *asynq.Task) error { return nil })); err != nil {
		t.Fatal(err)
	}
	defer server.Shutdown()
	for giveUp := time.Now().Add(time.Minute); !slices.Contains(served(), "mail"); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(giveUp) {
			t.Fatal("asynq doesn't show its server")
		}
	}
	if diff := cmp.Diff([]string{"critical", "default", "instance-a-00000001", "mail"}, served()); diff != "" {
		t.Errorf("with a server of asynq's (-want +got):\n%s", diff)
	}
	now, err := o.Status(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if !now.IsServed("mail") || now.IsServed("post") {
		t.Errorf("the status has %v", now.ServedQueues)
	}
}

func TestStatus_NamesTheKindsOfTheOutboxThatNobodyKnows(t *testing.T) {
	t.Parallel()
	db := migrated(t)
	o := newOffice(t, db)
	for range 2 {
		putInOutbox(t, db, "letter", "")
	}
	putInOutbox(t, db, "note", "")
	putInOutbox(t, db, "card", "no worker knows the kind card")
	knowing := func(name, kinds string) string {
		return strings.Replace(strings.ReplaceAll(snapshot, "a-00000001", name), `"hands"`, `"kinds":`+kinds+`,"hands"`, 1)
	}
	old := strings.ReplaceAll(snapshot, "a-00000001", "c-00000003")
	for _, step := range []struct {
		name, snapshot string
		want           []admin.OutboxKind
	}{
		{"", "", nil}, // nobody is up, which the status says itself
		{"a-00000001", knowing("a-00000001", `["post"]`), []admin.OutboxKind{{Kind: "letter", Rows: 2}, {Kind: "note", Rows: 1}}},
		{"b-00000002", knowing("b-00000002", `["note","post"]`), []admin.OutboxKind{{Kind: "letter", Rows: 2}}},
		{"c-00000003", old, nil}, // it may know all of them
		{"c-00000003", knowing("c-00000003", `["letter"]`), nil},
	} {
		if step.name != "" {
			o.show(t, step.name, step.snapshot, time.Now())
		}
		now, err := o.Status(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(step.want, now.Outbox.UnknownKinds); diff != "" {
			t.Errorf("with %s (-want +got):\n%s", step.name, diff)
		}
	}
	if kinds, ok, err := o.KnownKinds(t.Context()); err != nil || !ok || !slices.Equal(kinds, []string{"letter", "note", "post"}) {
		t.Errorf("known are %v, %t, %v", kinds, ok, err)
	}
}

func TestStatus_ReadsTheQueues(t *testing.T) {
	t.Parallel()
	o := newOffice(t, nil)
	for range 2 {
		o.enqueue(t, nil)
	}
	o.enqueue(t, &tasks.EnqueueOptions{RunAt: time.Now().Add(time.Hour)})
	o.giveUp(t, note{}, &tasks.EnqueueOptions{Queue: "critical"}, "the door is locked", time.Now(), 0)
	if err := o.Pause(t.Context(), "critical"); err != nil {
		t.Fatal(err)
	}
	now, err := o.Status(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	want := []admin.Queue{{Name: "critical", Archived: 1, Paused: true}, {Name: "default", Pending: 2, Scheduled: 1}}
	if diff := cmp.Diff(want, now.Queues, cmpopts.IgnoreFields(admin.Queue{}, "LatencyMS")); diff != "" {
		t.Errorf("queues (-want +got):\n%s", diff)
	}
}

func TestStatus_LeavesOutTheInstancesOwnQueues(t *testing.T) {
	t.Parallel()
	o := newOffice(t, nil)
	for _, queue := range []string{"critical", "default", "instance-billing"} {
		o.enqueue(t, &tasks.EnqueueOptions{Queue: queue})
	}
	if _, err := o.client.Enqueue(t.Context(), maintenance.PoolValidate{}, &tasks.EnqueueOptions{Queue: "instance-a-00000001"}); err != nil {
		t.Fatal(err)
	}
	now, err := o.Status(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, q := range now.Queues {
		names = append(names, q.Name)
	}
	if diff := cmp.Diff([]string{"critical", "default", "instance-billing"}, names); diff != "" {
		t.Errorf("queues (-want +got):\n%s", diff)
	}
}

func TestStatus_ReadsTheOutbox(t *testing.T) {
	t.Parallel()
	db := migrated(t)
	o := newOffice(t, db)
	if _, err := db.Exec(t.Context(), `INSERT INTO carpool.outbox (id, kind, payload, created_at, problem) SELECT gen_random_uuid(), 'note', '{}',
		now() - interval '2 minutes', CASE WHEN i > 2 THEN 'problem ' || i % 7 END FROM generate_series(1, 31) i`); err != nil {
		t.Fatal(err)
	}
	now, err := o.Status(t.Context())
	if err != nil || now.Outbox == nil || now.OutboxNote != "" {
		t.Fatalf("%+v, %v", now, err)
	}
	want := admin.Outbox{Waiting: 2, Rejected: 29, Problems: []admin.OutboxProblem{
		{Problem: "problem 3", Rows: 5}, {Problem: "problem 0", Rows: 4}, {Problem: "problem 1", Rows: 4}, {Problem: "problem 2", Rows: 4}, {Problem: "problem 4", Rows: 4},
	}}
	if diff := cmp.Diff(want, *now.Outbox, cmpopts.IgnoreFields(admin.Outbox{}, "OldestMS")); diff != "" || now.Outbox.OldestMS < 120_000 {
		t.Errorf("the oldest has waited %d ms; (-want +got):\n%s", now.Outbox.OldestMS, diff)
	}
}

func TestStatus_WithoutTheOutboxHasTheRestAndSaysWhy(t *testing.T) {
	t.Parallel()
	o := newOffice(t, nil)
	o.enqueue(t, nil)
	for name, c := range map[string]struct {
		admin *admin.Admin
		note  string
		err   string // "": none
	}{
		"no database":           {o.Admin, "not read: there is no database to look in", ""},
		"one without tables":    {admin.New(o.rdb, openDatabase(t, testservers.Postgres(t))), "this database has no table carpool.outbox; run the command migrate", ""},
		"one that is not there": {admin.New(o.rdb, openDatabase(t, "postgres://user:s3cr3t@127.0.0.1:1/app")), "it could not be read", "look at the outbox: "},
	} {
		now, err := c.admin.Status(t.Context())
		if now == nil || len(now.Queues) != 1 || now.Outbox != nil || now.OutboxNote != c.note {
			t.Errorf("%s: %+v", name, now)
		}
		switch {
		case c.err == "" && err != nil, c.err != "" && (err == nil || !strings.HasPrefix(err.Error(), c.err) || strings.Contains(err.Error(), "s3cr3t")):
			t.Errorf("%s: error %v, want %q", name, err, c.err)
		}
	}
}

func TestStatus_WithoutRedisIsNil(t *testing.T) {
	t.Parallel()
	now, err := admin.New(openRedis(t, "redis://:s3cr3t@127.0.0.1:1"), nil).Status(t.Context())
	if now != nil || err == nil || strings.Contains(err.Error(), "s3cr3t") {
		t.Errorf("%+v, %v", now, err)
	}
}
