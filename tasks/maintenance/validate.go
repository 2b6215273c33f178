package maintenance

import (
	"context"
	"time"

	"github.com/carpool-go/carpool/dbpool"
	"github.com/carpool-go/carpool/tasks"
)

// PoolValidate checks the idle connections of the pool of the worker that runs
// it. The scheduler enqueues it for each instance, on that instance's queue.
type PoolValidate struct{}

// Kind returns "pool:validate".
func (PoolValidate) Kind() string { return "pool:validate" }

// Options: it isn't retried, since the next tick comes anyway, and its result
// stays for an hour, so that asynqmon shows what the last ones found.
func (PoolValidate) Options() tasks.Options {
	return tasks.Options{MaxRetry: tasks.NoRetry, Timeout: time.Minute, Retention: time.Hour}
}

// Validate accepts every PoolValidate: it has no fields.
func (PoolValidate) Validate() error { return nil }

// validatePool validates job's pool and returns what it did.
func (t *Tasks) validatePool(ctx context.Context, job *tasks.Job, _ PoolValidate) (dbpool.Validation, error) {
	if t.AfterValidate != nil {
		defer t.AfterValidate(ctx)
	}
	return job.DB.Validate(ctx)
}
