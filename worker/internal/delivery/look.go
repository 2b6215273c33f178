package delivery

import (
	"context"
	"errors"
	"log/slog"
	"sync/atomic"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/carpool-go/carpool/internal/asynqwire"
	"github.com/carpool-go/carpool/internal/wait"
)

// look waits in Redis for a queue to have jobs, and wakes its fetcher then. Moving the
// last element of a list to where it is changes nothing, and waits while there is none.
type look struct {
	rdb   redis.UniversalClient
	queue string
	wake  func()
	log   *slog.Logger

	wanted atomic.Bool
	broken atomic.Bool
	armed  chan struct{}
	said   bool
}

const (
	// lookTime is how long a look blocks. Redis counts it in seconds.
	lookTime = 5 * time.Second
	// lookPause and lookPauseLong are how long no look is made after one that failed, and
	// after one that Redis refused.
	lookPause     = time.Second
	lookPauseLong = time.Minute
)

func newLook(rdb redis.UniversalClient, queue string, wake func(), log *slog.Logger) *look {
	return &look{rdb: rdb, queue: queue, wake: wake, log: log, armed: make(chan struct{}, 1)}
}

// arm has the fetcher woken when the queue has jobs. It is false if it must ask by itself
// for now.
func (l *look) arm() bool {
	if l.broken.Load() {
		return false
	}
	l.wanted.Store(true)
	select {
	case l.armed <- struct{}{}:
	default:
	}
	return true
}

// run looks until ctx ends. The end of a context doesn't end a look that is under way; the
// closing of its client does.
func (l *look) run(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-l.armed:
		}
		for l.wanted.Load() && ctx.Err() == nil {
			err := l.once(ctx)
			switch {
			case errors.Is(err, redis.Nil): // nothing has come
			case err == nil:
				l.wanted.Store(false)
				l.wake()
			case ctx.Err() == nil:
				l.rest(ctx, err)
			}
		}
	}
}

func (l *look) once(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, lookTime+exchangeTimeout)
	defer cancel()
	key := asynqwire.Pending(l.queue)
	return l.rdb.BLMove(ctx, key, key, "RIGHT", "RIGHT", lookTime).Err()
}

// rest makes no looks for a while.
func (l *look) rest(ctx context.Context, err error) {
	l.broken.Store(true)
	l.wake()
	pause := lookPause
	if _, said := errors.AsType[redis.Error](err); said && !mayBeTriedAgain(err) {
		pause = lookPauseLong
		if !l.said {
			l.said = true
			l.log.Warn("Redis doesn't let the worker wait for jobs (BLMOVE, which is new in Redis 6.2); it asks for them instead, so they start later",
				"queue", l.queue, "error", err)
		}
	}
	_ = wait.For(ctx, pause)
	l.broken.Store(false)
}
