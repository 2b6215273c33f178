package relay

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/hibiken/asynq"
	"github.com/jackc/pgx/v5"
	"github.com/redis/go-redis/v9"

	"github.com/carpool-go/carpool/dbpool"
	"github.com/carpool-go/carpool/internal/asynqwire"
	"github.com/carpool-go/carpool/internal/outbox"
	"github.com/carpool-go/carpool/internal/schema"
	"github.com/carpool-go/carpool/internal/testservers"
	"github.com/carpool-go/carpool/tasks"
	"github.com/carpool-go/carpool/worker/internal/workertest"
)

// note is a kind with a payload that SQL can't check.
type note struct {
	Text string `json:"text"`
}

func (note) Kind() string           { return "note:take" }
func (note) Options() tasks.Options { return tasks.Options{Queue: "notes"} }
func (n note) Validate() error {
	switch n.Text {
	case "bad":
		return errors.New("text: must not be bad\x00\xff") // as careless as it gets
	case "worse":
		panic("worse than bad")
	}
	return nil
}

// letter is a kind that the next version of the worker will know.
type letter struct{}

func (letter) Kind() string           { return "letter:write" }
func (letter) Options() tasks.Options { return tasks.Options{} }
func (letter) Validate() error        { return nil }

// outboxBundle is what a test of relays works with: servers of its own, whose
// database knows the kinds note and letter, and what to enqueue and look with.
type outboxBundle struct {
	databaseURL, redisURL string
	db                    *pgx.Conn
	rdb                   redis.UniversalClient
	client                *tasks.Client
	inspector             *asynq.Inspector
	log                   *workertest.Log // the relays'
}

func setupOutbox(t testing.TB) *outboxBundle {
	t.Helper()
	o := &outboxBundle{databaseURL: testservers.Postgres(t), redisURL: testservers.Redis(t), log: workertest.NewLog()}
	err := schema.Migrate(t.Context(), o.databaseURL, workertest.Discard())
	if err != nil {
		t.Fatal(err)
	}
	if o.db, err = pgx.Connect(t.Context(), o.databaseURL); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = o.db.Close(context.Background()) })
	o.rdb = workertest.OpenRedis(t, o.redisURL)
	o.client, o.inspector = tasks.NewClient(o.rdb), asynq.NewInspectorFromRedisClient(o.rdb)
	set := notes()
	tasks.Register(set, func(context.Context, *tasks.Job, letter) (any, error) { return nil, nil })
	if err := tasks.RecordKinds(t.Context(), o.db, set); err != nil {
		t.Fatal(err)
	}
	return o
}

func notes() *tasks.Set {
	set := new(tasks.Set)
	tasks.Register(set, func(context.Context, *tasks.Job, note) (any, error) { return nil, nil })
	return set
}

// relay starts a relay that knows notes, after change has had its way with its
// configuration, and waits until it has moved what there was.
func (o *outboxBundle) relay(t testing.TB, change ...func(*Config)) *Relay {
	t.Helper()
	r := o.startRelay(t, change...)
	select {
	case <-r.CaughtUp():
	case <-time.After(time.Minute):
		t.Fatalf("the relay does not catch up:\n%s", o.log)
	}
	return r
}

func (o *outboxBundle) startRelay(t testing.TB, change ...func(*Config)) *Relay {
	t.Helper()
	r := o.newRelay(t, change...)
	t.Cleanup(r.Stop)
	if err := r.Start(); err != nil {
		t.Fatal(err)
	}
	return r
}

func (o *outboxBundle) newRelay(t testing.TB, change ...func(*Config)) *Relay {
	t.Helper()
	cfg := Config{
		DB: dbpool.DefaultConfig(o.databaseURL), Tasks: notes(), Redis: o.rdb,
		Log: slog.New(slog.NewJSONHandler(o.log, nil)),
	}
	for _, f := range change {
		f(&cfg)
	}
	r, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// notifiedOnly leaves the relay nothing but notifications.
func notifiedOnly(cfg *Config) { cfg.PollEvery = time.Hour }

func (o *outboxBundle) exec(t testing.TB, sql string, args ...any) {
	t.Helper()
	if _, err := o.db.Exec(t.Context(), sql, args...); err != nil {
		t.Fatal(err)
	}
}

// enqueue enqueues as many notes in one transaction and returns their ids,
// sorted.
func (o *outboxBundle) enqueue(t testing.TB, n int) []string {
	t.Helper()
	return o.enqueueBy(t, `SELECT carpool.enqueue('note:take', jsonb_build_object('text', 'note ' || n)) FROM generate_series(1, $1) AS n`, n)
}

// enqueueBy returns the ids that a query returns, sorted.
func (o *outboxBundle) enqueueBy(t testing.TB, sql string, args ...any) []string {
	t.Helper()
	rows, err := o.db.Query(t.Context(), sql, args...)
	if err != nil {
		t.Fatal(err)
	}
	ids, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		t.Fatal(err)
	}
	slices.Sort(ids)
	return ids
}

// moved returns the ids of the jobs that wait in Redis on a queue, sorted.
func (o *outboxBundle) moved(t testing.TB, queue string) []string {
	t.Helper()
	ids, err := o.rdb.LRange(t.Context(), "asynq:{"+queue+"}:pending", 0, -1).Result()
	if err != nil {
		t.Fatal(err)
	}
	slices.Sort(ids)
	return ids
}

func (o *outboxBundle) stats(t testing.TB) (waiting, rejected int) {
	t.Helper()
	stats, err := outbox.ReadStats(t.Context(), o.db)
	if err != nil {
		t.Fatal(err)
	}
	if (stats.Waiting > 0) != (stats.Oldest > 0) {
		t.Errorf("%d rows wait, the oldest for %s", stats.Waiting, stats.Oldest)
	}
	return stats.Waiting, stats.Rejected
}

// requireMoved waits until nothing is left in the outbox, and fails the test
// unless exactly these jobs wait in Redis.
func (o *outboxBundle) requireMoved(t testing.TB, want []string) {
	t.Helper()
	o.until(t, "the outbox is empty", func() bool {
		waiting, _ := o.stats(t)
		return waiting == 0
	})
	if got := o.moved(t, "notes"); !slices.Equal(want, got) {
		t.Fatalf("Redis has %d jobs, the outbox had %d\n%s", len(got), len(want), cmp.Diff(want, got))
	}
}

// until is [testservers.Eventually], and shows the relays' log if the test fails.
func (o *outboxBundle) until(t testing.TB, what string, holds func() bool) {
	t.Helper()
	defer func() {
		if t.Failed() {
			t.Logf("the relays' log:\n%s", o.log)
		}
	}()
	testservers.Eventually(t, what, holds)
}

// backends are the pids of the relays' backends.
func (o *outboxBundle) backends(t testing.TB) []int {
	t.Helper()
	rows, err := o.db.Query(t.Context(), "SELECT pid FROM pg_stat_activity WHERE application_name = 'carpool relay' AND datname = current_database()")
	if err != nil {
		t.Fatal(err)
	}
	pids, err := pgx.CollectRows(rows, pgx.RowTo[int])
	if err != nil {
		t.Fatal(err)
	}
	return pids
}

func (o *outboxBundle) terminate(t testing.TB) {
	t.Helper()
	for _, pid := range o.backends(t) {
		o.exec(t, "SELECT pg_terminate_backend($1)", pid)
	}
}

// logged counts the records of the log that have a message which begins so.
func (o *outboxBundle) logged(message string) int {
	return strings.Count(o.log.String(), `"msg":"`+message)
}

const (
	redisGone    = "the outbox waits: Redis"
	redisBack    = "the outbox goes on: Redis"
	postgresGone = "the outbox waits: Postgres"
	postgresBack = "the outbox goes on: Postgres"
)

func TestRelay_MovesWhatIsCommittedAndNothingElse(t *testing.T) {
	t.Parallel()
	o := setupOutbox(t)
	before := o.enqueue(t, 3)
	o.relay(t, notifiedOnly)
	o.requireMoved(t, before)

	tx, err := o.db.Begin(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	never := o.enqueue(t, 5)
	if err := tx.Rollback(t.Context()); err != nil {
		t.Fatal(err)
	}
	if tx, err = o.db.Begin(t.Context()); err != nil {
		t.Fatal(err)
	}
	id, err := o.client.EnqueueTx(t.Context(), tx, note{"from Go"}, nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := tx.Commit(t.Context()); err != nil {
		t.Fatal(err)
	}
	o.requireMoved(t, append(before, id)) // ids are in the order of time
	info, err := o.inspector.GetTaskInfo("notes", id)
	if err != nil {
		t.Fatal(err)
	}
	if info.Type != "note:take" || string(info.Payload) != `{"text":"from Go"}` {
		t.Errorf("the job is %s %s", info.Type, info.Payload)
	}
	for _, id := range never {
		if _, err := o.inspector.GetTaskInfo("notes", id); !errors.Is(err, asynq.ErrTaskNotFound) {
			t.Errorf("a job whose transaction rolled back: %v", err)
		}
	}
}

func TestRelay_HonoursTheOptions(t *testing.T) {
	t.Parallel()
	o := setupOutbox(t)
	runAt := time.Now().Add(time.Hour).Truncate(time.Second)
	var id, none string
	if err := o.db.QueryRow(t.Context(), `SELECT carpool.enqueue('note:take', '{"text": "later"}', queue => 'low', run_at => $1,
		max_retry => 3, timeout => '90 s', retention => '1 day')`, runAt).Scan(&id); err != nil {
		t.Fatal(err)
	}
	if err := o.db.QueryRow(t.Context(), `SELECT carpool.enqueue('note:take', '{"text": "now"}', max_retry => 0)`).Scan(&none); err != nil {
		t.Fatal(err)
	}
	o.relay(t)
	type summary struct {
		State, MaxRetry    string
		Timeout, Retention time.Duration
		RunAt              int64
	}
	look := func(queue, id string) summary {
		info, err := o.inspector.GetTaskInfo(queue, id)
		if err != nil {
			t.Fatal(err)
		}
		s := summary{info.State.String(), info.Headers["carpool-max-retry"], info.Timeout - asynqwire.TimeoutGrace, info.Retention, 0}
		if info.State == asynq.TaskStateScheduled {
			s.RunAt = info.NextProcessAt.Unix()
		}
		return s
	}
	if diff := cmp.Diff(summary{"scheduled", "3", 90 * time.Second, 24 * time.Hour, runAt.Unix()}, look("low", id)); diff != "" {
		t.Errorf("with options (-want +got)\n%s", diff)
	}
	if diff := cmp.Diff(summary{"pending", "0", tasks.DefaultTimeout, 0, 0}, look("notes", none)); diff != "" {
		t.Errorf("without retry (-want +got)\n%s", diff)
	}
}

func TestRelay_DropsAJobWhoseUniqueKeyIsHeld(t *testing.T) {
	t.Parallel()
	o := setupOutbox(t)
	o.relay(t)
	const enqueue = `SELECT carpool.enqueue('note:take', '{"text": "once"}', unique_key => 'k')`
	var first, second string
	if err := o.db.QueryRow(t.Context(), enqueue).Scan(&first); err != nil {
		t.Fatal(err)
	}
	o.requireMoved(t, []string{first})
	if err := o.db.QueryRow(t.Context(), enqueue).Scan(&second); err != nil {
		t.Fatal(err)
	}
	o.requireMoved(t, []string{first})
	o.log.Wait(t, fmt.Sprintf(`"job_id":%q,"kind":"note:take","held_by":%q`, second, first))
}

func TestRelay_SeveralShareTheRowsAndEachIsMovedOnce(t *testing.T) {
	t.Parallel()
	o := setupOutbox(t)
	for range 3 {
		o.relay(t, notifiedOnly)
	}
	o.requireMoved(t, o.enqueue(t, 4*batchSize/2+17))
}

func TestRelay_RowsWaitWhileRedisIsAwayAndThenGo(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name string
		cut  func(*testservers.Proxy)
	}{
		{"refused", func(p *testservers.Proxy) { p.Refuse(); p.Reset() }},
		{"silent", (*testservers.Proxy).Blackhole},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			o := setupOutbox(t)
			url, proxy := testservers.ThroughProxy(t, o.redisURL)
			o.relay(t, func(cfg *Config) { cfg.Redis = workertest.OpenRedis(t, url) })
			first := o.enqueue(t, 3)
			o.requireMoved(t, first)

			c.cut(proxy)
			ids := append(first, o.enqueue(t, 100)...)
			o.log.Wait(t, redisGone)
			if waiting, rejected := o.stats(t); waiting != 100 || rejected != 0 {
				t.Errorf("%d rows wait and %d are rejected, want 100 and none", waiting, rejected)
			}
			proxy.Heal()
			o.requireMoved(t, ids)
			o.log.Wait(t, redisBack)
			if gone, back := o.logged(redisGone), o.logged(redisBack); gone != 1 || back != 1 {
				t.Errorf("one outage is logged as %d and its end as %d:\n%s", gone, back, o.log)
			}
		})
	}
}

func TestRelay_DiesBetweenRedisAndPostgresAndNothingIsDoubled(t *testing.T) {
	t.Parallel()
	o := setupOutbox(t)
	url, proxy := testservers.ThroughProxy(t, o.redisURL)
	r := o.relay(t, func(cfg *Config) { cfg.Redis = workertest.OpenRedis(t, url) })
	proxy.Delay(300 * time.Millisecond)
	ids := o.enqueue(t, atOnce)
	// Redis has all the jobs, and the relay waits for the answers.
	o.until(t, "Redis has the jobs", func() bool { return len(o.moved(t, "notes")) == len(ids) })
	o.terminate(t)
	o.log.Wait(t, postgresGone)
	if waiting, _ := o.stats(t); waiting != len(ids) {
		t.Fatalf("%d rows are in the outbox, want %d: the relay has not died between the two", waiting, len(ids))
	}
	proxy.Heal()
	o.requireMoved(t, ids)
	r.Stop()
}

func TestRelay_StoppedAmidABatchFinishesIt(t *testing.T) {
	t.Parallel()
	o := setupOutbox(t)
	url, proxy := testservers.ThroughProxy(t, o.redisURL)
	r := o.relay(t, func(cfg *Config) { cfg.Redis = workertest.OpenRedis(t, url) })
	proxy.Delay(100 * time.Millisecond)
	ids := o.enqueue(t, 4*atOnce)
	o.until(t, "Redis has some of the jobs", func() bool { return len(o.moved(t, "notes")) > 0 })
	r.Stop()
	waiting, _ := o.stats(t)
	moved := o.moved(t, "notes")
	if waiting == 0 || waiting+len(moved) != len(ids) {
		t.Errorf("%d rows of %d wait, Redis has %d: want each here or there", waiting, len(ids), len(moved))
	}
	o.relay(t)
	o.requireMoved(t, ids)
}

func TestRelay_ListensAgainAfterItsConnectionWasCut(t *testing.T) {
	t.Parallel()
	o := setupOutbox(t)
	o.relay(t, notifiedOnly)
	old := o.backends(t)
	o.terminate(t)
	o.log.Wait(t, postgresBack)
	if now := o.backends(t); len(now) != 1 || slices.Equal(old, now) {
		t.Errorf("the relay's backends are %v, and were %v", now, old)
	}
	o.requireMoved(t, o.enqueue(t, 1)) // of which only a notification tells
}

func TestRelay_ComesBackAfterPostgresWasAway(t *testing.T) {
	t.Parallel()
	o := setupOutbox(t)
	url, proxy := testservers.ThroughProxy(t, o.databaseURL)
	o.relay(t, func(cfg *Config) { cfg.DB.URL = url })
	proxy.Refuse()
	proxy.Reset()
	o.log.Wait(t, postgresGone)
	ids := o.enqueue(t, 10)
	proxy.Heal()
	o.requireMoved(t, ids)
	o.log.Wait(t, postgresBack)
	if gone, back := o.logged(postgresGone), o.logged(postgresBack); gone != 1 || back != 1 {
		t.Errorf("one outage is logged as %d and its end as %d:\n%s", gone, back, o.log)
	}
}

func TestRelay_StartsWhileTheServersAreAway(t *testing.T) {
	t.Parallel()
	o := setupOutbox(t)
	ids := o.enqueue(t, 10)
	redisURL, redisProxy := testservers.ThroughProxy(t, o.redisURL)
	redisProxy.Refuse()
	databaseURL, postgresProxy := testservers.ThroughProxy(t, o.databaseURL)
	postgresProxy.Refuse()
	o.startRelay(t, func(cfg *Config) {
		cfg.DB.URL, cfg.Redis = databaseURL, workertest.OpenRedis(t, redisURL)
	})
	o.log.Wait(t, postgresGone)
	postgresProxy.Heal()
	o.log.Wait(t, redisGone)
	redisProxy.Heal()
	o.requireMoved(t, ids)
}

func TestRelay_ListsItsQueuesAgainInARedisThatLostItsData(t *testing.T) {
	t.Parallel()
	o := setupOutbox(t)
	o.relay(t)
	o.requireMoved(t, o.enqueue(t, 1))
	if err := o.rdb.FlushDB(t.Context()).Err(); err != nil {
		t.Fatal(err)
	}
	o.requireMoved(t, o.enqueue(t, 1))
	if queues := o.rdb.SMembers(t.Context(), "asynq:queues").Val(); !slices.Contains(queues, "notes") {
		t.Errorf("the queues are %q", queues)
	}
}

// Frozen or vanished machines before the right one, or addresses of its name.
func TestRelay_ReachesAHostBehindSilentOnes(t *testing.T) {
	t.Parallel()
	o := setupOutbox(t)
	host := testservers.ParseURL(t, o.databaseURL).Host
	hosts := host
	for range 3 {
		silent, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer silent.Close()
		hosts = silent.Addr().String() + "," + hosts
	}
	want := o.enqueue(t, 1)
	o.relay(t, func(cfg *Config) {
		cfg.DB.URL = strings.Replace(testservers.WithParam(t, o.databaseURL, "connect_timeout", "1"), host, hosts, 1)
	})
	o.requireMoved(t, want)
}

// A role, or a database, may have another isolation and another encoding of its own.
func TestRelay_SessionDefaultsOfTheDatabaseChangeNothing(t *testing.T) {
	t.Parallel()
	o := setupOutbox(t)
	for _, setting := range []string{"default_transaction_isolation = serializable", "client_encoding = latin1"} {
		o.exec(t, "DO $$ BEGIN EXECUTE format('ALTER DATABASE %I SET "+setting+"', current_database()); END $$")
	}
	for range 3 {
		o.relay(t)
	}
	want := o.enqueue(t, 50)
	var id string
	if err := o.db.QueryRow(t.Context(), `SELECT carpool.enqueue('note:take', '{"text": "caf\u00e9"}')`).Scan(&id); err != nil {
		t.Fatal(err)
	}
	want = append(want, id)
	slices.Sort(want)
	o.requireMoved(t, want)
	info, err := o.inspector.GetTaskInfo("notes", id)
	if err != nil || string(info.Payload) != `{"text":"café"}` {
		t.Errorf("the payload is %s, error %v", info.Payload, err)
	}
}

func TestRelay_StopMayBeCalledTwiceAndWithoutStart(t *testing.T) {
	t.Parallel()
	o := setupOutbox(t)
	never := o.newRelay(t)
	never.Stop()
	never.Stop()
	twice := o.relay(t)
	twice.Stop()
	twice.Stop()
	o.until(t, "no relay is connected", func() bool { return len(o.backends(t)) == 0 })
}

func TestRelay_StopsWhilePostgresIsSilent(t *testing.T) {
	t.Parallel()
	o := setupOutbox(t)
	url, proxy := testservers.ThroughProxy(t, o.databaseURL)
	r := o.relay(t, func(cfg *Config) { cfg.DB.URL, cfg.PollEvery = url, time.Millisecond })
	proxy.Blackhole()
	stopped := make(chan struct{})
	go func() {
		defer close(stopped)
		r.Stop()
	}()
	select {
	case <-stopped:
	case <-time.After(time.Minute):
		t.Error("the relay does not stop")
	}
}

func TestRelay_StoppedAmidABatchThatWaitsLeavesNothingAtWork(t *testing.T) {
	t.Parallel()
	o := setupOutbox(t)
	holder, err := pgx.Connect(t.Context(), o.databaseURL)
	if err != nil {
		t.Fatal(err)
	}
	defer holder.Close(context.Background())
	if _, err := holder.Exec(t.Context(), "BEGIN; LOCK TABLE carpool.outbox"); err != nil {
		t.Fatal(err)
	}
	r := o.startRelay(t)
	atWork := func() (n int) {
		t.Helper()
		if err := o.db.QueryRow(t.Context(), `SELECT count(*) FROM pg_stat_activity
			WHERE datname = current_database() AND application_name = 'carpool relay' AND state = 'active'`).Scan(&n); err != nil {
			t.Fatal(err)
		}
		return n
	}
	o.until(t, "the relay waits for the lock", func() bool { return atWork() == 1 })
	r.Stop()
	if n := atWork(); n != 0 {
		t.Errorf("the relay has stopped, and %d of its statements are at work", n)
	}
}

func TestRelay_PollsWhereItCanNotListen(t *testing.T) {
	t.Parallel()
	o := setupOutbox(t)
	o.relay(t, func(cfg *Config) { cfg.DB.ThroughPooler = true })
	var listeners int
	if err := o.db.QueryRow(t.Context(), "SELECT count(*) FROM pg_stat_activity WHERE query ILIKE 'listen%' AND datname = current_database()").Scan(&listeners); err != nil {
		t.Fatal(err)
	}
	if listeners != 0 {
		t.Error("it listens")
	}
	o.requireMoved(t, o.enqueue(t, 3))
}

func TestRelay_ABusyOneLooksByItselfAndIsNotNotified(t *testing.T) {
	t.Parallel()
	o := setupOutbox(t)
	o.relay(t)
	locked := func() (held bool) {
		t.Helper()
		if err := o.db.QueryRow(t.Context(), `SELECT EXISTS (SELECT FROM pg_locks AS l JOIN pg_database AS d ON d.oid = l.database
			WHERE l.locktype = 'advisory' AND l.mode = 'ExclusiveLock' AND d.datname = current_database()
			AND (l.classid::bigint << 32) + l.objid::bigint = $1)`, int64(outbox.MuteLock)).Scan(&held); err != nil {
			t.Fatal(err)
		}
		return held
	}
	var ids []string
	o.until(t, "the relay is busy", func() bool {
		ids = append(ids, o.enqueue(t, busyRows)...)
		return locked()
	})
	slices.Sort(ids)
	o.requireMoved(t, ids)
	o.until(t, "the relay is no longer busy", func() bool { return !locked() })

	// Whether a producer notifies depends on the lock.
	listener, err := pgx.Connect(t.Context(), o.databaseURL)
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close(context.Background())
	if _, err := listener.Exec(t.Context(), "LISTEN carpool_outbox"); err != nil {
		t.Fatal(err)
	}
	notified := func() string {
		t.Helper()
		o.enqueue(t, 1)
		o.exec(t, "SELECT pg_notify('carpool_outbox', 'the end')")
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		var heard strings.Builder
		for {
			n, err := listener.WaitForNotification(ctx)
			if err != nil {
				t.Fatal(err)
			}
			fmt.Fprintf(&heard, "%q ", n.Payload)
			if n.Payload != "" {
				return heard.String()
			}
		}
	}
	if got := notified(); got != `"" "the end" ` {
		t.Errorf("without a busy relay, a producer's notifications are %s", got)
	}
	busy, err := pgx.Connect(t.Context(), o.databaseURL)
	if err != nil {
		t.Fatal(err)
	}
	defer busy.Close(context.Background())
	if _, err := busy.Exec(t.Context(), "SELECT pg_advisory_lock($1)", int64(outbox.MuteLock)); err != nil {
		t.Fatal(err)
	}
	if got := notified(); got != `"the end" ` {
		t.Errorf("with a busy relay, a producer's notifications are %s", got)
	}
}

func TestRelay_RejectsWhatCanNotBecomeAJob(t *testing.T) {
	t.Parallel()
	o := setupOutbox(t)
	var bad, worse string
	for text, id := range map[string]*string{"bad": &bad, "worse": &worse} {
		if err := o.db.QueryRow(t.Context(), `SELECT carpool.enqueue('note:take', jsonb_build_object('text', $1::text))`, text).Scan(id); err != nil {
			t.Fatal(err)
		}
	}
	// As an older version of the tables has let it in.
	const astray = "01234567-89ab-7cde-8f01-23456789abcd"
	o.exec(t, `ALTER TABLE carpool.outbox DISABLE TRIGGER queue`)
	o.exec(t, `INSERT INTO carpool.outbox (id, kind, payload, queue) VALUES ('`+astray+`', 'note:take', '{"text": "good"}', 'instance-host-01234567')`)
	good := o.enqueue(t, 2)
	o.relay(t)
	o.requireMoved(t, good)
	if _, rejected := o.stats(t); rejected != 3 {
		t.Errorf("%d rows are rejected, want 3", rejected)
	}
	for id, want := range map[string]string{
		bad:    "note:take payload: text: must not be bad??",
		worse:  "note:take payload: reading it panicked in ",
		astray: "tasks: enqueue note:take: queue: is a worker's own, which takes pool:validate alone",
	} {
		var problem string
		if err := o.db.QueryRow(t.Context(), "SELECT problem FROM carpool.outbox WHERE id = $1", id).Scan(&problem); err != nil {
			t.Fatal(err)
		}
		if !strings.HasPrefix(problem, want) {
			t.Errorf("the problem is %q, want %q", problem, want)
		}
		o.log.Wait(t, fmt.Sprintf(`"job_id":%q,"kind":"note:take","problem":%q`, id, problem))
	}
	// What was mended is taken up.
	o.exec(t, `UPDATE carpool.outbox SET payload = '{"text": "good"}', problem = NULL WHERE id = $1`, bad)
	want := append(good, bad)
	slices.Sort(want)
	o.requireMoved(t, want)
}

func TestRelay_LeavesUnknownKindsToWorkersThatKnowThem(t *testing.T) {
	t.Parallel()
	o := setupOutbox(t)
	var id string
	if err := o.db.QueryRow(t.Context(), `SELECT carpool.enqueue('letter:write', '{}')`).Scan(&id); err != nil {
		t.Fatal(err)
	}
	o.relay(t).Stop()
	if waiting, rejected := o.stats(t); waiting != 1 || rejected != 0 {
		t.Errorf("a new row of an unknown kind: %d wait and %d are rejected, want it to wait", waiting, rejected)
	}
	o.exec(t, "UPDATE carpool.outbox SET created_at = now() - interval '11 minutes'")
	o.relay(t).Stop()
	var problem string
	if err := o.db.QueryRow(t.Context(), "SELECT problem FROM carpool.outbox").Scan(&problem); err != nil {
		t.Fatal(err)
	}
	if problem != "no worker knows the kind letter:write" {
		t.Errorf("an old row of an unknown kind has the problem %q", problem)
	}
	o.log.Wait(t, problem)
	o.relay(t, func(cfg *Config) {
		tasks.Register(cfg.Tasks, func(context.Context, *tasks.Job, letter) (any, error) { return nil, nil })
	})
	if got := o.moved(t, tasks.DefaultQueue); !slices.Equal(got, []string{id}) {
		t.Errorf("where the kind is known, Redis has %v, want %s", got, id)
	}
}

func TestRelay_LogsAKindThatNoWorkerKnowsOnce(t *testing.T) {
	t.Parallel()
	const said = "rows of the outbox wait, and are set aside after ten minutes: no worker that is up knows the kind letter:write"
	for name, c := range map[string]struct {
		age  string
		know func(context.Context) ([]string, bool, error)
		want int
	}{
		"nobody knows it":           {"1 minute", knowing(true, nil, "note:take"), 1},
		"it came only now":          {"1 second", knowing(true, nil, "note:take"), 0},
		"another one knows it":      {"1 minute", knowing(true, nil, "letter:write", "note:take"), 0},
		"another one doesn't say":   {"1 minute", knowing(false, nil), 0},
		"the others can't be asked": {"1 minute", knowing(false, errors.New("Redis is away")), 0},
		"nobody can be asked":       {"1 minute", nil, 0},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			o := setupOutbox(t)
			o.exec(t, "SELECT carpool.enqueue('letter:write', '{}') FROM generate_series(1, 3)")
			o.exec(t, "UPDATE carpool.outbox SET created_at = now() - interval '"+c.age+"'")
			r := o.relay(t, func(cfg *Config) { cfg.FleetKinds = c.know })
			r.Stop()
			if err := r.tidy(t.Context(), o.db); err != nil { // a minute later
				t.Fatal(err)
			}
			if got := strings.Count(o.log.String(), said+`","rows":3`); got != c.want {
				t.Errorf("it is logged %d times, want %d:\n%s", got, c.want, o.log)
			}
		})
	}
}

// knowing returns an answer of the fleet's.
func knowing(ok bool, err error, kinds ...string) func(context.Context) ([]string, bool, error) {
	return func(context.Context) ([]string, bool, error) { return kinds, ok, err }
}

func TestRelay_RowsThatRedisRefusesDoNotHoldUpTheOthers(t *testing.T) {
	t.Parallel()
	o := setupOutbox(t)
	for _, id := range o.enqueue(t, 3) {
		if err := o.rdb.Set(t.Context(), "asynq:{notes}:t:"+id, "not a job", 0).Err(); err != nil {
			t.Fatal(err)
		}
	}
	ids := o.enqueue(t, 2*batchSize)
	o.startRelay(t)
	o.until(t, "three rows are left", func() bool {
		waiting, _ := o.stats(t)
		return waiting == 3
	})
	if got := o.moved(t, "notes"); !slices.Equal(ids, got) {
		t.Errorf("Redis has %d jobs, want %d", len(got), len(ids))
	}
}

func TestRelay_ItsLogNeverHasThePassword(t *testing.T) {
	t.Parallel()
	o := setupOutbox(t)
	u := testservers.ParseURL(t, o.databaseURL)
	role := "outbox_" + strings.Trim(u.Path, "/") // without LOGIN: refused with any password
	o.exec(t, "CREATE ROLE "+role)
	t.Cleanup(func() {
		if _, err := o.db.Exec(context.Background(), "DROP ROLE "+role); err != nil {
			t.Error(err)
		}
	})
	u.User = url.UserPassword(role, "hunter2")
	o.startRelay(t, func(cfg *Config) { cfg.DB.URL = u.String() })
	o.log.Wait(t, postgresGone)
	if strings.Contains(o.log.String(), "hunter2") {
		t.Errorf("the password is in the log:\n%s", o.log)
	}
	if _, err := New(Config{DB: dbpool.DefaultConfig("postgres://me:hunter2@h:port/d"), Tasks: notes()}); err == nil || strings.Contains(err.Error(), "hunter2") {
		t.Errorf("a wrong URL: %v", err)
	}
}

// The time from a transaction's commit to the job's arrival in Redis, one at a
// time and too few of them to make the relay busy.
func BenchmarkRelay_CommitToRedis(b *testing.B) {
	o := setupOutbox(b)
	o.relay(b)
	var took []time.Duration
	for b.Loop() {
		b.StopTimer()
		tx, err := o.db.Begin(b.Context())
		if err != nil {
			b.Fatal(err)
		}
		id, err := o.client.EnqueueTx(b.Context(), tx, note{"n"}, nil)
		if err != nil {
			b.Fatal(err)
		}
		arrived := make(chan time.Time, 1)
		go func() {
			popped, err := o.rdb.BRPop(context.Background(), time.Minute, "asynq:{notes}:pending").Result()
			if err != nil || popped[1] != id {
				b.Errorf("arrived %v: %v", popped, err)
			}
			arrived <- time.Now()
		}()
		time.Sleep(2 * time.Second / busyRows)
		b.StartTimer()
		began := time.Now()
		if err := tx.Commit(b.Context()); err != nil {
			b.Fatal(err)
		}
		took = append(took, (<-arrived).Sub(began))
	}
	slices.Sort(took)
	b.ReportMetric(float64(took[len(took)/2].Microseconds()), "p50-µs")
	b.ReportMetric(float64(took[len(took)*99/100].Microseconds()), "p99-µs")
}

// How many jobs a second one relay moves.
func BenchmarkRelay_Throughput(b *testing.B) {
	o := setupOutbox(b)
	rows := max(b.N, 1)
	if _, err := o.db.Exec(b.Context(), `SELECT carpool.enqueue('note:take', '{"text": "n"}') FROM generate_series(1, $1)`, rows); err != nil {
		b.Fatal(err)
	}
	b.ResetTimer()
	o.relay(b)
	b.ReportMetric(float64(rows)/b.Elapsed().Seconds(), "jobs/s")
}
