package delivery

import (
	"bytes"
	"context"
	"log/slog"
	"maps"
	"runtime/pprof"
	"slices"
	"strings"
	"sync"
	"time"
)

// runs are the jobs that this process runs. A job is in it once: asynq alone
// would run a job beside itself whose handler ignores the end of its time.
type runs struct {
	mu sync.Mutex
	m  map[string]*jobRun // by queue and id
}

type jobRun struct {
	id     string
	ended  chan struct{}
	unique uniqueKey
}

// begin enters a run, once an earlier one of the same job has ended.
func (r *runs) begin(ctx context.Context, id string) (*jobRun, error) {
	for {
		r.mu.Lock()
		other := r.m[id]
		if other == nil {
			if r.m == nil {
				r.m = make(map[string]*jobRun)
			}
			fresh := &jobRun{id: id, ended: make(chan struct{})}
			r.m[id] = fresh
			r.mu.Unlock()
			return fresh, nil
		}
		r.mu.Unlock()
		select {
		case <-other.ended:
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
}

func (r *runs) end(run *jobRun) {
	r.mu.Lock()
	delete(r.m, run.id)
	r.mu.Unlock()
	close(run.ended)
}

// get returns the run of a job; nil if there is none.
func (r *runs) get(id string) *jobRun {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.m[id]
}

// list returns the runs of this moment.
func (r *runs) list() []*jobRun {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Collect(maps.Values(r.m))
}

func (r *runs) len() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.m)
}

// stuckGrace is how long a handler may take to notice that its context has ended
// before it is reported, and stuckAgain how often it is reported after that.
const (
	stuckGrace = time.Second
	stuckAgain = time.Minute
)

// awaitEnd waits for the end of a run whose time is up, and reports where its
// goroutines are if that takes long.
func awaitEnd(ended <-chan struct{}, id string, log *slog.Logger) {
	began := time.Now()
	report := time.NewTimer(stuckGrace)
	defer report.Stop()
	reported := false
	for {
		select {
		case <-ended:
			if reported {
				log.Warn("the handler has ended at last; its slot is free", "after", time.Since(began).Round(time.Millisecond).String())
			}
			return
		case <-report.C:
			reported = true
			log.Error("the handler goes on although its context has ended; it keeps its slot, and its job is not run again before it ends",
				"since", time.Since(began).Round(time.Second).String(), "stack", stacksOf(id))
			report.Reset(stuckAgain)
		}
	}
}

// jobLabel marks the goroutines of a job for profiles.
const jobLabel = "carpool_job"

// stacksOf returns the stacks of the goroutines that are marked with the job's
// id: its handler's, and those that it has started.
func stacksOf(id string) string {
	var all bytes.Buffer
	if err := pprof.Lookup("goroutine").WriteTo(&all, 1); err != nil {
		return err.Error()
	}
	var found []string
	for record := range strings.SplitSeq(all.String(), "\n\n") {
		if strings.Contains(record, `"`+jobLabel+`":"`+id+`"`) {
			found = append(found, record)
		}
	}
	return strings.Join(found, "\n\n")
}
