package tasks

import (
	"errors"
	"fmt"
	"time"

	"github.com/hibiken/asynq"
)

// ErrUnknownKind is wrapped by the error for a kind that no task has.
var ErrUnknownKind = errors.New("unknown kind")

// Permanent marks err as one that trying again can't mend: the job goes
// straight to the archive, with err's text as the reason. Permanent(nil) is nil.
func Permanent(err error) error {
	if err == nil {
		return nil
	}
	return &permanentError{err}
}

// IsPermanent reports whether err, or an error it wraps, came from [Permanent].
func IsPermanent(err error) bool {
	_, ok := errors.AsType[*permanentError](err)
	return ok
}

type permanentError struct{ err error }

func (e *permanentError) Error() string   { return e.err.Error() }
func (e *permanentError) Unwrap() error   { return e.err }
func (e *permanentError) Is(t error) bool { return t == asynq.SkipRetry }

// RetryAfter marks err as one to be tried again, no sooner than after d and
// without the usual backoff. RetryAfter(d, nil) is nil.
func RetryAfter(d time.Duration, err error) error {
	if err == nil {
		return nil
	}
	return &retryAfterError{err, d}
}

// RetryDelay returns the delay that [RetryAfter] gave err, if it did.
func RetryDelay(err error) (time.Duration, bool) {
	if e, ok := errors.AsType[*retryAfterError](err); ok {
		return e.delay, true
	}
	return 0, false
}

type retryAfterError struct {
	err   error
	delay time.Duration
}

func (e *retryAfterError) Error() string { return e.err.Error() }
func (e *retryAfterError) Unwrap() error { return e.err }

// Snooze is the error of a handler that wants to be run again after d, when
// there is nothing to do yet. It uses up no try. The transaction of a [TxHandler]
// is rolled back.
func Snooze(d time.Duration) error { return &snoozeError{max(0, d)} }

// SnoozeDelay returns the time that err, from [Snooze], or an error that wraps
// it, asks for.
func SnoozeDelay(err error) (time.Duration, bool) {
	if e, ok := errors.AsType[*snoozeError](err); ok {
		return e.delay, true
	}
	return 0, false
}

type snoozeError struct{ delay time.Duration }

func (e *snoozeError) Error() string { return fmt.Sprintf("snoozed for %s", e.delay) }

// PayloadError is a payload that its kind can't take. It is permanent.
type PayloadError struct {
	Kind string
	Err  error
}

func (e *PayloadError) Error() string { return fmt.Sprintf("%s payload: %v", e.Kind, e.Err) }
func (e *PayloadError) Unwrap() error { return e.Err }

// DuplicateError is returned for a unique key that a job which has not ended
// yet holds already.
type DuplicateError struct {
	Key string
	// ID and Queue are the holder's.
	ID, Queue string
}

func (e *DuplicateError) Error() string {
	return fmt.Sprintf("tasks: unique key %q is held by job %s on queue %s", e.Key, e.ID, e.Queue)
}
