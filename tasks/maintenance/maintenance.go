// Package maintenance has the kinds of job that carpool gives itself: pool:validate, which
// checks a worker's idle connections, and carpool:prune, which deletes what carpool's own
// tables no longer need. It is for carpool's worker, which registers both and enqueues
// them by the clock, so that nobody else has to: pool:validate is on a queue of each
// instance's own, and another carpool:prune within the hour finds nothing left to do.
//
// A program uses it to schedule carpool:prune with another [Prune.Keep], or to read a
// result.
package maintenance

import (
	"context"

	"github.com/redis/go-redis/v9"

	"github.com/carpool-go/carpool/tasks"
)

// Tasks is the group of both kinds, which a worker registers. Its fields are read when a
// job runs, so they may be set after it was registered and before the first job.
type Tasks struct {
	// Redis is where carpool:prune looks for jobs that may be delivered again; a job of
	// that kind is archived if it is nil.
	Redis redis.UniversalClient
	// AfterValidate is called after each validation of the pool, whatever came of it, with
	// the job's context; nil is nothing to call.
	AfterValidate func(context.Context)
}

// Register adds pool:validate and carpool:prune to s.
func (t *Tasks) Register(s *tasks.Set) {
	tasks.Register(s, t.validatePool)
	tasks.Register(s, t.prune)
}
