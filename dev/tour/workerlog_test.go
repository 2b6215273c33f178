package main

import (
	"bytes"
	"context"
	"errors"
	"strings"
	"testing"
)

const recordLine = `{"time":"2026-01-31T08:00:00Z","level":"ERROR","msg":"job",` +
	`"job":{"id":"42","kind":"csv:import","queue":"default","attempt":2,"outcome":"archived","took_ms":7},` +
	`"db":{"acquires":1,"wait_ms":2,"held_ms":3,"queries":4},` +
	`"pool":{"pool_size":5,"checked_in":6,"checked_out":7,"overflow":8,"invalid":9,"waiting":10},"error":"no such file"}` + "\n"

func TestWorkerLog_FindsTheRecordOfAJobHoweverTheLinesAreCut(t *testing.T) {
	t.Parallel()
	l := newWorkerLog()
	found := make(chan record, 1)
	go func() {
		r, err := l.recordOf(t.Context(), "42")
		if err != nil {
			t.Error(err)
		}
		found <- r
	}()
	for _, b := range []byte("not JSON\n" + `{"level":"INFO","msg":"worker started"}` + "\n" + recordLine) {
		if _, err := l.Write([]byte{b}); err != nil {
			t.Fatal(err)
		}
	}
	<-l.started
	r := <-found
	if again, err := l.recordOf(t.Context(), "42"); err != nil || again != r {
		t.Errorf("asked again: %v, %v", again, err)
	}
	const want = "csv:import 42: archived in 7 ms at attempt 2\n" +
		"      the database: acquires 1, queries 4, waited 2 ms, held 3 ms\n" +
		"      the pool: size 5, checked in 6, checked out 7, overflow 8, invalid 9, waiting 10\n" +
		"      error: no such file"
	if r.String() != want {
		t.Errorf("got\n%s\nwant\n%s", r, want)
	}
}

func TestWorkerLog_TheWaitForARecordEndsWithTheContext(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := newWorkerLog().recordOf(ctx, "42"); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v, want the context's error", err)
	}
}

func TestWorkerLog_ShowsJobsAndWarningsThatItFollows(t *testing.T) {
	t.Parallel()
	l := newWorkerLog()
	var shown bytes.Buffer
	l.follow(&shown)
	for _, line := range []string{
		recordLine,
		strings.Replace(recordLine, "csv:import", "pool:validate", 1),
		`{"level":"DEBUG","msg":"job","job":{"id":"43","kind":"pool:validate","outcome":"done"}}` + "\n",
		`{"level":"WARN","msg":"Redis is full"}` + "\n",
		`{"level":"INFO","msg":"nothing to see"}` + "\n",
		"panic: in plain text\n",
	} {
		if _, err := l.Write([]byte(line)); err != nil {
			t.Fatal(err)
		}
	}
	for _, want := range []string{"csv:import 42: archived", "pool:validate 42: archived", "worker: Redis is full", "panic: in plain text"} {
		if !strings.Contains(shown.String(), want) {
			t.Errorf("it does not show %q", want)
		}
	}
	for _, unwanted := range []string{"pool:validate 43", "nothing to see"} {
		if strings.Contains(shown.String(), unwanted) {
			t.Errorf("it shows %q", unwanted)
		}
	}
}
