package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"time"

	"github.com/hibiken/asynq"
	"github.com/jackc/pgerrcode"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/carpool-go/carpool/dbpool"
	"github.com/carpool-go/carpool/tasks"
)

// postponedError is returned for a job that could not be run for a reason that is
// not its own. It uses up no try. It does not wrap err, which may be one that asynq
// would archive the job for.
type postponedError struct {
	err   error
	delay time.Duration // before it is delivered again
}

func (e *postponedError) Error() string { return e.err.Error() }

// postponeDelay spreads what was postponed together.
const postponeDelay = 3 * time.Second

func postponed(err error) error {
	return &postponedError{err, time.Second + rand.N(postponeDelay)}
}

// errCancelled is returned for a job that was cancelled while it ran.
var errCancelled = tasks.Permanent(errors.New("cancelled"))

// isConflict reports whether err says that Postgres has sacrificed the
// transaction to others. It is meant to be run again at once.
func isConflict(err error) bool {
	e, ok := errors.AsType[*pgconn.PgError](err)
	return ok && (e.Code == pgerrcode.SerializationFailure || e.Code == pgerrcode.DeadlockDetected)
}

// isRefusal reports whether err is Postgres' answer to a statement, and not one
// that comes of an outage.
func isRefusal(err error) bool {
	_, ok := errors.AsType[*pgconn.PgError](err)
	return ok && !dbpool.IsAway(err)
}

// isForGood reports whether err is Postgres' answer to a statement that no waiting
// mends: authorization, no such database or schema, a syntax error or an access rule.
// The whole classes are meant.
func isForGood(err error) bool {
	e, ok := errors.AsType[*pgconn.PgError](err)
	return ok && slices.ContainsFunc([]string{
		pgerrcode.InvalidAuthorizationSpecification, pgerrcode.InvalidCatalogName,
		pgerrcode.InvalidSchemaName, pgerrcode.SyntaxErrorOrAccessRuleViolation,
	}, func(class string) bool { return strings.HasPrefix(e.Code, class[:2]) })
}

// isFailure is asynq's question whether an error uses up a try.
func isFailure(err error) bool {
	_, isPostponed := errors.AsType[*postponedError](err)
	_, isSnoozed := tasks.SnoozeDelay(err)
	return !isPostponed && !isSnoozed && err != context.Canceled //nolint:errorlint // asynq's own: it was cancelled
}

const (
	// retryBase and retryCap bound the backoff. With tasks.DefaultMaxRetry a job
	// that goes on failing is given up after a quarter of an hour on average.
	retryBase = 2 * time.Second
	retryCap  = time.Hour
	// parked is how far off a retry is put that must not happen: asynq retries
	// what was cancelled, whatever it is told, so it is taken away before that.
	parked = 100 * 365 * 24 * time.Hour
)

// retryDelay is asynq's question when to deliver a job again. It is exponential
// backoff with full jitter, which spreads the retries of many jobs that failed at
// once best; see "Exponential Backoff And Jitter" in the AWS Architecture Blog. A
// delay that was asked for is kept.
func retryDelay(retried int, err error, _ *asynq.Task) time.Duration {
	if d, ok := tasks.SnoozeDelay(err); ok {
		return d
	}
	if e, ok := errors.AsType[*postponedError](err); ok {
		return e.delay
	}
	if d, ok := tasks.RetryDelay(err); ok {
		return d
	}
	switch {
	case err == context.Canceled: //nolint:errorlint // asynq's own; a handler's comes wrapped by the frame
		return parked
	case errors.Is(err, asynq.ErrLeaseExpired):
		return rand.N(time.Second) // it has waited for a minute already
	}
	return rand.N(min(retryCap, retryBase<<min(retried, 20))) + 1
}

// gaveUp begins the reason with which a job is archived that was not run any
// more. Whoever puts it back in asynqmon has it run once more for each time; with
// `worker archive retry` it begins anew.
const gaveUp = "given up: "

// crashed is the last error of a job whose worker died. asynq's own recoverer
// writes asynq.ErrLeaseExpired.
const crashed = "its worker died, or lost its lease, while it ran"

// isUnended reports whether a job's last error says that the attempt had no end:
// neither its handler's, nor one that the frame has seen.
func isUnended(lastErr string) bool {
	reason, _, _ := strings.Cut(lastErr, notLookedUp)
	return reason == crashed || reason == asynq.ErrLeaseExpired.Error() || reason == context.DeadlineExceeded.Error()
}

func giveUp(lastErr string, tries int) error {
	if lastErr == asynq.ErrLeaseExpired.Error() {
		lastErr = crashed
	}
	return tasks.Permanent(fmt.Errorf("%s%s (try %d)", gaveUp, lastErr, tries))
}
