// Package maintenance is the kinds of job that carpool gives itself: pool:validate and
// carpool:prune. Every worker has them; the worker registers them.
package maintenance

import (
	"context"

	"github.com/redis/go-redis/v9"

	"github.com/carpool-go/carpool/tasks"
)

// Tasks is the group of both kinds. Its fields are read when a job runs, so they may
// be set after it was registered and before the first job.
type Tasks struct {
	// Redis is asked by carpool:prune which jobs there are; without it, that kind
	// is registered and fails for good.
	Redis redis.UniversalClient
	// AfterValidate, if not nil, is called after each validation of the pool,
	// whatever came of it, with the job's context.
	AfterValidate func(context.Context)
}

// Register adds pool:validate and carpool:prune to s.
func (t *Tasks) Register(s *tasks.Set) {
	tasks.Register(s, t.validatePool)
	tasks.Register(s, t.prune)
}
