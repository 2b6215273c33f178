package maintenance

import (
	"context"
	"time"

	"github.com/carpool-go/carpool/dbpool"
	"github.com/carpool-go/carpool/internal/instance"
	"github.com/carpool-go/carpool/tasks"
)

// PoolValidate is the payload of pool:validate, which checks the idle connections of the
// pool of the worker that runs it. Each worker enqueues it by the clock on the queue that
// only it pulls from. Its result is a [dbpool.Validation].
type PoolValidate struct{}

// Kind returns "pool:validate".
func (PoolValidate) Kind() string { return instance.ValidateKind }

// Options returns no retries, because the next tick comes anyway, and a retention of an
// hour, so that the monitor shows what the last ones found.
func (PoolValidate) Options() tasks.Options {
	return tasks.Options{MaxRetry: tasks.NoRetry, Timeout: time.Minute, Retention: time.Hour, SQL: tasks.SQLOperators}
}

// Validate returns nil, because there are no fields.
func (PoolValidate) Validate() error { return nil }

// validatePool validates job's pool and returns what it did.
func (t *Tasks) validatePool(ctx context.Context, job *tasks.Job, _ PoolValidate) (dbpool.Validation, error) {
	if t.AfterValidate != nil {
		defer t.AfterValidate(ctx)
	}
	return job.DB.Validate(ctx)
}
