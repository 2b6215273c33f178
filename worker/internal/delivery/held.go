package delivery

import (
	"context"
	"errors"
	"log/slog"
	"sync"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/carpool-go/carpool/internal/asynqwire"
)

// heldJob is a job that this process has fetched, and of whose end Redis doesn't know yet.
type heldJob struct {
	queue, id string
	data      string // its message, as asynq reads it
	message   asynqwire.Message
	lease     asynqwire.Lease
	fetch     string // the id of its fetch
	fetcher   *fetcher
	// deliveries is how many deliveries this is, if all workers that had it count.
	deliveries int
	// unended is why its last attempt had no end; "" if it had one.
	unended string

	// ctx is done when the job must not run any more, with errCancelled or errLeaseLost as
	// its cause; end ends it.
	ctx context.Context
	end context.CancelCauseFunc

	// Of held.mu:
	stage     stage
	confirmed time.Time // when the question was asked by whose answer the lease is known to last
	begun     bool      // the executor has it
	lost      bool      // the lease is lost while asynq has the job
}

// stage is how far a held job has come.
type stage int

const (
	buffered stage = iota // asynq has not asked for it yet
	running               // asynq has it, and with it a slot
	ended                 // Redis is to be told
)

// errLeaseLost is the cause of a context that ended because the job is another worker's by
// now, or may be.
var errLeaseLost = errors.New("its lease is lost: the job may be another worker's by now")

// held are the jobs that this process holds, by the keys of their hashes. It keeps their
// leases, and hears which are to be cancelled.
type held struct {
	rdb redis.UniversalClient
	log *slog.Logger

	mu   sync.Mutex
	jobs map[string]*heldJob
}

const (
	// leaseEvery is how often leases are extended, which last for asynqwire.LeaseTime.
	leaseEvery = 5 * time.Second
	// leaseCheck is how often they are looked at.
	leaseCheck = time.Second
	// exchangeTimeout bounds one exchange with Redis.
	exchangeTimeout = 3 * time.Second
)

// add adds jobs that were fetched, and returns those that are new: a fetch that was made
// again returns what it may have returned before. A job that is held already, by an older
// fetch, has been lost.
func (h *held) add(jobs []*heldJob) (fresh []*heldJob) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, job := range jobs {
		key := asynqwire.Task(job.queue, job.id)
		if other := h.jobs[key]; other != nil {
			if other.fetch == job.fetch {
				continue
			}
			h.lose(key, other)
			if other.stage == running && !other.begun { // the executor will not find it
				other.stage = ended
				other.fetcher.free()
			}
		}
		job.ctx, job.end = context.WithCancelCause(context.Background())
		h.jobs[key] = job
		fresh = append(fresh, job)
	}
	return fresh
}

// start gives the next buffered job of a fetcher to asynq; nil if there is none.
func (h *held) start(f *fetcher) *heldJob {
	h.mu.Lock()
	defer h.mu.Unlock()
	job := f.pop()
	if job != nil {
		job.stage = running
	}
	return job
}

// begin returns a job whose handler is to run now; nil if it isn't held for that, or has
// begun before.
func (h *held) begin(queue, id string) *heldJob {
	h.mu.Lock()
	defer h.mu.Unlock()
	job := h.jobs[asynqwire.Task(queue, id)]
	if job == nil || job.stage != running || job.begun {
		return nil
	}
	job.begun = true
	return job
}

// buffer gives a job to its fetcher's buffer, unless it is lost already.
func (h *held) buffer(job *heldJob) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.jobs[asynqwire.Task(job.queue, job.id)] == job {
		job.fetcher.push(job)
	}
}

// finish notes that a job has ended; false if it had before.
func (h *held) finish(job *heldJob) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	before := job.stage
	job.stage = ended
	if before == running {
		job.fetcher.free()
	}
	return before != ended
}

// byKey returns the job with a key of a hash; nil if it isn't held.
func (h *held) byKey(task string) *heldJob {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.jobs[task]
}

// len is how many jobs are held.
func (h *held) len() int {
	h.mu.Lock()
	defer h.mu.Unlock()
	return len(h.jobs)
}

// forget takes a job out that Redis has been told of, or that is lost.
func (h *held) forget(job *heldJob) {
	h.mu.Lock()
	defer h.mu.Unlock()
	key := asynqwire.Task(job.queue, job.id)
	if h.jobs[key] == job {
		delete(h.jobs, key)
	}
}

// lose notes that the lease of a job is lost: asynq doesn't get it any more, or its handler
// hears of it. With h.mu.
func (h *held) lose(key string, job *heldJob) {
	switch job.stage {
	case buffered:
		delete(h.jobs, key)
		job.fetcher.drop(job)
	case running:
		job.lost = true
		job.end(errLeaseLost)
	case ended: // what Redis is told has the token with it
	}
}

// cancel ends the contexts of the jobs with an id, on whichever queues they are. One that
// has not begun to run finds it so.
func (h *held) cancel(id string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, job := range h.jobs {
		if job.id == id {
			job.end(errCancelled)
		}
	}
}

// hearCancels listens to who is to be cancelled until ctx ends. asynq hears it too, but only
// for the jobs that it runs already.
func (h *held) hearCancels(ctx context.Context) {
	pubsub := h.rdb.Subscribe(ctx, asynqwire.CancelChannel)
	defer pubsub.Close()
	heard := pubsub.Channel()
	for {
		select {
		case <-ctx.Done():
			return
		case message, ok := <-heard:
			if !ok {
				return
			}
			h.cancel(message.Payload)
		}
	}
}

// keepLeases extends the leases until ctx ends.
func (h *held) keepLeases(ctx context.Context) {
	tick := time.NewTicker(leaseCheck)
	defer tick.Stop()
	var last time.Time
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		if time.Since(last) >= leaseEvery {
			last = time.Now()
			if err := h.extend(ctx); err != nil && ctx.Err() == nil {
				h.log.Debug("the leases could not be extended", "error", err)
			}
		}
		h.loseExpired()
	}
}

// extend extends the leases of all jobs, also of those whose end Redis is about to be told.
func (h *held) extend(ctx context.Context) error {
	leases := make(map[string][]asynqwire.Lease)
	h.mu.Lock()
	for _, job := range h.jobs {
		if job.lost {
			continue
		}
		leases[job.queue] = append(leases[job.queue], job.lease)
	}
	h.mu.Unlock()
	if len(leases) == 0 {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, exchangeTimeout)
	defer cancel()
	asked := time.Now()
	extended, lost, err := asynqwire.ExtendLeases(ctx, h.rdb, leases)
	h.mu.Lock()
	defer h.mu.Unlock()
	h.each(extended, func(_ string, job *heldJob) { job.confirmed = asked })
	h.each(lost, h.lose)
	return err
}

// each calls do for the jobs that have these leases still. With h.mu.
func (h *held) each(leases map[string][]asynqwire.Lease, do func(key string, job *heldJob)) {
	for queue, some := range leases {
		for _, lease := range some {
			key := asynqwire.Task(queue, lease.ID)
			if job := h.jobs[key]; job != nil && job.lease == lease {
				do(key, job)
			}
		}
	}
}

// loseExpired loses the jobs whose leases are over by this process's clock.
func (h *held) loseExpired() {
	h.mu.Lock()
	defer h.mu.Unlock()
	for key, job := range h.jobs {
		if time.Since(job.confirmed) > asynqwire.LeaseTime {
			h.lose(key, job)
		}
	}
}

// areConfirmed reports whether Redis has confirmed the leases of a queue's jobs lately. Those
// that are not held any more don't count.
func (h *held) areConfirmed(queue string, ids []string) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, id := range ids {
		if job := h.jobs[asynqwire.Task(queue, id)]; job != nil && !job.lost && time.Since(job.confirmed) > 2*leaseEvery {
			return false
		}
	}
	return true
}
