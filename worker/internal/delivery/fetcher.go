package delivery

import (
	"context"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/carpool-go/carpool/internal/asynqwire"
)

// fetcher fetches the jobs for one of asynq's servers: as many in one round trip as the
// server has free slots. asynq asks for one at a time, in one goroutine, and has a slot for
// it then. While there is none it is answered nothing at all, until Redis has one.
type fetcher struct {
	rdb   redis.UniversalClient
	held  *held
	ends  *ends
	log   *slog.Logger
	wheel *wheel
	slots int
	looks map[string]*look

	mu      sync.Mutex
	buffer  []*heldJob
	running int                  // jobs of this server
	leave   map[string]time.Time // kinds that are left to other workers, until then
	stopped bool
	stop    chan struct{}
	failed  int       // fetches in a row that had no answer, or a wrong one
	moved   time.Time // when there was a sign of fetching last, or all slots were busy

	woken chan struct{}
	// Of the goroutine that asks:
	unanswered *asynqwire.Fetch // a fetch that may have arrived
	repeats    int              // how often it was made again
	clock      time.Duration    // how far Redis' clock is ahead of this process's
	clockKnown bool
	wasWoken   bool // before the last fetch
	vain       int  // how often in a row it was woken for nothing
}

const (
	// fetchTimeout bounds one fetch, so that one whose answer is lost is made again soon.
	fetchTimeout = time.Second
	// maxRepeats bounds how often that time is doubled when one is made again.
	maxRepeats = 4
	// fetchAtOnce bounds how many jobs one fetch takes.
	fetchAtOnce = 100
	// askTime is how long asynq waits for an answer at most. It takes the end of the job's
	// lease from its own clock when it asks.
	askTime = 10 * time.Second
	// fetchPause is how long it waits after a fetch that failed, more or less.
	fetchPause = 250 * time.Millisecond

	// IdleCheck is how often a fetcher asks that Redis doesn't wake, more or less.
	IdleCheck = 50 * time.Millisecond
	// idleCheckWoken is how often it asks although Redis would wake it.
	idleCheckWoken = 10 * time.Second
	// pausedCheck is how often it asks for a queue that is paused.
	pausedCheck = 500 * time.Millisecond
	// passedCheck is how often it asks, more or less, for a queue whose jobs are left to
	// other workers.
	passedCheck = 300 * time.Millisecond
	// failedFetches is how many fetches in a row must fail before the worker counts as one
	// that fetches no jobs: a single answer may be lost.
	failedFetches = 2
	// stillAfter is how long there may be no sign of fetching while slots are free. A fetch
	// is made once in askTime at least, and may be made again.
	stillAfter = 2 * askTime
	// leaveFor is how long a kind is left to other workers before one of its jobs is looked
	// at again.
	leaveFor = time.Minute
	// maxLooks bounds the connections that wait in Redis for jobs of one server. Queues
	// beyond that are asked for. With the instance's own queue they fit into go-redis'
	// smallest pool, which has ten connections on one core.
	maxLooks = 8
)

func newFetcher(cfg Config, queues map[string]int, slots int, h *held, e *ends) *fetcher {
	f := &fetcher{
		rdb: cfg.ServersRedis, held: h, ends: e, log: cfg.Log, wheel: newWheel(queues), slots: slots,
		looks: make(map[string]*look), leave: make(map[string]time.Time),
		stop: make(chan struct{}), woken: make(chan struct{}, 1), moved: time.Now(),
	}
	for _, queue := range f.wheel.queues {
		if len(f.looks) < maxLooks {
			f.looks[queue] = newLook(cfg.LooksRedis, queue, f.wake, cfg.Log)
		}
	}
	return f
}

func (f *fetcher) wake() {
	select {
	case f.woken <- struct{}{}:
	default:
	}
}

// next returns the next job, when there is one; nil once the fetcher is stopped.
func (f *fetcher) next() *heldJob {
	for asked := time.Now(); time.Since(asked) < askTime; {
		if job := f.held.start(f); job != nil {
			return job
		}
		if !f.ends.awaitRoom(f.stop) || f.isStopped() {
			return nil
		}
		answer, err := f.fetch(f.wanted())
		switch {
		case err != nil:
			if !mayBeTriedAgain(err) {
				f.log.Error("jobs can't be fetched", "error", err)
			}
			f.rest(fetchPause/2 + rand.N(fetchPause))
		case len(answer.Jobs) > 0:
			f.wasWoken, f.vain = false, 0
		default:
			f.idle(answer, askTime-time.Since(asked))
		}
	}
	return nil
}

// pop takes a job from the buffer. With held.mu.
func (f *fetcher) pop() *heldJob {
	f.mu.Lock()
	defer f.mu.Unlock()
	if len(f.buffer) == 0 || f.stopped {
		return nil
	}
	job := f.buffer[0]
	f.buffer = f.buffer[1:]
	f.running++
	f.moved = time.Now()
	return job
}

// free notes that a job of this server has ended.
func (f *fetcher) free() {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.running >= f.slots {
		f.moved = time.Now()
	}
	f.running--
}

// drop takes a job out of the buffer.
func (f *fetcher) drop(job *heldJob) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.buffer = slices.DeleteFunc(f.buffer, func(other *heldJob) bool { return other == job })
}

func (f *fetcher) isStopped() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.stopped
}

// wanted returns the fetch that has had no answer, or one for the slots that are free.
func (f *fetcher) wanted() asynqwire.Fetch {
	if f.unanswered != nil {
		again := *f.unanswered
		again.Again = true
		return again
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	free := min(max(1, f.slots-f.running), fetchAtOnce)
	fetch := asynqwire.Fetch{
		Token: 1 + rand.N(asynqwire.MaxToken), ID: fmt.Sprintf("%016x", rand.Uint64()),
		Shares: f.wheel.shares(free),
	}
	for kind, until := range f.leave {
		if time.Now().After(until) {
			delete(f.leave, kind)
			continue
		}
		fetch.Leave = append(fetch.Leave, kind)
	}
	return fetch
}

// fetch makes a fetch and buffers what it brings.
func (f *fetcher) fetch(fetch asynqwire.Fetch) (asynqwire.Fetching, error) {
	timeout := fetchTimeout << min(f.repeats, maxRepeats) // what takes long to arrive arrives at last
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	asked := time.Now()
	if f.clockKnown { // one that comes later than the next finds nothing
		fetch.Until = asked.Add(f.clock + timeout)
	}
	answer, err := fetch.Do(ctx, f.rdb)
	f.unanswered = nil
	if err != nil {
		f.unanswered = &fetch
		f.repeats++
	} else {
		f.repeats = 0
	}
	f.noteAnswer(err == nil)
	if !answer.Time.IsZero() {
		f.clock, f.clockKnown = time.Until(answer.Time), true
	}
	for _, gone := range answer.Gone {
		f.log.Error("a job was in its queue, and Redis doesn't have what it is any more: it was evicted, or deleted by hand",
			slog.Group("job", "id", gone.ID, "queue", gone.Queue))
	}
	jobs := make([]*heldJob, 0, len(answer.Jobs))
	for _, j := range answer.Jobs {
		job := &heldJob{
			queue: j.Queue, id: j.ID, data: j.Data, lease: asynqwire.Lease{ID: j.ID, Token: fetch.Token}, fetch: fetch.ID,
			fetcher: f, deliveries: j.Deliveries, unended: j.Unended, confirmed: asked,
		}
		jobs = append(jobs, job)
	}
	for _, job := range f.held.add(jobs) {
		f.keep(job)
	}
	return answer, err
}

// keep buffers a job, or archives one that asynq can't read.
func (f *fetcher) keep(job *heldJob) {
	msg, err := asynqwire.ParseMessage([]byte(job.data))
	if err == nil && (msg.ID != job.id || msg.Queue != job.queue) {
		err = asynqwire.ErrMessage
	}
	if err != nil {
		f.log.Error("a job can't be read; it goes to the archive as it is", slog.Group("job", "id", job.id, "queue", job.queue), "error", err)
		f.ends.say(job, asynqwire.Archive{})
		return
	}
	job.message = msg
	f.held.buffer(job)
}

// push adds a job to the buffer. With held.mu.
func (f *fetcher) push(job *heldJob) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.buffer = append(f.buffer, job)
}

// idle waits until there may be jobs.
func (f *fetcher) idle(last asynqwire.Fetching, most time.Duration) {
	if f.wasWoken {
		// Of the workers that one push wakes all but one come late. They come later each time.
		f.wasWoken = false
		f.vain++
		f.rest(rand.N(time.Millisecond << min(f.vain, 7)))
	}
	select {
	case <-f.woken: // for what is gone, or the looks see it again
	default:
	}
	every := min(most, idleCheckWoken)
	for _, queue := range f.wheel.queues {
		look := f.looks[queue]
		switch {
		case last.Paused[queue]: // a look would return at once
			every = min(every, pausedCheck)
		case last.Passed[queue]:
			every = min(every, passedCheck/2+rand.N(passedCheck))
		case look == nil || !look.arm():
			every = min(every, IdleCheck/2+rand.N(IdleCheck))
		}
	}
	timer := time.NewTimer(every)
	defer timer.Stop()
	select {
	case <-f.woken:
		f.wasWoken = true
	case <-timer.C:
		f.vain = 0
	case <-f.stop:
	}
}

// noteAnswer notes whether a fetch had an answer.
func (f *fetcher) noteAnswer(answered bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if !answered {
		f.failed++
		return
	}
	f.failed, f.moved = 0, time.Now()
}

// fault says in words why no jobs are fetched, "" if they are, or all slots are busy.
func (f *fetcher) fault() string {
	f.mu.Lock()
	defer f.mu.Unlock()
	switch {
	case f.stopped:
		return "no more jobs are fetched: the worker stops"
	case f.failed >= failedFetches:
		return "Redis does not answer fetches; the log says more"
	case f.running < f.slots && time.Since(f.moved) > stillAfter:
		return "no fetch was made in " + stillAfter.String() + ", although slots are free"
	}
	return ""
}

// rest waits for a while, unless the fetcher is stopped.
func (f *fetcher) rest(d time.Duration) {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-f.stop:
	}
}

// leaveToOthers has jobs of a kind left to other workers for a while.
func (f *fetcher) leaveToOthers(kind string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.leave[kind] = time.Now().Add(leaveFor)
}

// end has next return nothing from now on.
func (f *fetcher) end() {
	f.mu.Lock()
	defer f.mu.Unlock()
	if !f.stopped {
		f.stopped = true
		close(f.stop)
	}
}

// pushBack puts the jobs that asynq has not asked for back to where they were, once next
// isn't called any more. What a fetch without an answer has taken is looked for once.
func (f *fetcher) pushBack() {
	if f.unanswered != nil {
		again := *f.unanswered
		again.Again = true
		f.repeats = 0 // however long Redis has been silent, the stop waits for the shortest time
		for i := range again.Shares {
			again.Shares[i].Jobs = 0
		}
		_, _ = f.fetch(again)
	}
	f.mu.Lock()
	buffer := f.buffer
	f.buffer = nil
	f.mu.Unlock()
	for _, job := range slices.Backward(buffer) {
		f.ends.say(job, asynqwire.PushBack{Undelivered: true})
	}
}

// run makes the looks until ctx ends.
func (f *fetcher) run(ctx context.Context) {
	var looking sync.WaitGroup
	for _, l := range f.looks {
		looking.Go(func() { l.run(ctx) })
	}
	looking.Wait()
}
