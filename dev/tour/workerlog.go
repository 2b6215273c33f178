package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"sync"
	"time"
)

// workerLog reads the log of the worker, or of its monitor, which is JSON, one record a line. From it comes what each job did.
type workerLog struct {
	started chan struct{} // closed when it says that it has started

	mu      sync.Mutex               // guards what follows
	up      bool                     // started is closed
	partial []byte                   // a line whose end has not come
	jobs    map[string]chan struct{} // by id: closed when its record is there
	records map[string]record        // until out is set
	out     io.Writer                // where to show what comes; nil: nowhere yet
}

func newWorkerLog() *workerLog {
	return &workerLog{started: make(chan struct{}), jobs: map[string]chan struct{}{}, records: map[string]record{}}
}

// record is the worker's record after each job.
type record struct {
	Level string
	Msg   string
	Error string
	Job   struct {
		ID, Kind, Queue, Outcome string
		Attempt                  int
		TookMS                   int64 `json:"took_ms"`
	}
	DB struct {
		Acquires, Queries int
		WaitMS            int64 `json:"wait_ms"`
		HeldMS            int64 `json:"held_ms"`
	}
	Pool struct {
		Size       int `json:"pool_size"`
		CheckedIn  int `json:"checked_in"`
		CheckedOut int `json:"checked_out"`
		Overflow   int
		Invalid    int
		Waiting    int
	}
}

func (r record) String() string {
	s := fmt.Sprintf("%s %s: %s in %d ms", r.Job.Kind, r.Job.ID, r.Job.Outcome, r.Job.TookMS)
	if r.Job.Attempt > 1 {
		s += fmt.Sprintf(" at attempt %d", r.Job.Attempt)
	}
	s += fmt.Sprintf("\n      the database: acquires %d, queries %d, waited %d ms, held %d ms",
		r.DB.Acquires, r.DB.Queries, r.DB.WaitMS, r.DB.HeldMS)
	s += fmt.Sprintf("\n      the pool: size %d, checked in %d, checked out %d, overflow %d, invalid %d, waiting %d",
		r.Pool.Size, r.Pool.CheckedIn, r.Pool.CheckedOut, r.Pool.Overflow, r.Pool.Invalid, r.Pool.Waiting)
	if r.Error != "" {
		s += "\n      error: " + r.Error
	}
	return s
}

// Write takes a piece of the log.
func (l *workerLog) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.partial = append(l.partial, b...)
	for {
		line, rest, whole := bytes.Cut(l.partial, []byte("\n"))
		if !whole {
			return len(b), nil
		}
		l.read(line)
		l.partial = append([]byte(nil), rest...)
	}
}

func (l *workerLog) read(line []byte) {
	var r record
	if json.Unmarshal(line, &r) != nil {
		if l.out != nil {
			fmt.Fprintf(l.out, "  worker: %s\n", line)
		}
		return
	}
	switch {
	case (r.Msg == "worker started" || r.Msg == "monitor started") && !l.up:
		l.up = true
		close(l.started)
	case r.Msg == "job" && l.out == nil:
		l.records[r.Job.ID] = r
		if done, ok := l.jobs[r.Job.ID]; ok {
			close(done)
			delete(l.jobs, r.Job.ID)
		}
	case r.Msg == "job":
		if r.Job.Kind != "pool:validate" || r.Error != "" { // one comes every other second
			fmt.Fprintf(l.out, "  %s  %s\n", time.Now().Format(time.TimeOnly), r)
		}
	case l.out != nil && (r.Level == "WARN" || r.Level == "ERROR"):
		fmt.Fprintf(l.out, "  worker: %s %s\n", r.Msg, r.Error)
	}
}

// recordOf waits for the record after the job.
func (l *workerLog) recordOf(ctx context.Context, id string) (record, error) {
	l.mu.Lock()
	r, ok := l.records[id]
	if ok {
		l.mu.Unlock()
		return r, nil
	}
	done, ok := l.jobs[id]
	if !ok {
		done = make(chan struct{})
		l.jobs[id] = done
	}
	l.mu.Unlock()
	select {
	case <-done:
	case <-ctx.Done():
		return record{}, fmt.Errorf("the worker logged no record of job %s: %w", id, context.Cause(ctx))
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.records[id], nil
}

// follow shows what comes from now on, in place of keeping it.
func (l *workerLog) follow(out io.Writer) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.out, l.records = out, nil
}
