package tasks

import (
	"context"
	"time"

	"github.com/carpool-go/carpool/dbpool"
)

// PoolValidate checks the idle connections of the pool of the worker that runs
// it. The scheduler enqueues it for each instance, on that instance's queue.
type PoolValidate struct{}

// Kind returns "pool:validate".
func (PoolValidate) Kind() string { return "pool:validate" }

// Options: it isn't retried, since the next tick comes anyway, and its result
// stays for an hour, so that asynqmon shows what the last ones found.
func (PoolValidate) Options() Options {
	return Options{MaxRetry: NoRetry, Timeout: time.Minute, Retention: time.Hour}
}

// Validate accepts every PoolValidate: it has no fields.
func (PoolValidate) Validate() error { return nil }

// HandlePoolValidate validates job's pool and returns what it did.
func HandlePoolValidate(ctx context.Context, job *Job, _ PoolValidate) (dbpool.Validation, error) {
	return job.DB.Validate(ctx)
}
