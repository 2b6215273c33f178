package scheduler

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/hibiken/asynq"
	"github.com/jackc/pgx/v5"
	"github.com/redis/go-redis/v9"

	"github.com/carpool-go/carpool/dbpool"
	"github.com/carpool-go/carpool/internal/limit"
	"github.com/carpool-go/carpool/internal/testservers"
	"github.com/carpool-go/carpool/tasks"
	"github.com/carpool-go/carpool/tasks/rowsprune"
	"github.com/carpool-go/carpool/tasks/taskstest"
)

func TestMain(m *testing.M) { taskstest.Main(m) }

// Ping is a kind of job for tests.
type Ping struct {
	To string `json:"to"`
}

func (Ping) Kind() string           { return "test:ping" }
func (Ping) Options() tasks.Options { return tasks.Options{Queue: "pings"} }

func (p Ping) Validate() error {
	if p.To == "" {
		return errors.New("to: is missing")
	}
	return nil
}

func pings() *tasks.Set {
	set := new(tasks.Set)
	tasks.Register(set, func(context.Context, *tasks.Job, Ping) (any, error) { return nil, nil })
	return set
}

// bench is a database with a clock that the test moves, and a Redis. Each row
// that comes into the outbox is noted.
type bench struct {
	*taskstest.Kit
	rdb       redis.UniversalClient
	inspector *asynq.Inspector
	log       *testservers.Log
}

func newBench(t *testing.T) *bench {
	t.Helper()
	b := &bench{Kit: taskstest.New(t), log: new(testservers.Log)}
	rdb, err := tasks.OpenRedis(b.RedisURL)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = rdb.Close() })
	b.rdb, b.inspector = rdb, asynq.NewInspectorFromRedisClient(rdb)
	b.exec(t, `
		CREATE TABLE test_clock (at timestamptz NOT NULL);
		INSERT INTO test_clock VALUES (date_trunc('minute', now()) + interval '5 minutes');
		CREATE TABLE test_jobs (n bigint GENERATED ALWAYS AS IDENTITY, id text NOT NULL, to_whom text);
		CREATE FUNCTION test_note() RETURNS trigger LANGUAGE plpgsql AS $$
		BEGIN
			INSERT INTO test_jobs (id, to_whom) VALUES (NEW.id, NEW.payload ->> 'to');
			RETURN NULL;
		END $$;
		CREATE TRIGGER test_note AFTER INSERT ON carpool.outbox FOR EACH ROW EXECUTE FUNCTION test_note();`)
	return b
}

func (b *bench) exec(t *testing.T, sql string, args ...any) {
	t.Helper()
	conn, err := b.DB.Acquire(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Release()
	if len(args) == 0 { // several statements
		_, err = conn.Exec(t.Context(), sql, pgx.QueryExecModeSimpleProtocol)
	} else {
		_, err = conn.Exec(t.Context(), sql, args...)
	}
	if err != nil {
		t.Fatal(err)
	}
}

func (b *bench) config(entries ...Entry) Config {
	return Config{
		DB: b.DB, Tasks: pings(), Entries: entries, Redis: b.rdb, Log: slog.New(slog.NewTextHandler(b.log, nil)),
		clock: "(SELECT at FROM test_clock)", lookEvery: time.Millisecond,
	}
}

// scheduler returns one that looks when the test says so.
func (b *bench) scheduler(t *testing.T, entries ...Entry) *Scheduler {
	t.Helper()
	s, err := New(b.config(entries...))
	if err != nil {
		t.Fatal(err)
	}
	if err := s.register(t.Context()); err != nil {
		t.Fatal(err)
	}
	return s
}

// start starts a scheduler that looks by itself.
func start(t *testing.T, cfg Config) *Scheduler {
	t.Helper()
	s, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Stop)
	if err := s.Start(); err != nil {
		t.Fatal(err)
	}
	return s
}

func look(t *testing.T, s *Scheduler) {
	t.Helper()
	if _, err := s.look(t.Context()); err != nil {
		t.Fatal(err)
	}
}

// pass moves the clock on.
func (b *bench) pass(t *testing.T, d time.Duration) {
	t.Helper()
	b.exec(t, "UPDATE test_clock SET at = at + make_interval(secs => $1)", d.Seconds())
}

func (b *bench) now(t *testing.T) time.Time {
	t.Helper()
	var now time.Time
	if err := b.DB.QueryRow(t.Context(), "SELECT at FROM test_clock").Scan(&now); err != nil {
		t.Fatal(err)
	}
	return now
}

// settle makes the ticks of the past no entry's, as if all had been decided.
func (b *bench) settle(t *testing.T) {
	t.Helper()
	b.exec(t, "UPDATE carpool.schedules SET changed_at = at FROM test_clock WHERE true")
}

// jobs are those enqueued so far, by their payload and in their order.
func (b *bench) jobs(t *testing.T) []string {
	t.Helper()
	rows, err := b.DB.Query(t.Context(), "SELECT to_whom FROM test_jobs ORDER BY n")
	if err != nil {
		t.Fatal(err)
	}
	jobs, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		t.Fatal(err)
	}
	return jobs
}

// ids are those of the jobs of one payload.
func (b *bench) ids(t *testing.T, to string) []string {
	t.Helper()
	rows, err := b.DB.Query(t.Context(), "SELECT id FROM test_jobs WHERE to_whom = $1 ORDER BY n", to)
	if err != nil {
		t.Fatal(err)
	}
	ids, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		t.Fatal(err)
	}
	return ids
}

func (b *bench) status(t *testing.T, name string) Status {
	t.Helper()
	list, err := List(t.Context(), b.DB)
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range list {
		if s.Name == name {
			return s
		}
	}
	t.Fatalf("there is no entry %s", name)
	return Status{}
}

// deliver does what the relay does.
func (b *bench) deliver(t *testing.T) {
	t.Helper()
	rows, err := b.DB.Query(t.Context(), "DELETE FROM carpool.outbox RETURNING id::text, payload ->> 'to'")
	if err != nil {
		t.Fatal(err)
	}
	var id, to string
	if _, err := pgx.ForEachRow(rows, []any{&id, &to}, func() error {
		_, err := b.Client.Enqueue(t.Context(), Ping{To: to}, &tasks.EnqueueOptions{ID: id})
		return err
	}); err != nil {
		t.Fatal(err)
	}
}

func TestScheduler_StopMayBeCalledTwiceAndWithoutStart(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	s, err := New(b.config())
	if err != nil {
		t.Fatal(err)
	}
	s.Stop()
	if err := s.Start(); err != nil {
		t.Fatal(err)
	}
	s.Stop()
	s.Stop()
}

func TestNew_SaysWhatIsMissingOrWrong(t *testing.T) {
	t.Parallel()
	if _, err := New(Config{}); err == nil {
		t.Error("an empty Config makes a scheduler")
	}
	b := newBench(t)
	good := Entry{Name: "a", Cron: "@daily", Payload: Ping{To: "a"}}
	for want, spoil := range map[string]func(*Entry){
		"name: ":       func(e *Entry) { e.Name = "a b" },
		"cron: ":       func(e *Entry) { e.Cron = "often" },
		"time_zone: ":  func(e *Entry) { e.TimeZone = "Europe/Atlantis" },
		"payload: ":    func(e *Entry) { e.Payload = Ping{} },
		"kind: ":       func(e *Entry) { e.Payload = rowsprune.Prune{Table: "a.b", Column: "c", OlderThan: "1d"} },
		"missed: ":     func(e *Entry) { e.Missed = "never" },
		"overlap: ":    func(e *Entry) { e.Overlap = "never" },
		"queue: ":      func(e *Entry) { e.Options.Queue = "a=1" },
		"worker's own": func(e *Entry) { e.Options.Queue = "instance-host-01234567" },
		"timeout: ":    func(e *Entry) { e.Options.Timeout = time.Millisecond },
		"retention: ":  func(e *Entry) { e.Options.Retention = time.Millisecond },
		"isolation: ":  func(e *Entry) { e.Options.Isolation = pgx.Serializable },
	} {
		e := good
		spoil(&e)
		if _, err := New(b.config(e)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v, want %q in it", err, want)
		}
	}
	large := good
	large.Payload = Ping{To: strings.Repeat("x", 1<<20)}
	cfg := b.config(large)
	if _, err := New(cfg); err == nil || !strings.Contains(err.Error(), "payload: 1048585 bytes are more than the limit of 1048576, which MAX_PAYLOAD sets") {
		t.Errorf("a payload above the limit: %.300v", err)
	}
	cfg.MaxPayload = 2 << 20
	if _, err := New(cfg); err != nil {
		t.Errorf("a payload below a larger limit: %.300v", err)
	}
	if _, err := New(b.config(good, good)); err == nil || !strings.Contains(err.Error(), `"a"`) {
		t.Errorf("two entries of one name: %v", err)
	}
}

func TestEntry_ItsJobCarriesItsOptions(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	s := b.scheduler(t, Entry{
		Name: "a", Cron: "* * * * *", Payload: Ping{To: "a"},
		Options: tasks.Options{Queue: "other", MaxRetry: tasks.NoRetry, Timeout: 90 * time.Second, Retention: time.Hour},
	}, Entry{Name: "b", Cron: "* * * * *", Payload: Ping{To: "b"}})
	b.settle(t)
	b.pass(t, time.Minute)
	look(t, s)
	rows, err := b.DB.Query(t.Context(), `SELECT concat_ws(' ', id, kind, payload ->> 'to', queue, max_retry, timeout, retention)
		FROM carpool.outbox ORDER BY seq`)
	if err != nil {
		t.Fatal(err)
	}
	got, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		t.Fatal(err)
	}
	want := []string{
		tickID("a", b.now(t)).String() + " test:ping a other 0 00:01:30 01:00:00",
		tickID("b", b.now(t)).String() + " test:ping b",
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}

func TestMissed_SkipOnceAndAll(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	s := b.scheduler(t,
		Entry{Name: "skip", Cron: "* * * * *", Payload: Ping{To: "skip"}, Missed: MissedSkip},
		Entry{Name: "once", Cron: "* * * * *", Payload: Ping{To: "once"}},
		Entry{Name: "all", Cron: "* * * * *", Payload: Ping{To: "all"}, Missed: MissedAll})
	b.settle(t)
	start := b.now(t)

	count := func() map[string]int {
		n := map[string]int{}
		for _, to := range b.jobs(t) {
			n[to]++
		}
		return n
	}
	b.pass(t, 5*time.Minute+30*time.Second) // nobody is there, and none of the ticks is on time
	look(t, s)
	look(t, s) // which changes nothing
	if diff := cmp.Diff(map[string]int{"once": 1, "all": 5}, count()); diff != "" {
		t.Errorf("after an outage: %s", diff)
	}
	if got, want := b.ids(t, "once"), tickID("once", start.Add(5*time.Minute)).String(); got[0] != want {
		t.Errorf("once makes up for another tick than the last: %s, want %s", got, want)
	}
	b.pass(t, 30*time.Second+onTime) // as late as on time can be
	look(t, s)
	if diff := cmp.Diff(map[string]int{"skip": 1, "once": 2, "all": 6}, count()); diff != "" {
		t.Errorf("on time: %s", diff)
	}
	b.pass(t, 300*time.Minute) // missed is more than is made up for, and the last tick is on time
	look(t, s)
	if diff := cmp.Diff(map[string]int{"skip": 2, "once": 3, "all": 106}, count()); diff != "" {
		t.Errorf("after a long outage: %s", diff)
	}
	if !strings.Contains(b.log.String(), "ticks were left out") {
		t.Error("what was left out isn't logged")
	}
}

// The last tick is in Postgres: a Redis that lost everything changes nothing.
func TestMissed_SurvivesAFlushOfRedis(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	entry := Entry{Name: "a", Cron: "* * * * *", Payload: Ping{To: "a"}, Missed: MissedAll}
	b.scheduler(t, entry)
	b.settle(t)
	for range 3 {
		b.pass(t, time.Minute)
		look(t, b.scheduler(t, entry)) // another instance each time
		b.deliver(t)
		if err := b.rdb.FlushDB(t.Context()).Err(); err != nil {
			t.Fatal(err)
		}
		look(t, b.scheduler(t, entry))
	}
	if got := b.jobs(t); len(got) != 3 {
		t.Errorf("%d jobs for three ticks", len(got))
	}
}

func TestOverlap_SkipLeavesOutTicksUntilTheLastJobHasEnded(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	s := b.scheduler(t, Entry{Name: "a", Cron: "* * * * *", Payload: Ping{To: "a"}, Overlap: OverlapSkip, Missed: MissedAll})
	b.settle(t)
	tick := func(want int, when string) {
		t.Helper()
		b.pass(t, time.Minute)
		look(t, s)
		if got := len(b.jobs(t)); got != want {
			t.Fatalf("%s: %d jobs, want %d", when, got, want)
		}
	}
	tick(1, "the first")
	tick(1, "it is in the outbox")
	b.deliver(t)
	tick(1, "it is pending")
	id := b.ids(t, "a")[0]
	b.finish(t, id, errors.New("try again"))
	tick(1, "it waits for a retry")
	if err := b.inspector.ArchiveTask("pings", id); err != nil {
		t.Fatal(err)
	}
	tick(2, "it was archived")
	b.deliver(t)
	b.finish(t, b.ids(t, "a")[1], nil)
	tick(3, "it is done")
	b.exec(t, "UPDATE carpool.outbox SET problem = 'it is set aside'")
	tick(4, "it was set aside in the outbox")
}

func TestOverlap_QueueLetsOneTickWait(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	s := b.scheduler(t, Entry{Name: "a", Cron: "* * * * *", Payload: Ping{To: "a"}, Overlap: OverlapQueue, Missed: MissedSkip})
	b.settle(t)
	start := b.now(t)
	for range 4 { // the first runs, the second waits, the others are left out
		b.pass(t, time.Minute)
		look(t, s)
	}
	b.deliver(t)
	if got := b.jobs(t); len(got) != 1 {
		t.Fatalf("%d jobs while the first runs", len(got))
	}
	b.pass(t, 30*time.Second) // no tick is due or on time now
	look(t, s)
	b.finish(t, b.ids(t, "a")[0], nil)
	look(t, s)
	look(t, s)
	want := []string{tickID("a", start.Add(time.Minute)).String(), tickID("a", start.Add(2*time.Minute)).String()}
	if diff := cmp.Diff(want, b.ids(t, "a")); diff != "" {
		t.Error(diff)
	}
	// One that waits is dropped when the entry is disabled.
	b.pass(t, 30*time.Second)
	look(t, s)
	b.exec(t, "UPDATE carpool.schedules SET enabled = false")
	b.exec(t, "UPDATE carpool.schedules SET enabled = true")
	b.settle(t)
	b.deliver(t)
	b.finish(t, b.ids(t, "a")[1], nil)
	look(t, s)
	if diff := cmp.Diff(want, b.ids(t, "a")); diff != "" {
		t.Error(diff)
	}
}

// finish runs a job that Redis has, to an end with err.
func (b *bench) finish(t *testing.T, id string, err error) {
	t.Helper()
	done := make(chan string, 10)
	server := asynq.NewServerFromRedisClient(b.rdb, asynq.Config{
		Queues: map[string]int{"pings": 1}, TaskCheckInterval: time.Millisecond, LogLevel: asynq.FatalLevel,
		RetryDelayFunc: func(int, error, *asynq.Task) time.Duration { return time.Hour },
	})
	if startErr := server.Start(asynq.HandlerFunc(func(_ context.Context, task *asynq.Task) error {
		done <- task.ResultWriter().TaskID()
		return err
	})); startErr != nil {
		t.Fatal(startErr)
	}
	for got := ""; got != id; {
		select {
		case got = <-done:
		case <-time.After(time.Minute):
			t.Fatal("the job is not run")
		}
	}
	server.Shutdown()
}

func TestTable_ABadRowIsReportedAndHarmsNoOther(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	s := b.scheduler(t)
	b.exec(t, `INSERT INTO carpool.schedules (name, cron, time_zone, kind, payload, queue)
			VALUES ('a-queue', '* * * * *', 'UTC', 'test:ping', '{"to": "bad"}', 'instance-host-01234567');
		INSERT INTO carpool.schedules (name, cron, time_zone, kind, payload) VALUES
		('a-cron', '61 * * * *', 'UTC', 'test:ping', '{"to": "bad"}'),
		('b-zone', '* * * * *', 'Europe/Atlantis', 'test:ping', '{"to": "bad"}'),
		('c-payload', '* * * * *', 'UTC', 'test:ping', '{"too": "s3cret"}'),
		('d-shape', '* * * * *', 'UTC', 'test:ping', '[]'),
		('e-kind', '* * * * *', 'UTC', 'test:pong', '{}'),
		('f-good', '* * * * *', 'Europe/Berlin', 'test:ping', '{"to": "good"}')`)
	b.settle(t)
	for range 3 {
		b.pass(t, time.Minute)
		look(t, s)
		look(t, s)
	}
	if diff := cmp.Diff([]string{"good", "good", "good"}, b.jobs(t)); diff != "" {
		t.Error(diff)
	}
	for name, want := range map[string]string{
		"a-queue": "queue: is a worker's own, which takes pool:validate alone",
		"a-cron":  "cron: ", "b-zone": "time_zone: ", "c-payload": "to", "d-shape": "object", "e-kind": "test:ping", "f-good": "",
	} {
		problem := b.status(t, name).Problem
		if !strings.Contains(problem, want) || (want == "") != (problem == "") {
			t.Errorf("%s: problem %q, want %q in it", name, problem, want)
		}
		if warnings := strings.Count(b.log.String(), "entry="+name); warnings != min(1, len(want)) {
			t.Errorf("%s: %d warnings", name, warnings)
		}
	}
	if strings.Contains(b.log.String(), "s3cret") {
		t.Error("the log shows a payload")
	}
	// A row that is mended runs, from its next tick on if its time has changed.
	b.exec(t, `UPDATE carpool.schedules SET cron = '* * * * *', payload = '{"to": "mended"}' WHERE name = 'a-cron'`)
	b.settle(t)
	b.pass(t, time.Minute)
	look(t, s)
	if jobs := b.jobs(t); jobs[3] != "mended" || b.status(t, "a-cron").Problem != "" {
		t.Errorf("after it was mended: %v, problem %q", jobs, b.status(t, "a-cron").Problem)
	}
}

// The limit may be another one than it was when the entries were written.
func TestTable_APayloadAboveTheLimitIsReportedAndHarmsNoOther(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	minutely := func(name string, size int) Entry {
		return Entry{Name: name, Cron: "* * * * *", Payload: Ping{To: name + strings.Repeat("x", size)}}
	}
	if err := limit.Record(t.Context(), b.DB, 2000); err != nil {
		t.Fatal(err)
	}
	if err := Add(t.Context(), b.DB, minutely("a", 2000), false); err == nil || !strings.Contains(err.Error(), "more than the limit of 2000, which MAX_PAYLOAD sets") {
		t.Errorf("one that is too large when it is added: %.300v", err)
	}
	if err := Add(t.Context(), b.DB, minutely("a", 1000), false); err != nil {
		t.Fatal(err)
	}
	if err := limit.Record(t.Context(), b.DB, 500); err != nil {
		t.Fatal(err)
	}
	s := b.scheduler(t, minutely("b", 0), minutely("c", 1000), minutely("d", 0))
	b.settle(t)
	b.pass(t, time.Minute)
	look(t, s)
	look(t, s)
	if diff := cmp.Diff([]string{"b", "d"}, b.jobs(t)); diff != "" {
		t.Error(diff)
	}
	if problem := b.status(t, "a").Problem; problem != "payload: 1011 bytes are more than the limit of 500, which MAX_PAYLOAD sets" {
		t.Errorf("the problem is %q", problem)
	}
	if log := b.log.String(); strings.Count(log, "entry=a ") != 1 || strings.Count(log, "entry=c ") != 1 || strings.Contains(log, "xxx") {
		t.Errorf("the log, which should have one line for each of a and c:\n%s", log)
	}
	if _, err := RunNow(t.Context(), b.DB, "a"); err == nil || !strings.Contains(err.Error(), "MAX_PAYLOAD") {
		t.Errorf("run now: %.300v", err)
	}
	if err := limit.Record(t.Context(), b.DB, 2000); err != nil {
		t.Fatal(err)
	}
	b.pass(t, time.Minute)
	look(t, s)
	if problem, jobs := b.status(t, "a").Problem, b.jobs(t); problem != "" || !slices.ContainsFunc(jobs, func(to string) bool { return strings.HasPrefix(to, "ax") }) {
		t.Errorf("with a larger limit: problem %q, jobs %.300q", problem, jobs)
	}
}

// What the table itself refuses.
func TestTable_RefusesWhatItCan(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	for _, columns := range []string{
		"name = 'a b'", "queue = 'a=1'", "max_retry = -1", "missed = 'never'", "overlap = 'never'", "timeout = '1 ms'",
		"retention = '2 years'", "source = 'sql'", "changed_at = 'infinity'",
	} {
		column, value, _ := strings.Cut(columns, " = ")
		names, values := "cron, kind", "'@daily', 'test:ping'"
		if column != "name" {
			names, values = names+", name", values+", 'a'"
		}
		_, err := b.DB.Exec(t.Context(), fmt.Sprintf("INSERT INTO carpool.schedules (%s, %s) VALUES (%s, %s)", names, column, values, value))
		if err == nil || !strings.Contains(err.Error(), "check constraint") {
			t.Errorf("%s: %v", columns, err)
		}
	}
}

func TestTable_WhatPassesWhileAnEntryIsDisabledOrOtherwiseIsNotMissed(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	if err := Add(t.Context(), b.DB, Entry{Name: "a", Cron: "0 * * * *", Payload: Ping{To: "a"}, Missed: MissedAll}, false); err != nil {
		t.Fatal(err)
	}
	s := b.scheduler(t)
	at := func(clock string) { // all changes are made by the database's own clock
		t.Helper()
		b.exec(t, "UPDATE test_clock SET at = now() + $1::text::interval", clock)
		look(t, s)
	}
	at("0")
	if err := SetEnabled(t.Context(), b.DB, "a", false); err != nil {
		t.Fatal(err)
	}
	b.exec(t, "UPDATE carpool.schedule_state SET last_tick = now() - interval '1 day'")
	b.exec(t, "INSERT INTO carpool.schedule_state (name, last_tick) VALUES ('a', now() - interval '1 day') ON CONFLICT DO NOTHING")
	at("0")
	if err := SetEnabled(t.Context(), b.DB, "a", true); err != nil {
		t.Fatal(err)
	}
	at("0")
	if err := Add(t.Context(), b.DB, Entry{Name: "a", Cron: "30 * * * *", Payload: Ping{To: "a"}, Missed: MissedAll}, true); err != nil {
		t.Fatal(err)
	}
	at("0")
	b.exec(t, "UPDATE carpool.schedules SET name = 'b'") // of which nothing is known
	at("0")
	if jobs := b.jobs(t); len(jobs) != 0 {
		t.Fatalf("%d jobs for ticks that were none", len(jobs))
	}
	at("1 hour")
	if jobs := b.jobs(t); len(jobs) != 1 {
		t.Fatalf("%d jobs, want one", len(jobs))
	}
	// Deleted and inserted again in the middle of a tick: not twice.
	at("1 hour")
	b.exec(t, "CREATE TABLE kept AS TABLE carpool.schedules")
	b.exec(t, "DELETE FROM carpool.schedules; INSERT INTO carpool.schedules TABLE kept")
	at("1 hour")
	if jobs := b.jobs(t); len(jobs) != 1 {
		t.Fatalf("%d jobs after the entry was inserted again, want one", len(jobs))
	}
}

func TestCode_AnEntryOfTheTableCountsAndWhatIsDisabledStaysSo(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	code := Entry{Name: "a", Cron: "* * * * *", Payload: Ping{To: "code"}}
	b.scheduler(t, code)
	if err := SetEnabled(t.Context(), b.DB, "a", false); err != nil {
		t.Fatal(err)
	}
	code.Cron = "*/2 * * * *"
	b.scheduler(t, code) // the next deploy
	if s := b.status(t, "a"); s.Enabled || s.Source != "code" || s.Cron != "*/2 * * * *" {
		t.Errorf("after a deploy: %+v", s)
	}
	own := Entry{Name: "a", Cron: "* * * * *", Payload: Ping{To: "table"}}
	if err := Add(t.Context(), b.DB, own, false); !errors.Is(err, ErrExists) {
		t.Errorf("added over another one: %v", err)
	}
	if err := Add(t.Context(), b.DB, own, true); err != nil {
		t.Fatal(err)
	}
	if err := SetEnabled(t.Context(), b.DB, "a", true); err != nil {
		t.Fatal(err)
	}
	s := b.scheduler(t, code)
	if !strings.Contains(b.log.String(), "the table's counts") {
		t.Error("that the table's entry counts isn't said")
	}
	b.settle(t)
	b.pass(t, time.Minute)
	look(t, s)
	if diff := cmp.Diff([]string{"table"}, b.jobs(t)); diff != "" {
		t.Error(diff)
	}
	if source, err := Remove(t.Context(), b.DB, "a"); err != nil || source != "table" {
		t.Fatal(source, err)
	}
	if _, err := Remove(t.Context(), b.DB, "a"); !errors.Is(err, ErrNotFound) {
		t.Errorf("removed twice: %v", err)
	}
	b.scheduler(t, code)
	if s := b.status(t, "a"); s.Source != "code" {
		t.Errorf("after another start: %+v", s)
	}
}

// During a deploy the old and the new instances differ in their kinds and
// entries. Each runs what it knows; what nobody runs is reported.
func TestCode_WhatAnInstanceDoesNotKnowIsLeftToTheOthers(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	entry := Entry{Name: "a", Cron: "* * * * *", Payload: Ping{To: "a"}}
	next := b.scheduler(t, entry)
	b.exec(t, `INSERT INTO carpool.schedules (name, cron, kind, payload) VALUES ('b', '* * * * *', 'test:ping', '{"to": "b"}')`)
	cfg := b.config()
	cfg.Tasks = new(tasks.Set)
	old, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	b.settle(t)
	b.pass(t, time.Minute)
	look(t, old)
	look(t, next)
	look(t, old)
	if diff := cmp.Diff([]string{"a", "b"}, b.jobs(t)); diff != "" {
		t.Error(diff)
	}
	if a, bb := b.status(t, "a").Problem, b.status(t, "b").Problem; a+bb != "" {
		t.Errorf("problems %q, %q", a, bb)
	}
	b.pass(t, 4*time.Minute)
	look(t, old) // alone
	withoutEntry := b.scheduler(t)
	if problem := b.status(t, "b").Problem; !strings.Contains(problem, "kind: ") {
		t.Errorf("a kind that nobody knows: problem %q", problem)
	}
	look(t, withoutEntry)
	if problem := b.status(t, "a").Problem; !strings.HasSuffix(problem, "; the command schedule rm removes it") {
		t.Errorf("an entry that is no more in the code: problem %q", problem)
	}
	look(t, next)
	if problem := b.status(t, "a").Problem; problem != "" {
		t.Errorf("the problem stays: %q", problem)
	}
}

func TestRunNow_EnqueuesAJobAndIsNoTick(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	s := b.scheduler(t, Entry{Name: "a", Cron: "* * * * *", Payload: Ping{To: "a"}, Overlap: OverlapSkip})
	b.settle(t)
	id, err := RunNow(t.Context(), b.DB, "a")
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]string{id}, b.ids(t, "a")); diff != "" {
		t.Error(diff)
	}
	b.pass(t, time.Minute)
	look(t, s)
	if jobs := b.jobs(t); len(jobs) != 2 {
		t.Errorf("%d jobs, want that of run-now and the tick's", len(jobs))
	}
	if _, err := RunNow(t.Context(), b.DB, "b"); !errors.Is(err, ErrNotFound) {
		t.Errorf("an entry that there isn't: %v", err)
	}
}

// asynqmon's page is read with asynq's own Inspector, as asynqmon does.
func TestPage_ShowsEntriesAndTheirHistory(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	b.exec(t, "UPDATE test_clock SET at = now()") // the page goes by it
	cfg := b.config(
		Entry{Name: "a", Cron: "@every 1s", Payload: Ping{To: "a"}, Options: tasks.Options{MaxRetry: 3}},
		Entry{Name: "b", Cron: "30 2 * * *", TimeZone: "Europe/Berlin", Payload: Ping{To: "b"}})
	cfg.clock, cfg.lookEvery = "", 0 // as it is
	for range 2 {                    // which show each entry once
		start(t, cfg)
	}
	var entries []*asynq.SchedulerEntry
	testservers.Eventually(t, "the page shows the last run", func() bool {
		var err error
		if entries, err = b.inspector.SchedulerEntries(); err != nil {
			t.Fatal(err)
		}
		return len(entries) > 0 && !entries[0].Prev.IsZero()
	})
	if len(entries) != 2 {
		t.Fatalf("%d entries", len(entries))
	}
	a, bb := entries[0], entries[1]
	if a.ID != "a" || a.Spec != "@every 1s" || a.Task.Type() != "test:ping" || string(a.Task.Payload()) != `{"to": "a"}` ||
		a.Next.Sub(a.Prev)%time.Second != 0 || !a.Next.After(a.Prev) {
		t.Errorf("a: %+v", a)
	}
	if got := fmt.Sprint(a.Opts); got != `[Queue("pings") MaxRetry(3)]` {
		t.Errorf("a's options: %s", got)
	}
	if bb.ID != "b" || bb.Spec != "CRON_TZ=Europe/Berlin 30 2 * * *" || !bb.Prev.IsZero() || bb.Next.Before(time.Now()) {
		t.Errorf("b: %+v", bb)
	}
	events, err := b.inspector.ListSchedulerEnqueueEvents("a")
	if err != nil {
		t.Fatal(err)
	}
	jobs := map[string]bool{}
	for _, id := range b.ids(t, "a") {
		jobs[id] = true
	}
	if len(events) == 0 {
		t.Error("a has no history")
	}
	for _, e := range events {
		if !jobs[e.TaskID] || time.Since(e.EnqueuedAt) > time.Minute {
			t.Errorf("an event of no job: %+v", e)
		}
	}
	if !json.Valid(a.Task.Payload()) {
		t.Error("the payload is not JSON")
	}
}

func newPool(t *testing.T, url string) *dbpool.Pool {
	t.Helper()
	cfg := dbpool.DefaultConfig(url)
	cfg.Size, cfg.MaxOverflow = 1, 1
	cfg.Logger = slog.New(slog.DiscardHandler)
	pool, err := dbpool.Open(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	return pool
}
