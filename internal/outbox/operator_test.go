package outbox_test

import (
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/carpool-go/carpool/internal/outbox"
)

func TestList_ChoosesWhatFitsTheFilter(t *testing.T) {
	t.Parallel()
	conn := newFixture(t).connect(t)
	insert(t, conn,
		outbox.Row{ID: idB, Kind: "note:take", Payload: []byte(`{}`), Queue: "notes"},
		outbox.Row{ID: idA, Kind: "note:take", Payload: []byte(`{}`)},
		outbox.Row{ID: idC, Kind: "letter:write", Payload: []byte(`{}`)})
	if _, err := conn.Exec(t.Context(), "UPDATE carpool.outbox SET problem = 'the % is bad' WHERE id <> $1", idB); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		filter outbox.Filter
		limit  int
		want   []string
	}{
		"all, in their order":        {outbox.Filter{}, 0, []string{idB, idA, idC}},
		"the first":                  {outbox.Filter{}, 2, []string{idB, idA}},
		"by kind":                    {outbox.Filter{Kind: "note:take"}, 0, []string{idB, idA}},
		"by problem, as it is":       {outbox.Filter{Problem: "% is"}, 0, []string{idA, idC}},
		"by another problem":         {outbox.Filter{Problem: "_ is"}, 0, nil},
		"those that wait":            {outbox.Filter{Waiting: true}, 0, []string{idB}},
		"the rejected ones":          {outbox.Filter{Rejected: true}, 0, []string{idA, idC}},
		"both":                       {outbox.Filter{Waiting: true, Rejected: true}, 0, []string{idB, idA, idC}},
		"by id":                      {outbox.Filter{IDs: []string{idC, idB}}, 0, []string{idB, idC}},
		"by id and kind":             {outbox.Filter{IDs: []string{idC, idB}, Kind: "note:take"}, 0, []string{idB}},
		"an id of somebody else's":   {outbox.Filter{IDs: []string{"somebody"}}, 0, nil},
		"no id, which is not any id": {outbox.Filter{IDs: []string{}}, 0, nil},
	} {
		entries, err := outbox.List(t.Context(), conn, c.filter, c.limit)
		if err != nil {
			t.Fatal(err)
		}
		var got []string
		for _, e := range entries {
			got = append(got, e.ID)
		}
		if diff := cmp.Diff(c.want, got); diff != "" {
			t.Errorf("%s (-want +got):\n%s", name, diff)
		}
	}
}

func TestList_SaysOfARowWhatItIs(t *testing.T) {
	t.Parallel()
	conn := newFixture(t).connect(t)
	insert(t, conn, outbox.Row{ID: idA, Kind: "note:take", Payload: []byte(`{}`), Queue: "notes"})
	if _, err := conn.Exec(t.Context(), "UPDATE carpool.outbox SET created_at = created_at - interval '1 hour', problem = 'bad'"); err != nil {
		t.Fatal(err)
	}
	entries, err := outbox.List(t.Context(), conn, outbox.Filter{}, 0)
	if err != nil || len(entries) != 1 {
		t.Fatal(entries, err)
	}
	got := entries[0]
	if got.Age < time.Hour || got.CreatedAt.IsZero() {
		t.Errorf("%+v", got)
	}
	want := outbox.Entry{ID: idA, Kind: "note:take", Queue: "notes", Problem: "bad", CreatedAt: got.CreatedAt, Age: got.Age}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}

func TestRetry_LetsRejectedRowsWaitAgain(t *testing.T) {
	t.Parallel()
	conn := newFixture(t).connect(t)
	insert(t, conn, outbox.Row{ID: idA, Kind: "note:take", Payload: []byte(`{}`)}, outbox.Row{ID: idB, Kind: "note:take", Payload: []byte(`{}`)})
	if _, err := conn.Exec(t.Context(), "UPDATE carpool.outbox SET problem = 'bad' WHERE id = $1", idA); err != nil {
		t.Fatal(err)
	}
	retried, err := outbox.Retry(t.Context(), conn, []string{idA, idB, idC})
	if diff := cmp.Diff([]string{idA}, retried); err != nil || diff != "" {
		t.Errorf("%v (-want +got):\n%s", err, diff)
	}
	if s := stats(t, conn); s.Waiting != 2 || s.Rejected != 0 {
		t.Errorf("%+v", s)
	}
}

func TestRetryAndDelete_PassOverRowsThatAreLocked(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	relay, operator := f.connect(t), f.connect(t)
	insert(t, relay, outbox.Row{ID: idA, Kind: "note:take", Payload: []byte(`{}`)}, outbox.Row{ID: idB, Kind: "letter:write", Payload: []byte(`{}`)})
	tx := begin(t, relay)
	take(t, tx, "note:take")
	deleted, err := outbox.Delete(t.Context(), operator, []string{idA, idB, idC})
	if diff := cmp.Diff([]string{idB}, deleted); err != nil || diff != "" {
		t.Errorf("%v (-want +got):\n%s", err, diff)
	}
	if err := outbox.Finish(t.Context(), tx, nil, []outbox.Rejection{{ID: idA, Problem: "bad"}}); err != nil {
		t.Fatal(err)
	}
	if retried, err := outbox.Retry(t.Context(), operator, []string{idA}); err != nil || len(retried) != 0 {
		t.Errorf("retried %v, %v", retried, err)
	}
}

func TestUnknown_CountsRowsOfOtherKindsThatHaveWaited(t *testing.T) {
	t.Parallel()
	conn := newFixture(t).connect(t)
	insert(t, conn,
		outbox.Row{ID: idA, Kind: "letter:write", Payload: []byte(`{}`)},
		outbox.Row{ID: idB, Kind: "note:take", Payload: []byte(`{}`)},
		outbox.Row{ID: idC, Kind: "card:write", Payload: []byte(`{}`)})
	if _, err := conn.Exec(t.Context(), "UPDATE carpool.outbox SET problem = 'bad' WHERE id = $1", idC); err != nil {
		t.Fatal(err)
	}
	for waited, want := range map[time.Duration][]outbox.KindCount{0: {{Kind: "letter:write", Rows: 1}}, time.Hour: {}} {
		got, err := outbox.Unknown(t.Context(), conn, []string{"note:take"}, waited)
		if diff := cmp.Diff(want, got); err != nil || diff != "" {
			t.Errorf("%v (-want +got):\n%s", err, diff)
		}
	}
}
