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
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/carpool-go/carpool/tasks"
	"github.com/carpool-go/carpool/tasks/csvimport"
	"github.com/carpool-go/carpool/tasks/webhook"
	"github.com/carpool-go/carpool/worker/internal/workertest"
)

// The memory is what the kernel has counted, so the race detector, which takes several times
// as much, is left out.
func TestLong_AGigabyteOfCSVWithinLittleMemory(t *testing.T) {
	const size, mostMemory = 1 << 30, 100 << 20
	url, rows, blocks := serveCSV(t, size)
	b := workertest.Setup(t)
	p := b.Start(t, "OUTBOUND_ALLOW=127.0.0.1")
	idle := peakMemory(t, p)
	info, err := b.Client.Enqueue(t.Context(), csvimport.Import{Source: url, Table: "large", Mode: "replace"}, nil)
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

// serveCSV serves a file of about that many bytes, in blocks that have the same rows, whose
// ids count from 0.
func serveCSV(t *testing.T, size int) (url string, rows, blocks int) {
	t.Helper()
	var block bytes.Buffer
	for ; block.Len() < 1<<20; rows++ {
		fmt.Fprintf(&block, "%d,00501,12.5,true,2024-02-29,2024-02-29T12:00:00Z,\"Smith, J\",,%0*d\n", rows, 200, rows)
	}
	blocks = size / block.Len()
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		_, _ = io.WriteString(w, "id,zip,price,active,day,at,name,empty,long\n")
		for range blocks {
			if _, err := w.Write(block.Bytes()); err != nil {
				return
			}
		}
	}))
	t.Cleanup(server.Close)
	return server.URL, rows, blocks
}

// Render's plan starter has 512 MB. Where the machine lets us, the kernel holds the worker to
// them, and would kill it. Two large files are imported while the other slots have webhooks
// nearly as large as a payload may be, more of them always waiting.
func TestLong_TheHeaviestLoadFitsIntoRendersSmallestPlan(t *testing.T) {
	const plan, size, imports, largeBody = 512_000_000, 256 << 20, 2, 1000 << 10
	b := workertest.Setup(t)
	url, rows, blocks := serveCSV(t, size)
	var delivered atomic.Int64
	receiver := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body)
		time.Sleep(100 * time.Millisecond) // all slots are busy, and have a body each
		delivered.Add(1)
	}))
	t.Cleanup(receiver.Close)

	p := b.Start(t, "OUTBOUND_ALLOW=127.0.0.1", "WEBHOOK_SECRET=whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")
	group, err := limitMemory(t, p, plan-peakMemory(t, p))
	if err != nil {
		t.Logf("without a real limit: %v", err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Minute)
	defer cancel()
	began := time.Now()
	var large []*tasks.Info
	for i := range imports {
		info, err := b.Client.Enqueue(ctx, csvimport.Import{Source: url, Table: fmt.Sprint("large_", i), Mode: "replace"}, nil)
		if err != nil {
			t.Fatal(err)
		}
		large = append(large, info)
	}
	imported := make(chan struct{})
	var producing sync.WaitGroup
	producing.Go(func() {
		body, err := json.Marshal(strings.Repeat("x", largeBody))
		if err != nil {
			t.Error(err)
			return
		}
		for n := int64(0); ; {
			select {
			case <-imported:
				return
			case <-ctx.Done():
				return
			default:
			}
			if n-delivered.Load() > 30 {
				time.Sleep(10 * time.Millisecond)
				continue
			}
			if _, err := b.Client.Enqueue(ctx, webhook.Deliver{URL: receiver.URL, Event: "large", Body: body}, nil); err != nil {
				t.Error(err)
				return
			}
			n++
		}
	})
	for _, info := range large {
		data, err := b.Client.Wait(ctx, info.Queue, info.ID, nil)
		if err != nil {
			t.Error(err)
			continue
		}
		var result csvimport.Result
		if err := json.Unmarshal(data, &result); err != nil || result.Rows != int64(rows*blocks) {
			t.Errorf("the result is %s, error %v; want %d rows", data, err, rows*blocks)
		}
	}
	close(imported)
	producing.Wait()
	peak := peakMemory(t, p)
	t.Logf("%d files of %d MiB and %d webhooks of %d KiB in %v; the worker had %d MB at most; %s",
		imports, size>>20, delivered.Load(), largeBody>>10, time.Since(began).Round(time.Second), peak/1e6, group.tells())
	if delivered.Load() < 100 {
		t.Error("too few webhooks were delivered to show anything")
	}
	if peak > plan/2 {
		t.Errorf("the worker had %d MB; want at most half of %d, so that handlers have the rest", peak/1e6, plan/1_000_000)
	}
	p.Signal(t, syscall.SIGTERM)
	if code := p.Exit(t); code != 0 {
		t.Errorf("exit code %d", code)
	}
}

// memoryGroup is the folder of a control group; "" for none.
type memoryGroup string

// limitMemory has the kernel kill a worker that takes more memory from now on than most, in
// bytes. That takes root and a writable cgroup file system.
func limitMemory(t *testing.T, p *workertest.Process, most int64) (memoryGroup, error) {
	t.Helper()
	parent, limit := "/sys/fs/cgroup/memory", "memory.limit_in_bytes" // the first version
	if _, err := os.Stat("/sys/fs/cgroup/cgroup.controllers"); err == nil {
		parent, limit = "/sys/fs/cgroup", "memory.max"
	}
	dir, err := os.MkdirTemp(parent, "carpool-test-")
	if err != nil {
		return "", err
	}
	t.Cleanup(func() {
		// It can be removed when nothing runs in it, which is when the worker has been waited for.
		_ = p.Cmd.Process.Kill()
		workertest.Eventually(t, "the control group is gone", func() bool { return os.Remove(dir) == nil })
	})
	if err := os.WriteFile(filepath.Join(dir, limit), []byte(strconv.FormatInt(most, 10)), 0o600); err != nil {
		return "", err
	}
	if err := os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte(strconv.Itoa(p.Cmd.Process.Pid)), 0o600); err != nil {
		return "", err
	}
	return memoryGroup(dir), nil
}

// tells is what the kernel has counted for the group.
func (g memoryGroup) tells() string {
	if g == "" {
		return "no limit was set"
	}
	for _, file := range []string{"memory.max_usage_in_bytes", "memory.peak"} {
		if data, err := os.ReadFile(filepath.Join(string(g), file)); err == nil {
			return fmt.Sprintf("its control group %s bytes, pages of files that it need not keep included, after its start", bytes.TrimSpace(data))
		}
	}
	return "a limit was set"
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
