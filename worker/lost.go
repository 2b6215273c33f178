package worker

import (
	"context"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/carpool-go/carpool/internal/asynqwire"
	"github.com/carpool-go/carpool/internal/wait"
)

// lostJobs takes from the queues what is left of jobs that have lost their data, and says so
// in the log. A fetch does that for those that it meets; these are the others, active ones
// and those that are due later, and what stops a plain asynq server on the same queues. Those
// that are archived or completed stay: they hold up nobody, and an operator sees them.
type lostJobs struct {
	rdb    redis.UniversalClient
	queues map[string]int
	log    *slog.Logger

	ctx  context.Context // ends with Stop
	end  context.CancelFunc
	done sync.WaitGroup
}

const (
	// lostEvery is how often lost jobs are looked for, and lostLookAt among how many of each
	// state. A queue's first are the ones that hold up others.
	lostEvery  = 10 * time.Second
	lostLookAt = 200
	// lostTimeout bounds one look.
	lostTimeout = 5 * time.Second
	// lostShown is how many ids the log shows at once.
	lostShown = 20
)

func newLostJobs(rdb redis.UniversalClient, queues map[string]int, log *slog.Logger) *lostJobs {
	l := &lostJobs{rdb: rdb, queues: queues, log: log}
	l.ctx, l.end = context.WithCancel(context.Background())
	return l
}

// Start starts looking for them.
func (l *lostJobs) Start() error {
	l.done.Go(func() {
		for wait.For(l.ctx, lostEvery) == nil {
			l.remove(l.ctx)
		}
	})
	return nil
}

// Stop ends it.
func (l *lostJobs) Stop() {
	l.end()
	l.done.Wait()
}

// remove looks at each queue once. What can't be looked at now, the next look sees.
func (l *lostJobs) remove(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, lostTimeout)
	defer cancel()
	for _, queue := range slices.Sorted(maps.Keys(l.queues)) {
		removed, err := l.removeFrom(ctx, queue)
		if len(removed) > 0 {
			l.log.Error("jobs have lost their data, and can't be run: their keys in Redis were evicted, deleted or overwritten; what is left of them is removed. "+
				"Redis evicts none if its maxmemory-policy is noeviction",
				"queue", queue, "jobs", len(removed), "ids", removed[:min(len(removed), lostShown)])
		}
		if err != nil {
			l.log.Debug("jobs that have lost their data could not be looked for", "queue", queue, "error", err)
		}
	}
}

func (l *lostJobs) removeFrom(ctx context.Context, queue string) (removed []string, err error) {
	lost, err := asynqwire.FindLost(ctx, l.rdb, queue, lostLookAt, "pending", "active", "scheduled", "retry")
	for _, job := range lost {
		forgotten, err := asynqwire.Forget(ctx, l.rdb, queue, job.ID)
		if err != nil {
			return removed, err
		}
		if forgotten {
			removed = append(removed, job.ID)
		}
	}
	return removed, err
}
