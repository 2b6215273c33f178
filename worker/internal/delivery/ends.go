package delivery

import (
	"context"
	"errors"
	"log/slog"
	"math/rand/v2"
	"net"
	"strings"
	"sync"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/carpool-go/carpool/internal/asynqwire"
	"github.com/carpool-go/carpool/internal/wait"
)

// ends tells Redis what became of jobs. That is done in groups, while the slots of the jobs
// have others already: what has gathered during one exchange goes with the next. What Redis
// doesn't take, because it is away or full, is said again until it does; it is the truth
// only as long as the job's lease has this worker's fencing token, by which Redis knows it.
type ends struct {
	rdb  redis.UniversalClient
	held *held
	due  *due
	log  *slog.Logger

	repeats int // of the goroutine that sends: how often in a row Redis didn't take all

	mu      sync.Mutex
	unsent  []unsentEnd
	sending int           // of those that were unsent
	failing bool          // Redis didn't take the last ones
	more    chan struct{} // has one if there may be unsent ones
	fewer   chan struct{} // is closed, and another one, when some have been taken
}

type unsentEnd struct {
	job *heldJob
	end asynqwire.End
}

// size is about how many bytes Redis is sent.
func (u unsentEnd) size() int {
	switch end := u.end.(type) {
	case asynqwire.Done:
		if end.Message.Retention > 0 {
			return len(u.job.data) + len(end.Result)
		}
	case asynqwire.RetryAt, asynqwire.Archive:
		return len(u.job.data)
	}
	return 0
}

const (
	// sendAtOnce and sendBytes bound one group: it ends with the one that goes beyond.
	sendAtOnce = 256
	sendBytes  = 1 << 20
	// maxUnsent bounds how many ends wait before no further jobs are fetched.
	maxUnsent = 1000

	sendPause    = 25 * time.Millisecond
	sendPauseCap = time.Second
)

func newEnds(rdb redis.UniversalClient, h *held, d *due, log *slog.Logger) *ends {
	return &ends{rdb: rdb, held: h, due: d, log: log, more: make(chan struct{}, 1), fewer: make(chan struct{})}
}

// say notes what becomes of a job, once: what is said later of it is not heard.
func (e *ends) say(job *heldJob, end asynqwire.End) {
	if !e.held.finish(job) {
		return
	}
	e.mu.Lock()
	e.unsent = append(e.unsent, unsentEnd{job, end})
	e.mu.Unlock()
	e.wake()
}

// sayNothing notes that a job has ended of which Redis is not to be told, since its lease is
// lost.
func (e *ends) sayNothing(job *heldJob) {
	if e.held.finish(job) {
		e.held.forget(job)
	}
}

func (e *ends) wake() {
	select {
	case e.more <- struct{}{}:
	default:
	}
}

// run sends until ctx ends.
func (e *ends) run(ctx context.Context) {
	pause := sendPause
	for {
		group := e.take()
		if len(group) == 0 {
			select {
			case <-ctx.Done():
				return
			case <-e.more:
			}
			continue
		}
		again := e.send(ctx, group)
		e.taken(again)
		if len(again) == 0 {
			pause = sendPause
			continue
		}
		if wait.For(ctx, pause/2+rand.N(pause)) != nil {
			return
		}
		pause = min(2*pause, sendPauseCap)
	}
}

func (e *ends) take() []unsentEnd {
	e.mu.Lock()
	defer e.mu.Unlock()
	n, size := 0, 0
	for n < min(len(e.unsent), sendAtOnce) && size < sendBytes {
		size += e.unsent[n].size()
		n++
	}
	group := e.unsent[:n:n]
	e.unsent = e.unsent[n:]
	e.sending = n
	return group
}

// taken notes that a group was sent, but for those that are to be sent again, before the
// others.
func (e *ends) taken(again []unsentEnd) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if len(again) > 0 {
		e.unsent = append(again, e.unsent...)
	}
	e.sending, e.failing = 0, len(again) > 0
	close(e.fewer)
	e.fewer = make(chan struct{})
}

// send sends a group, and returns those that Redis didn't take.
func (e *ends) send(ctx context.Context, group []unsentEnd) (again []unsentEnd) {
	endings := make([]asynqwire.Ending, len(group))
	for i, u := range group {
		endings[i] = asynqwire.Ending{Queue: u.job.queue, Lease: u.job.lease, End: u.end}
	}
	ctx, cancel := context.WithTimeout(ctx, exchangeTimeout<<min(e.repeats, maxRepeats))
	defer cancel()
	e.repeats++
	for i, answer := range asynqwire.SendEnds(ctx, e.rdb, endings) {
		u := group[i]
		if mayBeTriedAgain(answer.Err) {
			again = append(again, u)
			continue
		}
		if answer.Err != nil {
			e.log.Error("Redis was told of a job's end, and can't do what it means; the job is delivered again",
				slog.Group("job", "id", u.job.id, "queue", u.job.queue), "error", answer.Err)
		}
		if retry, ok := u.end.(asynqwire.RetryAt); ok && answer.Held {
			e.due.hint(retry.Due)
		}
		e.held.forget(u.job)
	}
	if len(again) == 0 {
		e.repeats = 0
	}
	return again
}

// awaitRoom waits until further jobs may be fetched: not before Redis has taken what it
// didn't take before, and not while too much waits. It is false if stop came first.
func (e *ends) awaitRoom(stop <-chan struct{}) bool {
	return e.await(stop, func() bool { return !e.failing && len(e.unsent) < maxUnsent })
}

// flush waits until Redis has been told of everything. It is false if stop came first.
func (e *ends) flush(stop <-chan struct{}) bool {
	return e.await(stop, func() bool { return len(e.unsent)+e.sending == 0 })
}

func (e *ends) await(stop <-chan struct{}, so func() bool) bool {
	for {
		e.mu.Lock()
		isSo, fewer := so(), e.fewer
		e.mu.Unlock()
		if isSo {
			return true
		}
		select {
		case <-stop:
			return false
		case <-fewer:
		}
	}
}

// left is how many ends Redis has not been told of.
func (e *ends) left() int {
	e.mu.Lock()
	defer e.mu.Unlock()
	return len(e.unsent) + e.sending
}

// mayBeTriedAgain reports whether Redis did not answer, or answered that it can't
// serve just now.
func mayBeTriedAgain(err error) bool {
	if err == nil || errors.Is(err, asynqwire.ErrReply) {
		return false
	}
	if _, said := errors.AsType[redis.Error](err); said {
		_, network := errors.AsType[net.Error](err)
		for _, state := range []string{"LOADING ", "READONLY ", "MASTERDOWN ", "CLUSTERDOWN ", "TRYAGAIN ", "UNBLOCKED ", "NOREPLICAS ", "MISCONF ", "BUSY ", "OOM ", "NOAUTH ", "WRONGPASS ", "ERR max number of clients reached"} {
			if strings.HasPrefix(err.Error(), state) {
				return true
			}
		}
		return network
	}
	return true
}
