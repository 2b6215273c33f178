package outbox_test

import (
	"context"
	"errors"
	"log/slog"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/carpool-go/carpool/internal/outbox"
	"github.com/carpool-go/carpool/internal/schema"
	"github.com/carpool-go/carpool/internal/testservers"
)

func TestMain(m *testing.M) { testservers.Main(m) }

const (
	idA = "018f0000-0000-7000-8000-00000000000a"
	idB = "018f0000-0000-7000-8000-00000000000b"
	idC = "018f0000-0000-7000-8000-00000000000c"
)

// fixture is a database with carpool's tables, and connections to it.
type fixture struct{ url string }

func newFixture(t *testing.T) fixture {
	t.Helper()
	f := fixture{testservers.Postgres(t)}
	if err := schema.Migrate(t.Context(), f.url, slog.New(slog.DiscardHandler)); err != nil {
		t.Fatal(err)
	}
	return f
}

func (f fixture) connect(t *testing.T) *pgx.Conn {
	t.Helper()
	conn, err := pgx.Connect(t.Context(), f.url)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close(context.Background()) })
	return conn
}

func insert(t *testing.T, conn *pgx.Conn, rows ...outbox.Row) {
	t.Helper()
	b := new(pgx.Batch)
	outbox.Insert(b, rows...)
	if err := conn.SendBatch(t.Context(), b).Close(); err != nil {
		t.Fatal(err)
	}
}

func begin(t *testing.T, conn *pgx.Conn) pgx.Tx {
	t.Helper()
	tx, err := outbox.Begin(t.Context(), conn)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = tx.Rollback(context.Background()) })
	return tx
}

func take(t *testing.T, tx pgx.Tx, kinds ...string) []outbox.Row {
	t.Helper()
	var rows []outbox.Row
	all := outbox.Choice{Kinds: kinds, Limit: 10, Bytes: 1 << 20}
	if _, err := outbox.Take(t.Context(), tx, all, func(r outbox.Taken) { rows = append(rows, r.Row) }); err != nil {
		t.Fatal(err)
	}
	return rows
}

func stats(t *testing.T, conn *pgx.Conn) outbox.Stats {
	t.Helper()
	s, err := outbox.ReadStats(t.Context(), conn)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestTake_ReturnsWhatWasInsertedInItsOrder(t *testing.T) {
	t.Parallel()
	conn := newFixture(t).connect(t)
	never := 0
	full := outbox.Row{
		ID: idB, Kind: "note:take", Payload: []byte(`{"text": "n"}`), Queue: "notes", UniqueKey: "u",
		RunAt: time.Date(2026, 5, 5, 12, 0, 0, 0, time.UTC), MaxRetry: &never, Timeout: 90 * time.Second, Retention: time.Hour,
	}
	plain := outbox.Row{ID: idA, Kind: "note:take", Payload: []byte(`{}`)}
	insert(t, conn, full, plain, outbox.Row{ID: idC, Kind: "letter:write", Payload: []byte(`{}`)})
	insert(t, conn, outbox.Row{ID: idA, Kind: "note:take", Payload: []byte(`{"text": "again"}`)})
	insert(t, conn)

	got := take(t, begin(t, conn), "note:take")
	for i := range got {
		if !got[i].RunAt.IsZero() {
			got[i].RunAt = got[i].RunAt.UTC()
		}
	}
	if diff := cmp.Diff([]outbox.Row{full, plain}, got); diff != "" {
		t.Error(diff)
	}
}

func TestTake_PassesOverRowsThatAnotherHasLocked(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	first, second := f.connect(t), f.connect(t)
	insert(t, first, outbox.Row{ID: idA, Kind: "note:take", Payload: []byte(`{}`)})
	if got := take(t, begin(t, first), "note:take"); len(got) != 1 {
		t.Fatalf("%d rows, want one", len(got))
	}
	if got := take(t, begin(t, second), "note:take"); len(got) != 0 {
		t.Errorf("%d rows that another has locked", len(got))
	}
}

func TestInsert_NotifiesTheRelays(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	relay := f.connect(t)
	if _, err := relay.Exec(t.Context(), "LISTEN "+outbox.Channel); err != nil {
		t.Fatal(err)
	}
	insert(t, f.connect(t), outbox.Row{ID: idA, Kind: "note:take", Payload: []byte(`{}`)})
	if _, err := relay.WaitForNotification(t.Context()); err != nil {
		t.Fatal(err)
	}
}

func TestFinish_DeletesWhatWasMovedAndRejectsTheRest(t *testing.T) {
	t.Parallel()
	conn := newFixture(t).connect(t)
	insert(t, conn,
		outbox.Row{ID: idA, Kind: "note:take", Payload: []byte(`{}`)},
		outbox.Row{ID: idB, Kind: "note:take", Payload: []byte(`{}`)},
		outbox.Row{ID: idC, Kind: "note:take", Payload: []byte(`{}`)})
	tx := begin(t, conn)
	take(t, tx, "note:take")
	if err := outbox.Finish(t.Context(), tx, []string{idA}, []outbox.Rejection{{ID: idB, Problem: "it is bad"}}); err != nil {
		t.Fatal(err)
	}
	if err := tx.Commit(t.Context()); err != nil {
		t.Fatal(err)
	}
	if s := stats(t, conn); s.Waiting != 1 || s.Rejected != 1 || s.Oldest <= 0 {
		t.Errorf("%+v", s)
	}
	problems, err := outbox.Problems(t.Context(), conn, 5)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]outbox.Problem{{"it is bad", 1}}, problems); diff != "" {
		t.Error(diff)
	}
	// What is rejected is there, and doesn't wait.
	present, err := outbox.Present(t.Context(), conn, []string{idA, idB, idC, "an id of somebody else's"})
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(map[string]bool{idB: true, idC: true}, present); diff != "" {
		t.Error(diff)
	}
	for id, want := range map[string]bool{idA: false, idB: false, idC: true} {
		var waits bool
		if err := conn.QueryRow(t.Context(), "SELECT "+outbox.IsWaiting("$1::text::uuid"), id).Scan(&waits); err != nil {
			t.Fatal(err)
		}
		if waits != want {
			t.Errorf("%s waits: %t", id, waits)
		}
	}
}

func TestRejectUnknown_RowsWaitAgainWhereTheirKindIsKnown(t *testing.T) {
	t.Parallel()
	conn := newFixture(t).connect(t)
	insert(t, conn,
		outbox.Row{ID: idA, Kind: "letter:write", Payload: []byte(`{}`)},
		outbox.Row{ID: idB, Kind: "note:take", Payload: []byte(`{}`)})
	reject := func() []outbox.KindCount {
		t.Helper()
		rejected, err := outbox.RejectUnknown(t.Context(), conn, []string{"note:take"})
		if err != nil {
			t.Fatal(err)
		}
		return rejected
	}
	if got := reject(); len(got) != 0 {
		t.Errorf("rejected at once: %v", got)
	}
	if _, err := conn.Exec(t.Context(), "UPDATE carpool.outbox SET created_at = now() - interval '11 minutes'"); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]outbox.KindCount{{"letter:write", 1}}, reject()); diff != "" {
		t.Error(diff)
	}
	for _, c := range []struct {
		kinds    []string
		rejected int
	}{{[]string{"note:take"}, 1}, {[]string{"letter:write", "note:take"}, 0}} {
		if err := outbox.Readmit(t.Context(), conn, c.kinds); err != nil {
			t.Fatal(err)
		}
		if s := stats(t, conn); s.Rejected != c.rejected {
			t.Errorf("%v: %d rows are rejected, want %d", c.kinds, s.Rejected, c.rejected)
		}
	}
}

func TestRemove_TellsWhetherThereWasARow(t *testing.T) {
	t.Parallel()
	conn := newFixture(t).connect(t)
	insert(t, conn, outbox.Row{ID: idA, Kind: "note:take", Payload: []byte(`{}`)})
	for _, want := range []bool{true, false} {
		if removed, err := outbox.Remove(t.Context(), conn, idA); err != nil || removed != want {
			t.Errorf("removed: %t, %v, want %t", removed, err, want)
		}
	}
}

func TestMute_OneOfSeveralRelaysHasTheLock(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	first, second := f.connect(t), f.connect(t)
	change := func(change func(context.Context, *pgx.Conn) (bool, error), conn *pgx.Conn, want bool) {
		t.Helper()
		if held, err := change(t.Context(), conn); err != nil || held != want {
			t.Errorf("held: %t, %v, want %t", held, err, want)
		}
	}
	change(outbox.Mute, first, true)
	change(outbox.Mute, second, false)
	change(outbox.Unmute, first, false)
	change(outbox.Mute, second, true)
}

func TestEnqueue_RefusesAKindThatNoWorkerHasRecorded(t *testing.T) {
	t.Parallel()
	conn := newFixture(t).connect(t)
	row := outbox.Row{Kind: "note:take", Payload: []byte(`{}`), MaxRetry: outbox.MaxRetry(-1)}
	_, err := outbox.Enqueue(t.Context(), conn, row)
	if e, ok := errors.AsType[*pgconn.PgError](err); !ok || e.Code != "22023" {
		t.Errorf("an unknown kind: %v", err)
	}
	if _, err := conn.Exec(t.Context(), "INSERT INTO carpool.kinds VALUES ('note:take', '[]', now())"); err != nil {
		t.Fatal(err)
	}
	id, err := outbox.Enqueue(t.Context(), conn, row)
	if err != nil || !outbox.IsID(id) {
		t.Fatalf("id %q, %v", id, err)
	}
	if got := take(t, begin(t, conn), "note:take"); len(got) != 1 || got[0].ID != id || *got[0].MaxRetry != 0 {
		t.Errorf("the outbox has %+v", got)
	}
}
