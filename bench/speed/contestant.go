package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5"
	"golang.org/x/sync/errgroup"
)

// asContestant is the argument with which this program is one of the contestants' processes.
// On standard input it reads a spec, and if that has it work, questions, as JSON; to each
// of them it answers with a report. It ends with its input.
const asContestant = "contestant"

// What a job does.
const (
	emptyJob  = "empty"
	insertJob = "insert" // a row, at least once
	onceJob   = "once"   // a row, exactly once
)

// queueOfJobs is the queue that jobs are on.
const queueOfJobs = "default"

// spec is what a contestant's process is to do. A process of another build of this program
// reads it too.
type spec struct {
	Contestant     string
	Task           string // prepare the servers, produce jobs, work, or say how many are left
	Job            string
	Slots          int
	Jobs           int
	Pause          time.Duration // before each job that is produced; 0: they are produced side by side
	PoolSize       int
	RedisURL       string
	WorkerRedisURL string // the same Redis, as a worker reaches it
	DatabaseURL    string
	// WorkerDatabaseURL is the same database, as a worker's jobs reach it.
	WorkerDatabaseURL string
	Queues            map[string]int
}

func (s spec) to(task string) spec {
	s.Task = task
	return s
}

func (s spec) atLeastOnce() spec {
	s.Job = insertJob
	return s
}

// report is a contestant's answer.
type report struct {
	Left      int
	Rate      float64       // jobs a second between one tenth of them and nine
	CPUPerJob float64       // of what works, in µs, in that time
	P50, P99  time.Duration // from the call that enqueues a job to its handler
	CPU       time.Duration // of what works, since its start
	RSS       int64         // of what works, in bytes
}

// contestant is what competes.
type contestant struct {
	// prepare makes what it needs in an empty database.
	prepare func(context.Context, spec) error
	// produce enqueues jobs.
	produce func(context.Context, spec) error
	// left is how many jobs there are that were not done.
	left func(context.Context, spec) (int, error)
	// work works until ctx ends.
	work func(context.Context, spec, *recorder) error
}

func contestants() map[string]contestant {
	return map[string]contestant{
		"carpool": {prepareCarpool, produceCarpool, asynqLeft, workCarpool},
		"asynq":   {prepareAsynq, produceAsynq, asynqLeft, workAsynq},
		"river":   {prepareRiver, produceRiver, riverLeft, workRiver},

		"asynq-plain": {prepareAsynq, produceAsynqPlain, asynqLeft, workAsynqPlain},

		"celery-threads": {prepareAsynq, produceCelery, celeryLeft, workCelery("threads")},
		"celery-prefork": {prepareAsynq, produceCelery, celeryLeft, workCelery("prefork")},
	}
}

func beContestant(ctx context.Context, in io.Reader, out io.Writer) error {
	questions, answers := json.NewDecoder(in), json.NewEncoder(out)
	var s spec
	if err := questions.Decode(&s); err != nil {
		return fmt.Errorf("read what to do: %w", err)
	}
	c, ok := contestants()[s.Contestant]
	if !ok {
		return fmt.Errorf("%q is no contestant", s.Contestant)
	}
	var r report
	var err error
	switch s.Task {
	case "prepare":
		if err = execute(ctx, s.DatabaseURL, "CREATE TABLE effects (job text)"); err == nil {
			err = c.prepare(ctx, s)
		}
	case "produce":
		err = c.produce(ctx, s)
	case "left":
		r.Left, err = c.left(ctx, s)
	case "work":
		return work(ctx, c, s, questions, answers)
	default:
		err = fmt.Errorf("%q is nothing to do", s.Task)
	}
	if err != nil {
		return err
	}
	return answers.Encode(r)
}

// work works, and answers questions, until there are no more.
func work(ctx context.Context, c contestant, s spec, questions *json.Decoder, answers *json.Encoder) error {
	ctx, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	rec := newRecorder(s.Jobs)
	ended := make(chan error, 1)
	go func() {
		err := c.work(ctx, s, rec)
		stop(err)
		ended <- err
	}()
	for {
		var question string
		if err := questions.Decode(&question); errors.Is(err, io.EOF) {
			stop(nil)
			return <-ended
		} else if err != nil {
			return err
		}
		var waitFor <-chan struct{}
		switch question {
		case "started":
			waitFor = rec.started
		case "await":
			waitFor = rec.all
		}
		if waitFor != nil {
			select {
			case <-waitFor:
			case <-ctx.Done():
				return fmt.Errorf("the worker has ended: %w", context.Cause(ctx))
			}
		}
		if err := answers.Encode(rec.report(question == "await")); err != nil {
			return err
		}
	}
}

// recorder writes down what becomes of jobs.
type recorder struct {
	started chan struct{} // to be closed when the worker has been started
	all     chan struct{} // is closed when all jobs have ended
	begun   atomic.Int64
	done    atomic.Int64
	written atomic.Int64                          // of those done
	usage   func() (cpu time.Duration, rss int64) // of what works
	waits   []time.Duration
	ended   []time.Time

	tenth, nineTenths int              // of the jobs
	cpu               [2]time.Duration // then
}

func newRecorder(jobs int) *recorder {
	return &recorder{
		started: make(chan struct{}), all: make(chan struct{}), usage: usage,
		waits: make([]time.Duration, jobs), ended: make([]time.Time, jobs),
		tenth: jobs / 10, nineTenths: jobs * 9 / 10,
	}
}

// job is to be called for each job, with what it does.
func (r *recorder) job(enqueued int64, do func() error) error {
	r.begin(time.Since(time.Unix(0, enqueued)))
	if err := do(); err != nil {
		return err
	}
	r.end()
	return nil
}

// begin is for a job that has begun, after having waited so long.
func (r *recorder) begin(waited time.Duration) {
	if i := int(r.begun.Add(1)) - 1; i < len(r.waits) {
		r.waits[i] = waited
	}
}

// end is for a job that has been done.
func (r *recorder) end() {
	i := int(r.done.Add(1)) - 1
	if i >= len(r.ended) {
		return // delivered twice
	}
	r.ended[i] = time.Now()
	switch i {
	case r.tenth:
		r.cpu[0], _ = r.usage()
	case r.nineTenths:
		r.cpu[1], _ = r.usage()
	}
	if int(r.written.Add(1)) == len(r.ended) {
		close(r.all)
	}
}

// report has the figures of the jobs, if they have all ended, and of the process.
func (r *recorder) report(jobs bool) report {
	var got report
	got.CPU, got.RSS = r.usage()
	if !jobs || len(r.ended) < 10 {
		return got
	}
	slices.SortFunc(r.ended, time.Time.Compare)
	n := float64(r.nineTenths - r.tenth)
	got.Rate = n / r.ended[r.nineTenths].Sub(r.ended[r.tenth]).Seconds()
	got.CPUPerJob = float64((r.cpu[1] - r.cpu[0]).Microseconds()) / n
	got.P50, got.P99 = percentile(r.waits, 50), percentile(r.waits, 99)
	return got
}

// producing calls enqueue for each job: side by side, or one after another with a pause
// before each.
func producing(ctx context.Context, s spec, enqueue func(context.Context) error) error {
	if s.Pause > 0 {
		for range s.Jobs {
			time.Sleep(s.Pause)
			if err := enqueue(ctx); err != nil {
				return err
			}
		}
		return nil
	}
	group, ctx := errgroup.WithContext(ctx)
	const sideBySide = 16
	for i := range sideBySide {
		group.Go(func() error {
			for n := i; n < s.Jobs; n += sideBySide {
				if err := enqueue(ctx); err != nil {
					return err
				}
			}
			return nil
		})
	}
	return group.Wait()
}

func execute(ctx context.Context, databaseURL string, statements ...string) error {
	conn, err := pgx.Connect(ctx, databaseURL)
	if err != nil {
		return err
	}
	defer conn.Close(context.WithoutCancel(ctx))
	for _, sql := range statements {
		if _, err := conn.Exec(ctx, sql); err != nil {
			return fmt.Errorf("%s: %w", sql, err)
		}
	}
	return nil
}

// insert is the effect of a job.
const insert = "INSERT INTO effects VALUES ($1)"
