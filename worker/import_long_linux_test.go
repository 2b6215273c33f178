//go:build long && !race

package worker_test

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"regexp"
	"strconv"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/carpool-go/carpool/tasks/csvimport"
	"github.com/carpool-go/carpool/worker/internal/workertest"
)

// The memory is what the kernel has counted, so the race detector, which takes several times
// as much, is left out.
func TestLong_AGigabyteOfCSVWithinLittleMemory(t *testing.T) {
	const size, mostMemory = 1 << 30, 100 << 20
	var block bytes.Buffer
	rows := 0
	for ; block.Len() < 1<<20; rows++ {
		fmt.Fprintf(&block, "%d,00501,12.5,true,2024-02-29,2024-02-29T12:00:00Z,\"Smith, J\",,%0*d\n", rows, 200, rows)
	}
	blocks := size / block.Len()
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		_, _ = io.WriteString(w, "id,zip,price,active,day,at,name,empty,long\n")
		for range blocks {
			if _, err := w.Write(block.Bytes()); err != nil {
				return
			}
		}
	}))
	defer server.Close()

	b := workertest.Setup(t)
	p := b.Start(t, "OUTBOUND_ALLOW=127.0.0.1")
	idle := peakMemory(t, p)
	info, err := b.Client.Enqueue(t.Context(), csvimport.Import{Source: server.URL, Table: "large", Mode: "replace"}, nil)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Minute)
	defer cancel()
	began := time.Now()
	data, err := b.Client.Wait(ctx, info.Queue, info.ID, nil)
	if err != nil {
		t.Fatal(err)
	}
	peak := peakMemory(t, p)
	var result csvimport.Result
	if err := json.Unmarshal(data, &result); err != nil {
		t.Fatal(err)
	}
	t.Logf("%d rows, %d MiB in %v; the worker had %d MiB at most, and %d MiB before", result.Rows, result.Bytes>>20, time.Since(began).Round(time.Second), peak>>20, idle>>20)
	if want := int64(rows * blocks); result.Rows != want || result.Bytes < size-2<<20 {
		t.Errorf("the result says %d rows, %d bytes; want %d rows", result.Rows, result.Bytes, want)
	}
	conn, err := pgx.Connect(t.Context(), b.DatabaseURL)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(context.Background())
	var count, sum int64
	if err := conn.QueryRow(t.Context(), "SELECT count(*), sum(id)::bigint FROM imports.large").Scan(&count, &sum); err != nil {
		t.Fatal(err)
	}
	if count != int64(rows*blocks) || sum != int64(blocks*(rows*(rows-1)/2)) {
		t.Errorf("the table has %d rows whose ids add up to %d; want %d rows", count, sum, rows*blocks)
	}
	if peak > mostMemory {
		t.Errorf("the worker had %d MiB for a file of %d MiB; want at most %d", peak>>20, result.Bytes>>20, mostMemory>>20)
	}
	p.Signal(t, syscall.SIGTERM)
	if code := p.Exit(t); code != 0 {
		t.Errorf("exit code %d", code)
	}
}

var highWater = regexp.MustCompile(`VmHWM:\s+(\d+) kB`)

// peakMemory is the most memory that a worker has had so far, in bytes, as the kernel
// counts it.
func peakMemory(t *testing.T, p *workertest.Process) int64 {
	t.Helper()
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.Cmd.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	m := highWater.FindSubmatch(status)
	if m == nil {
		t.Fatalf("no VmHWM in\n%s", status)
	}
	kilobytes, err := strconv.ParseInt(string(m[1]), 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	return kilobytes << 10
}
