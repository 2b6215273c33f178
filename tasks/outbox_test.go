package tasks_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/url"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/uuid"
	"github.com/jackc/pgerrcode"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"pgregory.net/rapid"

	"github.com/carpool-go/carpool/internal/testservers"
	"github.com/carpool-go/carpool/tasks"
	"github.com/carpool-go/carpool/tasks/builtin"
	"github.com/carpool-go/carpool/tasks/maintenance"
	"github.com/carpool-go/carpool/tasks/taskstest"
)

// outbox returns a kit whose database knows the kind parcel:send.
func outbox(t *testing.T) *taskstest.Kit {
	t.Helper()
	kit := taskstest.New(t)
	record[parcel](t, kit)
	return kit
}

func record[P tasks.Payload](t *testing.T, kit *taskstest.Kit) {
	t.Helper()
	set := new(tasks.Set)
	tasks.Register(set, func(context.Context, *tasks.Job, P) (any, error) { return nil, nil })
	if err := tasks.RecordKinds(t.Context(), kit.DB, set); err != nil {
		t.Fatal(err)
	}
}

// outboxRow is what carpool.enqueue has written.
type outboxRow struct {
	Kind      string
	Payload   string
	Queue     *string
	UniqueKey *string
	MaxRetry  *int
	Timeout   *string
	Retention *string
	RunAt     *time.Time
}

func outboxRows(t *testing.T, kit *taskstest.Kit) map[string]outboxRow {
	t.Helper()
	rows, err := kit.DB.Query(t.Context(), `SELECT id::text, kind, payload::text, queue, unique_key, max_retry, timeout::text, retention::text, run_at FROM carpool.outbox`)
	if err != nil {
		t.Fatal(err)
	}
	found := make(map[string]outboxRow)
	var id string
	var row outboxRow
	if _, err := pgx.ForEachRow(rows, []any{
		&id, &row.Kind, &row.Payload, &row.Queue, &row.UniqueKey,
		&row.MaxRetry, &row.Timeout, &row.Retention, &row.RunAt,
	}, func() error {
		found[id] = row
		row = outboxRow{}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	return found
}

func TestEnqueueTx_WritesTheOutboxIfTheTransactionCommits(t *testing.T) {
	t.Parallel()
	kit := outbox(t)
	client := new(tasks.Client) // needs no Redis
	enqueue := func(to string) (pgx.Tx, string) {
		tx, err := kit.DB.Begin(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		id, err := client.EnqueueTx(t.Context(), tx, parcel{To: to, Count: 1}, nil)
		if err != nil {
			t.Fatal(err)
		}
		return tx, id
	}
	committed, id := enqueue("Ada")
	rolledBack, _ := enqueue("Bob")
	if err := committed.Commit(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := rolledBack.Rollback(t.Context()); err != nil {
		t.Fatal(err)
	}
	want := map[string]outboxRow{id: {Kind: "parcel:send", Payload: `{"to": "Ada", "count": 1}`}}
	if diff := cmp.Diff(want, outboxRows(t, kit)); diff != "" {
		t.Errorf("the outbox (-want +got)\n%s", diff)
	}
}

func TestOutbox_ARowThatIsWrittenByHandGoesThroughATwoPhaseCommitAndEnqueueDoesNot(t *testing.T) {
	t.Parallel()
	kit := outbox(t)
	gid := "carpool " + strings.TrimPrefix(kit.DatabaseURL[strings.LastIndex(kit.DatabaseURL, "/"):], "/")
	prepare := func(enqueue string) error {
		conn, err := kit.DB.Acquire(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Release()
		_, err = conn.Exec(t.Context(), "BEGIN; "+enqueue+"; PREPARE TRANSACTION '"+gid+"'", pgx.QueryExecModeSimpleProtocol)
		if err != nil {
			_, _ = conn.Exec(t.Context(), "ROLLBACK")
		}
		return err
	}
	err := prepare(`SELECT carpool.enqueue('parcel:send', '{"to": "Ada", "count": 1}')`)
	if e, ok := errors.AsType[*pgconn.PgError](err); !ok || e.Code != pgerrcode.FeatureNotSupported || !strings.Contains(e.Message, "NOTIFY") {
		t.Errorf("carpool.enqueue: %v; docs/delivery.md says that it can't be prepared", err)
	}
	if err := prepare(`INSERT INTO carpool.outbox (id, kind, payload) VALUES (gen_random_uuid(), 'parcel:send', '{"to": "Ada", "count": 1}')`); err != nil {
		t.Fatal(err)
	}
	if rows := outboxRows(t, kit); len(rows) != 0 {
		t.Errorf("before its commit the outbox has %v", rows)
	}
	if _, err := kit.DB.Exec(t.Context(), "COMMIT PREPARED '"+gid+"'", pgx.QueryExecModeSimpleProtocol); err != nil {
		t.Fatal(err)
	}
	if rows := outboxRows(t, kit); len(rows) != 1 {
		t.Errorf("after it the outbox has %v", rows)
	}
}

func TestEnqueueTx_HandsTheOptionsOn(t *testing.T) {
	t.Parallel()
	kit := outbox(t)
	runAt := time.Now().Add(time.Hour).Truncate(time.Microsecond)
	id, err := new(tasks.Client).EnqueueTx(t.Context(), kit.DB, parcel{To: "Ada"}, &tasks.EnqueueOptions{
		Queue: "low", MaxRetry: 3, Timeout: 90 * time.Second, Retention: 26 * time.Hour, RunAt: runAt, UniqueKey: "k",
	})
	if err != nil {
		t.Fatal(err)
	}
	none, err := new(tasks.Client).EnqueueTx(t.Context(), kit.DB, parcel{To: "Ada"}, &tasks.EnqueueOptions{
		MaxRetry: tasks.NoRetry, RunAt: time.Now().Add(-time.Hour),
	})
	if err != nil {
		t.Fatal(err)
	}
	const payload = `{"to": "Ada", "count": 0}`
	want := map[string]outboxRow{
		id: {
			Kind: "parcel:send", Payload: payload, Queue: new("low"), UniqueKey: new("k"), MaxRetry: new(3),
			Timeout: new("00:01:30"), Retention: new("26:00:00"), RunAt: &runAt,
		},
		none: {Kind: "parcel:send", Payload: payload, MaxRetry: new(0)}, // a time that has passed is none
	}
	if diff := cmp.Diff(want, outboxRows(t, kit)); diff != "" {
		t.Errorf("the outbox (-want +got)\n%s", diff)
	}
}

func TestEnqueueTx_WorksInEveryModeOfPgx(t *testing.T) {
	t.Parallel()
	kit := outbox(t)
	for _, mode := range []pgx.QueryExecMode{
		pgx.QueryExecModeCacheStatement, pgx.QueryExecModeCacheDescribe, pgx.QueryExecModeDescribeExec,
		pgx.QueryExecModeExec, pgx.QueryExecModeSimpleProtocol,
	} {
		cfg, err := pgx.ParseConfig(kit.DatabaseURL)
		if err != nil {
			t.Fatal(err)
		}
		cfg.DefaultQueryExecMode = mode
		conn, err := pgx.ConnectConfig(t.Context(), cfg)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = conn.Close(context.Background()) })
		id, err := new(tasks.Client).EnqueueTx(t.Context(), conn, parcel{To: "Ada"}, &tasks.EnqueueOptions{Timeout: time.Minute, RunAt: time.Now().Add(time.Hour)})
		if err != nil {
			t.Errorf("%v: %v", mode, err)
			continue
		}
		if row := outboxRows(t, kit)[id]; row.Timeout == nil || *row.Timeout != "00:01:00" || row.RunAt == nil {
			t.Errorf("%v: the row is %+v", mode, row)
		}
	}
}

func TestEnqueueTx_RefusesAPayloadBeforeItTouchesTheTransaction(t *testing.T) {
	t.Parallel()
	kit := outbox(t)
	tx, err := kit.DB.Begin(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer tx.Rollback(context.Background())
	if _, err := new(tasks.Client).EnqueueTx(t.Context(), tx, parcel{}, nil); !isPayloadError(err) {
		t.Errorf("a payload that is not valid: %v", err)
	}
	if _, err := new(tasks.Client).EnqueueTx(t.Context(), tx, parcel{To: "Ada"}, &tasks.EnqueueOptions{ID: "mine"}); err == nil || !strings.Contains(err.Error(), "the outbox makes it") {
		t.Errorf("an id of one's own: %v", err)
	}
	if _, err := new(tasks.Client).EnqueueTx(t.Context(), tx, parcel{To: "Ada"}, &tasks.EnqueueOptions{Queue: "instance-host-01234567"}); !tasks.IsPermanent(err) ||
		!strings.Contains(err.Error(), "queue: is a worker's own, which takes pool:validate alone") {
		t.Errorf("a worker's own queue: %v", err)
	}
	if _, err := tx.Exec(t.Context(), "SELECT 1"); err != nil {
		t.Errorf("the transaction is aborted: %v", err)
	}
}

func isPayloadError(err error) bool {
	_, ok := errors.AsType[*tasks.PayloadError](err)
	return ok
}

func TestEnqueueTx_SaysWhatTheDatabaseLacks(t *testing.T) {
	t.Parallel()
	empty := connect(t, testservers.Postgres(t))
	_, err := new(tasks.Client).EnqueueTx(t.Context(), empty, parcel{To: "Ada"}, nil)
	if err == nil || !strings.Contains(err.Error(), "run the command migrate") {
		t.Errorf("without carpool's tables: %v", err)
	}

	kit := taskstest.New(t)
	_, err = new(tasks.Client).EnqueueTx(t.Context(), kit.DB, parcel{To: "Ada"}, nil)
	if err == nil || !strings.Contains(err.Error(), "run: worker migrate") {
		t.Errorf("without any kind: %v", err)
	}
	record[parcel](t, kit)
	_, err = new(tasks.Client).EnqueueTx(t.Context(), kit.DB, numbers{}, nil)
	if err == nil || !strings.Contains(err.Error(), "The kinds are parcel:send.") {
		t.Errorf("without this kind: %v", err)
	}
}

func TestEnqueueSQL_RefusesWhatNoWorkerCouldRun(t *testing.T) {
	t.Parallel()
	kit := outbox(t)
	const hint = "The fields are to (string), count (integer), weight (number, optional), fragile (boolean, optional), tags (array, optional), " +
		"extra (any JSON, optional), due (string, optional), inside (object, optional)."
	const ok = `'parcel:send', '{"to": "s3cret", "count": 1}'`
	for _, c := range []struct{ args, message, hint string }{
		{`'parcel:lose', '{}'`, `unknown kind of job: "parcel:lose"`, "The kinds are parcel:send."},
		{`null, '{}'`, `unknown kind of job: null`, "The kinds are parcel:send."},
		{`'parcel:send', null`, `parcel:send payload: want a JSON object, got null`, hint},
		{`'parcel:send', '["s3cret"]'`, `parcel:send payload: want a JSON object, got array`, hint},
		{`'parcel:send', '"s3cret"'`, `parcel:send payload: want a JSON object, got string`, hint},
		{`'parcel:send', '{"to": "s3cret", "count": 1, "from": "s3cret"}'`, `parcel:send payload: unknown field "from"`, hint},
		{`'parcel:send', '{"To": "s3cret", "count": 1}'`, `parcel:send payload: unknown field "To"`, hint},
		{`'parcel:send', '{"to": "s3cret"}'`, `parcel:send payload: count: is missing`, hint},
		{`'parcel:send', '{"to": null, "count": 1}'`, `parcel:send payload: to: want string, got null`, hint},
		{`'parcel:send', '{"to": 424242, "count": 1}'`, `parcel:send payload: to: want string, got number`, hint},
		{`'parcel:send', '{"to": "s3cret", "count": "s3cret"}'`, `parcel:send payload: count: want integer, got string`, hint},
		{`'parcel:send', '{"to": "s3cret", "count": 42424.2}'`, `parcel:send payload: count: want integer, got a number that is not whole, or has more than 64 bits`, hint},
		{`'parcel:send', '{"to": "s3cret", "count": 1e30}'`, `parcel:send payload: count: want integer, got a number that is not whole, or has more than 64 bits`, hint},
		{`'parcel:send', '{"to": "s3cret", "count": 99999999999999999999}'`, `parcel:send payload: count: want integer, got a number that is not whole, or has more than 64 bits`, hint},
		{`'parcel:send', '{"to": "s3cret", "count": 1, "weight": "s3cret"}'`, `parcel:send payload: weight: want number, got string`, hint},
		{`'parcel:send', '{"to": "s3cret", "count": 1, "fragile": "s3cret"}'`, `parcel:send payload: fragile: want boolean, got string`, hint},
		{`'parcel:send', '{"to": "s3cret", "count": 1, "tags": "s3cret"}'`, `parcel:send payload: tags: want array, got string`, hint},
		{`'parcel:send', '{"to": "s3cret", "count": 1, "inside": ["s3cret"]}'`, `parcel:send payload: inside: want object, got array`, hint},
		{ok + `, queue => 'lo w'`, `queue: must be 1 to 100 letters, digits, or _ . : -`, ownOption},
		{ok + `, queue => ''`, `queue: must be 1 to 100 letters, digits, or _ . : -`, ownOption},
		{ok + `, queue => 'low{1}'`, `queue: must be 1 to 100 letters, digits, or _ . : -`, ownOption},
		{ok + `, queue => E'low\n'`, `queue: must be 1 to 100 letters, digits, or _ . : -`, ownOption},
		{ok + `, queue => repeat('q', 101)`, `queue: must be 1 to 100 letters, digits, or _ . : -`, ownOption},
		{ok + `, queue => 'instance-host-01234567'`, `queue: is a worker's own, which takes pool:validate alone`, ownOption},
		{ok + `, max_retry => -1`, `max_retry: is less than 0, which is no retry`, ownOption},
		{ok + `, timeout => '0'`, `timeout: must be from 1 second to 30 days`, ownOption},
		{ok + `, timeout => '-1 h'`, `timeout: must be from 1 second to 30 days`, ownOption},
		{ok + `, timeout => '1 year'`, `timeout: must be from 1 second to 30 days`, ownOption},
		{ok + `, retention => '0'`, `retention: must be from 1 second to 366 days`, ownOption},
		{ok + `, retention => '2 years'`, `retention: must be from 1 second to 366 days`, ownOption},
		{ok + `, run_at => 'infinity'`, `run_at: is more than ten years away`, ownOption},
		{ok + `, run_at => '12000-01-01'`, `run_at: is more than ten years away`, ownOption},
		{ok + `, unique_key => ''`, `unique_key: is empty; leave it out if the job needs none`, ownOption},
		{ok + `, unique_key => repeat('s3cret', 1000)`, `unique_key: has more than 1000 bytes`, ownOption},
	} {
		_, err := kit.DB.Exec(t.Context(), "SELECT carpool.enqueue("+c.args+")")
		e, isPg := errors.AsType[*pgconn.PgError](err)
		if !isPg {
			t.Errorf("%s: %v", c.args, err)
			continue
		}
		if e.Code != "22023" || e.Message != c.message || e.Hint != c.hint {
			t.Errorf("%s\n is refused with  %s %q\n    with the hint %q\n want       22023 %q\n    with the hint %q", c.args, e.Code, e.Message, e.Hint, c.message, c.hint)
		}
		if said := fmt.Sprintf("%+v", *e); strings.Contains(said, "s3cret") || strings.Contains(said, "42424") {
			t.Errorf("%s: the error repeats the payload: %s", c.args, said)
		}
	}
	if rows := outboxRows(t, kit); len(rows) > 0 {
		t.Errorf("the outbox has rows all the same: %v", rows)
	}
}

const ownOption = "Leave it out, or pass null, for the kind's own."

func TestEnqueueSQL_TakesWhateverClientsMarshal(t *testing.T) {
	t.Parallel()
	kit := outbox(t)
	record[numbers](t, kit)
	rapid.Check(t, func(rt *rapid.T) {
		text := rapid.StringOf(rapid.Rune().Filter(func(r rune) bool { return r != 0 })) // which jsonb can't hold
		var p tasks.Payload = parcel{
			To:      "x" + text.Draw(rt, "to"),
			Count:   rapid.Int().Draw(rt, "count"),
			Weight:  rapid.Float64().Draw(rt, "weight"),
			Fragile: rapid.Bool().Draw(rt, "fragile"),
			Tags:    rapid.SliceOf(text).Draw(rt, "tags"),
			Extra:   rapid.SampledFrom([]json.RawMessage{nil, []byte("null"), []byte("1"), []byte(`{"a": [1]}`)}).Draw(rt, "extra"),
			Due:     rapid.SampledFrom([]*time.Time{nil, new(time.Now())}).Draw(rt, "due"),
		}
		if rapid.Bool().Draw(rt, "numbers") {
			p = numbers{rapid.Int64().Draw(rt, "int64"), rapid.Uint64().Draw(rt, "uint64"), rapid.Float32().Draw(rt, "float32"), nil, nil}
		}
		tx, err := kit.DB.Begin(t.Context())
		if err != nil {
			rt.Fatal(err)
		}
		defer tx.Rollback(context.Background())
		if _, err := new(tasks.Client).EnqueueTx(t.Context(), tx, p, nil); err != nil {
			rt.Errorf("%+v: %v", p, err)
		}
	})
}

// numbers has none but required fields.
type numbers struct {
	Signed   int64          `json:"signed"`
	Unsigned uint64         `json:"unsigned"`
	Float    float32        `json:"float"`
	List     []string       `json:"list"`
	Map      map[string]int `json:"map"`
}

func (numbers) Kind() string           { return "numbers:add" }
func (numbers) Options() tasks.Options { return tasks.Options{} }
func (numbers) Validate() error        { return nil }

func TestEnqueueSQL_IDsAreUUIDsOfVersion7InTheOrderOfTime(t *testing.T) {
	t.Parallel()
	kit := outbox(t)
	var ids []string
	before := time.Now()
	for range 50 {
		var id string
		if err := kit.DB.QueryRow(t.Context(), `SELECT carpool.enqueue('parcel:send', '{"to": "Ada", "count": 1}') FROM pg_sleep(0.002)`).Scan(&id); err != nil {
			t.Fatal(err)
		}
		ids = append(ids, id)
	}
	after := time.Now()
	if !slices.IsSorted(ids) || len(slices.Compact(slices.Clone(ids))) != len(ids) {
		t.Errorf("ids made milliseconds apart are not in order: %v", ids)
	}
	for _, id := range ids {
		u, err := uuid.Parse(id)
		if err != nil || u.Version() != 7 || u.Variant() != uuid.RFC4122 || u.String() != id {
			t.Fatalf("%s is no UUID of version 7 (%v)", id, err)
		}
		sec, ns := u.Time().UnixTime()
		if made := time.Unix(sec, ns); made.Before(before.Add(-2*time.Millisecond)) || made.After(after) {
			t.Errorf("%s says it was made at %s; it was between %s and %s", id, made, before, after)
		}
	}
}

func TestEnqueueSQL_AProducerNeedsUsageAndExecuteAndHasNoMore(t *testing.T) {
	t.Parallel()
	kit := outbox(t)
	producer, role := login(t, kit)
	exec := func(sql string) {
		t.Helper()
		if _, err := kit.DB.Exec(t.Context(), sql); err != nil {
			t.Fatal(err)
		}
	}
	refused := func(sql string) {
		t.Helper()
		_, err := producer.Exec(t.Context(), sql)
		if e, ok := errors.AsType[*pgconn.PgError](err); !ok || e.Code != "42501" { // insufficient_privilege
			t.Errorf("%s: %v", sql, err)
		}
	}
	const enqueue = `SELECT carpool.enqueue('parcel:send', '{"to": "Ada", "count": 1}')`

	refused(enqueue)
	exec("GRANT USAGE ON SCHEMA carpool TO " + role)
	refused(enqueue)
	exec("GRANT EXECUTE ON FUNCTION carpool.enqueue TO " + role)
	// Names of the producer's own don't get in the way.
	for _, sql := range []string{"CREATE TEMP TABLE kinds (kind text, fields jsonb)", "CREATE TEMP TABLE outbox (id int)", enqueue} {
		if _, err := producer.Exec(t.Context(), sql); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := new(tasks.Client).EnqueueTx(t.Context(), producer, parcel{To: "Ada"}, nil); err != nil {
		t.Error(err)
	}
	if rows := outboxRows(t, kit); len(rows) != 2 {
		t.Errorf("the outbox has %d rows, want 2", len(rows))
	}
	tables := 0
	for _, operator := range []bool{false, true} { // who may enqueue more, but sees no more
		if operator {
			exec("GRANT carpool_operator TO " + role)
		}
		rows, err := kit.DB.Query(t.Context(), "SELECT relname FROM pg_class WHERE relnamespace = 'carpool'::regnamespace AND relkind = 'r'")
		if err != nil {
			t.Fatal(err)
		}
		names, err := pgx.CollectRows(rows, pgx.RowTo[string])
		if err != nil {
			t.Fatal(err)
		}
		tables = len(names)
		for _, table := range names {
			refused("SELECT FROM carpool." + table)
			refused("INSERT INTO carpool." + table + " DEFAULT VALUES")
			refused("DELETE FROM carpool." + table)
			refused("TRUNCATE carpool." + table)
			refused("ALTER TABLE carpool." + table + " DISABLE TRIGGER ALL")
		}
		for _, set := range []string{"outbox SET kind = ''", "schedules SET kind = ''", "kinds SET operators = false"} {
			refused("UPDATE carpool." + set)
		}
		refused("CREATE TABLE carpool.mine ()")
	}
	if tables < 6 {
		t.Errorf("%d tables were tried", tables)
	}
}

// login connects as a role of the test's own, which has no rights.
func login(t *testing.T, kit *taskstest.Kit) (conn *pgx.Conn, role string) {
	t.Helper()
	as, role := newRole(t, kit)
	return connect(t, as), role
}

// connect opens a session of its own, which ends with the test at the latest.
func connect(t *testing.T, url string) *pgx.Conn {
	t.Helper()
	conn, err := pgx.Connect(t.Context(), url)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close(context.Background()) })
	return conn
}

// newRole makes a role of the test's own, which has no rights, and returns the URL with which
// it logs in.
func newRole(t *testing.T, kit *taskstest.Kit) (as, role string) {
	t.Helper()
	u, err := url.Parse(kit.DatabaseURL)
	if err != nil {
		t.Fatal(err)
	}
	role = "role_" + strings.Trim(u.Path, "/") // roles are the server's, not the database's
	if _, err := kit.DB.Exec(t.Context(), "CREATE ROLE "+role+" LOGIN PASSWORD 'p'"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		for _, sql := range []string{"DROP OWNED BY " + role, "DROP ROLE " + role} {
			if _, err := kit.DB.Exec(context.Background(), sql); err != nil {
				t.Error(err)
			}
		}
	})
	u.User = url.UserPassword(role, "p")
	return u.String(), role
}

// A producer has the rights that the README grants, and no more power than those.
func TestEnqueue_WhatIsPowerIsForOperators(t *testing.T) {
	t.Parallel()
	kit := taskstest.New(t)
	set, err := tasks.NewSet(new(builtin.Tasks), new(maintenance.Tasks))
	if err != nil {
		t.Fatal(err)
	}
	tasks.Register(set, func(context.Context, *tasks.Job, parcel) (any, error) { return nil, nil })
	if err := tasks.RecordKinds(t.Context(), kit.DB, set); err != nil {
		t.Fatal(err)
	}
	producer, role := login(t, kit)
	for _, sql := range []string{"GRANT USAGE ON SCHEMA carpool TO " + role, "GRANT EXECUTE ON FUNCTION carpool.enqueue TO " + role} {
		if _, err := kit.DB.Exec(t.Context(), sql); err != nil {
			t.Fatal(err)
		}
	}
	enqueue := func(conn interface {
		QueryRow(context.Context, string, ...any) pgx.Row
	}, kind string,
	) error {
		task, err := set.Lookup(kind)
		if err != nil {
			t.Fatal(err)
		}
		return conn.QueryRow(t.Context(), "SELECT carpool.enqueue($1, $2)", kind, task.Example()).Scan(new(string))
	}
	power := []string{"carpool:prune", "csv:import", "pool:validate", "rows:prune", "webhook:deliver"}
	for _, kind := range power {
		err := enqueue(producer, kind)
		if e, ok := errors.AsType[*pgconn.PgError](err); !ok || e.Code != pgerrcode.InsufficientPrivilege ||
			!strings.Contains(e.Message, kind) || e.Hint != "GRANT carpool_operator TO "+role+";" {
			t.Errorf("%s by a producer: %v", kind, err)
		}
		if err := enqueue(kit.DB, kind); err != nil {
			t.Errorf("%s by the role that migrated: %v", kind, err)
		}
	}
	if err := enqueue(producer, "parcel:send"); err != nil {
		t.Errorf("a kind for producers: %v", err)
	}
	if _, err := kit.DB.Exec(t.Context(), "GRANT carpool_operator TO "+role); err != nil {
		t.Fatal(err)
	}
	for _, kind := range power {
		if err := enqueue(producer, kind); err != nil {
			t.Errorf("%s by an operator: %v", kind, err)
		}
	}
	// What docs/security.md warns of: who may write the tables needs no such leave.
	for _, sql := range []string{"REVOKE carpool_operator FROM " + role, "GRANT INSERT ON carpool.outbox, carpool.schedules TO " + role, "GRANT SELECT ON carpool.kinds TO " + role} {
		if _, err := kit.DB.Exec(t.Context(), sql); err != nil {
			t.Fatal(err)
		}
	}
	if err := enqueue(producer, "rows:prune"); err == nil {
		t.Error("rows:prune by one who is an operator no more, and may write the tables: no error")
	}
	for _, sql := range []string{
		"INSERT INTO carpool.outbox (id, kind, payload) VALUES (gen_random_uuid(), 'rows:prune', '{}')",
		"INSERT INTO carpool.schedules (name, cron, kind) VALUES ('a', '@daily', 'rows:prune')",
	} {
		if _, err := producer.Exec(t.Context(), sql); err != nil {
			t.Errorf("%s: %v", sql, err)
		}
	}
}

func TestRecordKinds_WritesWhatHasChangedAndNothingElse(t *testing.T) {
	t.Parallel()
	kit := taskstest.New(t)
	state := func() (versions map[string]string) {
		t.Helper()
		rows, err := kit.DB.Query(t.Context(), "SELECT kind, xmin::text FROM carpool.kinds")
		if err != nil {
			t.Fatal(err)
		}
		versions = make(map[string]string)
		var kind, version string
		if _, err := pgx.ForEachRow(rows, []any{&kind, &version}, func() error {
			versions[kind] = version
			return nil
		}); err != nil {
			t.Fatal(err)
		}
		return versions
	}
	set, err := tasks.NewSet(new(builtin.Tasks), new(maintenance.Tasks))
	if err != nil {
		t.Fatal(err)
	}
	var starts sync.WaitGroup
	for range 5 { // workers start at once
		starts.Go(func() {
			if err := tasks.RecordKinds(t.Context(), kit.DB, set); err != nil {
				t.Error(err)
			}
		})
	}
	starts.Wait()
	first := state()
	if len(first) != len(set.Kinds()) {
		t.Errorf("recorded are %v, want %v", first, set.Kinds())
	}
	for _, sql := range []string{
		"UPDATE carpool.kinds SET seen_at = now() - interval '2 hours' WHERE kind = 'csv:import'",
		"UPDATE carpool.kinds SET fields = '[]' WHERE kind = 'rows:prune'",
		"INSERT INTO carpool.kinds VALUES ('others:own', '[]', now() - interval '1 year')",
	} {
		if _, err := kit.DB.Exec(t.Context(), sql); err != nil {
			t.Fatal(err)
		}
	}
	before := state()
	if err := tasks.RecordKinds(t.Context(), kit.DB, set); err != nil {
		t.Fatal(err)
	}
	for kind, version := range state() {
		changed, want := version != before[kind], kind == "csv:import" || kind == "rows:prune"
		if changed != want {
			t.Errorf("%s: written again: %v, want %v", kind, changed, want)
		}
	}
	if err := tasks.RecordKinds(t.Context(), kit.DB, new(tasks.Set)); err != nil {
		t.Errorf("an empty set: %v", err)
	}
}
