package delivery

import (
	"context"
	"sync"
	"time"

	"github.com/carpool-go/carpool/internal/unique"
	"github.com/carpool-go/carpool/internal/wait"
)

// uniqueKey is the unique key of a job that runs.
type uniqueKey struct {
	mu        sync.Mutex // is held while Redis is told
	queue, id string
	headers   map[string]string
	running   bool
}

// holdEvery is how often the unique keys of the jobs that run are written again. A Redis
// that lost its data has forgotten them, and would let a second job run beside the first.
const holdEvery = 5 * time.Second

// holdTimeout bounds one exchange with Redis.
const holdTimeout = 3 * time.Second

// begin notes the job of a run.
func (k *uniqueKey) begin(queue, id string, headers map[string]string) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.queue, k.id, k.headers, k.running = queue, id, headers, true
}

// hold writes the key again, unless it has been given up.
func (k *uniqueKey) hold(ctx context.Context, locks *unique.Locks) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	if !k.running {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, holdTimeout)
	defer cancel()
	return locks.Hold(ctx, k.queue, k.id, k.headers)
}

// end ends the holding. What becomes of the key is for release, if it is given: the key of a
// job that is tried again stays the job's.
func (k *uniqueKey) end(release func() error) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.running = false
	if release == nil {
		return nil
	}
	return release()
}

// holdUniqueKeys holds the keys of the jobs that run until ctx ends.
func (x *Executor) holdUniqueKeys(ctx context.Context) {
	for wait.For(ctx, holdEvery) == nil {
		for _, run := range x.runs.list() {
			if err := run.unique.hold(ctx, x.locks); err != nil && ctx.Err() == nil {
				x.log.Debug("the unique key of a job that runs could not be written again", "error", err)
				break // the others' neither
			}
		}
	}
}
