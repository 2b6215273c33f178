package outbox_test

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/jackc/pgx/v5"

	"github.com/carpool-go/carpool/internal/limit"
	"github.com/carpool-go/carpool/internal/outbox"
)

func exec(t *testing.T, conn *pgx.Conn, sql string, args ...any) {
	t.Helper()
	if _, err := conn.Exec(t.Context(), sql, args...); err != nil {
		t.Fatal(err)
	}
}

// takeChosen returns the texts of the rows' payloads, which number them, or their problems.
func takeChosen(t *testing.T, tx pgx.Tx, c outbox.Choice) (taken []string, more bool) {
	t.Helper()
	more, err := outbox.Take(t.Context(), tx, c, func(r outbox.Taken) {
		if r.Problem != "" {
			if r.Payload != nil || r.Queue != "" || r.UniqueKey != "" {
				t.Errorf("a row with the problem %q was read", r.Problem)
			}
			taken = append(taken, r.Problem)
			return
		}
		if r.Size != len(r.Payload) {
			t.Errorf("a payload of %d bytes has the size %d", len(r.Payload), r.Size)
		}
		n, _, _ := strings.Cut(strings.TrimPrefix(string(r.Payload), `{"text": "`), " ")
		taken = append(taken, n)
	})
	if err != nil {
		t.Fatal(err)
	}
	return taken, more
}

// Payloads of any size are compressed, so that their true sizes are what counts.
const insertSized = `INSERT INTO carpool.outbox (id, kind, payload)
	SELECT ('018f0000-0000-7000-8000-' || lpad(n::text, 12, '0'))::uuid, 'note:take', jsonb_build_object('text', rpad(n || ' ', size, 'x'))
	FROM unnest($1::int[]) WITH ORDINALITY AS s(size, n)`

func TestTake_TakesTheOldestAndThenTheSmallestUntilTheyHaveSoManyBytes(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	conn, second := f.connect(t), f.connect(t)
	// {"text": ""} is 12 bytes.
	exec(t, conn, insertSized, []int{5000, 5000, 8, 5000, 88, 188, 5000})
	for _, c := range []struct {
		limit, bytes int
		want         []string
		more         bool
	}{
		{10, 1 << 20, []string{"1", "2", "3", "4", "5", "6", "7"}, false},
		{7, 1 << 20, []string{"1", "2", "3", "4", "5", "6", "7"}, true}, // there might be an eighth
		{10, 100_000, []string{"1", "2", "3", "4", "5", "6", "7"}, false},
		{10, 6000, []string{"1", "3", "5", "6"}, true},
		{10, 320, []string{"1", "3", "5", "6"}, true},
		{10, 319, []string{"1", "3", "5"}, true},
		{10, 0, []string{"1"}, true},
		{2, 0, []string{"1"}, true},
	} {
		tx := begin(t, conn)
		got, more := takeChosen(t, tx, outbox.Choice{Kinds: []string{"note:take"}, Limit: c.limit, Bytes: c.bytes})
		if !slices.Equal(got, c.want) || more != c.more {
			t.Errorf("%d rows and %d bytes: %v, more %t, want %v, more %t", c.limit, c.bytes, got, more, c.want, c.more)
		}
		if err := tx.Rollback(t.Context()); err != nil {
			t.Fatal(err)
		}
	}

	id := func(n int) string { return fmt.Sprintf("018f0000-0000-7000-8000-%012d", n) }
	all := outbox.Choice{Kinds: []string{"note:take"}, Limit: 10, Bytes: 320, Except: []string{id(1), id(5)}}
	tx := begin(t, conn)
	if got, _ := takeChosen(t, tx, all); !slices.Equal(got, []string{"2", "3", "6"}) {
		t.Errorf("but for rows 1 and 5: %v", got)
	}
	one := outbox.Choice{Kinds: []string{"note:take"}, Limit: 1, Only: id(1)}
	if got, _ := takeChosen(t, begin(t, second), one); !slices.Equal(got, []string{"1"}) {
		t.Errorf("row 1, which was left alone: %v", got)
	}
}

func TestTake_WhatCanNotBecomeAJobIsNotRead(t *testing.T) {
	t.Parallel()
	conn := newFixture(t).connect(t)
	exec(t, conn, insertSized, []int{8, 8, 8, 8, 8, 100_000})
	for n, change := range map[int]string{
		1: "run_at = 'infinity'", 2: "run_at = '-infinity'", 3: "queue = repeat('q', 101)", 4: "unique_key = repeat('u', 1001)",
		5: "timeout = '10000 years', retention = '10000 years'",
	} {
		exec(t, conn, "UPDATE carpool.outbox SET "+change+" WHERE id = $1", fmt.Sprintf("018f0000-0000-7000-8000-%012d", n))
	}
	if err := limit.Record(t.Context(), conn, 99_999); err != nil {
		t.Fatal(err)
	}
	tx := begin(t, conn)
	got, more := takeChosen(t, tx, outbox.Choice{Kinds: []string{"note:take"}, Limit: 10})
	want := []string{
		"run_at: is infinity, a time that never comes", "2", "queue: has more than 100 bytes", "unique_key: has more than 1000 bytes",
		"note:take payload: 100012 bytes are more than the limit of 99999, which MAX_PAYLOAD sets",
	}
	if diff := cmp.Diff(want, got); diff != "" || !more {
		t.Errorf("more %t (-want +got)\n%s", more, diff)
	}
	_ = tx.Rollback(t.Context())
	exec(t, conn, "DELETE FROM carpool.settings")
	var long outbox.Row
	_, err := outbox.Take(t.Context(), begin(t, conn), outbox.Choice{Kinds: []string{"note:take"}, Limit: 10, Bytes: 1 << 20}, func(r outbox.Taken) {
		if strings.HasPrefix(string(r.Payload), `{"text": "5 `) {
			long = r.Row
		}
	})
	if err != nil || long.Timeout < 24*365*time.Hour || long.Retention < 24*365*time.Hour {
		t.Errorf("an interval longer than a time.Duration is %s and %s: %v", long.Timeout, long.Retention, err)
	}
}

func TestList_AnInfiniteTimeHarmsNothing(t *testing.T) {
	t.Parallel()
	conn := newFixture(t).connect(t)
	exec(t, conn, insertSized, []int{8, 8})
	for n, at := range []string{"infinity", "-infinity"} {
		exec(t, conn, "UPDATE carpool.outbox SET created_at = $1::text::timestamptz WHERE id = $2", at, fmt.Sprintf("018f0000-0000-7000-8000-%012d", n+1))
	}
	rows, err := outbox.List(t.Context(), conn, outbox.Filter{}, 0)
	if err != nil || len(rows) != 2 || time.Since(rows[0].CreatedAt) > time.Hour || time.Since(rows[1].CreatedAt) > time.Hour {
		t.Errorf("%+v, %v", rows, err)
	}
	if s := stats(t, conn); s.Waiting != 2 || s.Oldest != 0 {
		t.Errorf("%+v", s)
	}
}
