package prune

import (
	"errors"
	"slices"
	"strconv"
	"testing"
	"time"

	"github.com/carpool-go/carpool/dbpool"
	"github.com/carpool-go/carpool/internal/testservers"
)

func TestMain(m *testing.M) { testservers.Main(m) }

// openEvents opens a database whose table events has a row for each of the last days,
// numbered by its age in days.
func openEvents(t *testing.T, days int) *dbpool.Pool {
	t.Helper()
	db, err := dbpool.Open(t.Context(), dbpool.DefaultConfig(testservers.Postgres(t)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(db.Close)
	_, err = db.Exec(t.Context(), `CREATE TABLE events AS
		SELECT i AS age, now() - i * interval '1 day' AS at FROM generate_series(1, `+strconv.Itoa(days)+`) i`)
	if err != nil {
		t.Fatal(err)
	}
	return db
}

func TestRun_DeletesWhatIsOldBatchByBatch(t *testing.T) {
	t.Parallel()
	for name, index := range map[string]string{"along the index": "CREATE INDEX ON events (at)", "along the heap": "SELECT"} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			db := openEvents(t, 10)
			if _, err := db.Exec(t.Context(), index); err != nil {
				t.Fatal(err)
			}
			var batches []int64
			left, err := Run{
				DB: db, Schema: "public", Table: "events", Column: "at", OlderThan: 5*24*time.Hour + time.Hour, Batch: 2,
				Deleted: func(rows int64) { batches = append(batches, rows) },
			}.Do(t.Context())
			if want := []int64{2, 2, 1}; err != nil || left != 0 || !slices.Equal(batches, want) {
				t.Errorf("batches of %d, %d rows left, error %v; want batches of %d", batches, left, err, want)
			}
			var count, oldest int
			if err := db.QueryRow(t.Context(), "SELECT count(*), max(age) FROM events").Scan(&count, &oldest); err != nil {
				t.Fatal(err)
			}
			if count != 5 || oldest != 5 {
				t.Errorf("%d rows are there, the oldest of %d days; want 5 of 5", count, oldest)
			}
		})
	}
}

func TestRun_WhatAFurtherRunWouldMeetTooIsPermanent(t *testing.T) {
	t.Parallel()
	db := openEvents(t, 1)
	for name, r := range map[string]Run{
		"no such table":        {Table: "nothing", Column: "at"},
		"no such column":       {Table: "events", Column: "nothing"},
		"a column without age": {Table: "events", Column: "age"},
	} {
		r.DB, r.Schema, r.OlderThan, r.Deleted = db, "public", time.Hour, func(int64) {}
		_, err := r.Do(t.Context())
		if _, ok := errors.AsType[*PermanentError](err); !ok {
			t.Errorf("%s: error %v, which is not permanent", name, err)
		}
	}
}

func TestParseAge_ReadsDaysAndGoDurationsAboveZero(t *testing.T) {
	t.Parallel()
	const day = 24 * time.Hour
	for age, want := range map[string]time.Duration{
		"30d": 30 * day, "1d12h": 36 * time.Hour, "90m": 90 * time.Minute, "0d1s": time.Second, "36500d": 36500 * day,
	} {
		if got, err := ParseAge(age); err != nil || got != want {
			t.Errorf("%q is %s, error %v; want %s", age, got, err, want)
		}
	}
	for _, age := range []string{"", "0", "0d", "-1h", "1d-1h", "d", "3 months", "30", "1h30d", "36501d", "1234567d"} {
		if got, err := ParseAge(age); err == nil {
			t.Errorf("%q is %s; want an error", age, got)
		}
	}
}
