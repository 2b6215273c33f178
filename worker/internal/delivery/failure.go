package delivery

import (
	"errors"
	"math/rand/v2"
	"time"

	"github.com/jackc/pgerrcode"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/carpool-go/carpool/dbpool"
	"github.com/carpool-go/carpool/internal/reason"
	"github.com/carpool-go/carpool/internal/sqlstate"
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

// postponedFor postpones a job for about the delay: half of it to one and a half.
func postponedFor(delay time.Duration, err error) error {
	return &postponedError{err, delay/2 + rand.N(delay)}
}

// errCancelled is returned for a job that was cancelled while it ran.
var errCancelled = tasks.Permanent(errors.New(reason.Cancelled))

// isConflict reports whether err says that Postgres has sacrificed the
// transaction to others, or that a migration has changed what a statement returns since its
// connection prepared it. It is meant to be run again at once.
func isConflict(err error) bool {
	e, ok := errors.AsType[*pgconn.PgError](err)
	if !ok {
		return false
	}
	// "cached plan must not change result type" has no code of its own. pgx prepares the
	// statement anew the next time.
	isStale := e.Code == pgerrcode.FeatureNotSupported && e.Routine == "RevalidateCachedQuery"
	return isStale || e.Code == pgerrcode.SerializationFailure || e.Code == pgerrcode.DeadlockDetected
}

// isExhausted reports whether err says that the server has run out of something, such as
// disk or memory: class 53. Connections are not meant, which [dbpool.IsAway] knows, nor
// 53400, the limit on a session's own temporary files.
func isExhausted(err error) bool {
	e, ok := errors.AsType[*pgconn.PgError](err)
	return ok && sqlstate.HasClass(e, pgerrcode.InsufficientResources) && e.Code != pgerrcode.ConfigurationLimitExceeded
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
	return ok && sqlstate.HasClass(e, pgerrcode.InvalidAuthorizationSpecification, pgerrcode.InvalidCatalogName,
		pgerrcode.InvalidSchemaName, pgerrcode.SyntaxErrorOrAccessRuleViolation)
}

// isFailure reports whether an error uses up a try.
func isFailure(err error) bool {
	_, isPostponed := errors.AsType[*postponedError](err)
	_, isUnknown := errors.AsType[*unknownError](err)
	_, isSnoozed := tasks.SnoozeDelay(err)
	return !isPostponed && !isUnknown && !isSnoozed
}

const (
	// retryBase and retryCap bound the backoff. With tasks.DefaultMaxRetry a job
	// that goes on failing is given up after a quarter of an hour on average.
	retryBase = 2 * time.Second
	retryCap  = time.Hour
)

// retryDelay is how long a job that has failed waits, after so many retries. It is
// exponential backoff with full jitter, which spreads the retries of many jobs that failed
// at once best; see "Exponential Backoff And Jitter" in the AWS Architecture Blog. A delay
// that was asked for is kept.
func retryDelay(retried int, err error) time.Duration {
	if d, ok := tasks.RetryDelay(err); ok {
		return d
	}
	return rand.N(min(retryCap, retryBase<<min(retried, 20))) + 1
}

// postponeTime is how long a job waits that has not failed.
func postponeTime(err error) time.Duration {
	if d, ok := tasks.SnoozeDelay(err); ok {
		return d
	}
	if e, ok := errors.AsType[*postponedError](err); ok {
		return e.delay
	}
	return 0
}
