package tasks

import (
	"errors"
	"fmt"
	"time"

	"github.com/hibiken/asynq"
)

// ErrUnknownKind is wrapped by the error of [Set.Lookup] for a kind that is not
// registered.
var ErrUnknownKind = errors.New("unknown kind")

// Permanent returns an error that wraps err and that another try can't mend: the job goes
// to the archive at once, with err's text as the reason. Permanent(nil) is nil.
func Permanent(err error) error {
	if err == nil {
		return nil
	}
	return &permanentError{err}
}

// IsPermanent reports whether err is permanent, because it or an error it wraps came from
// [Permanent]. It is for the tests of handlers.
func IsPermanent(err error) bool {
	_, ok := errors.AsType[*permanentError](err)
	return ok
}

type permanentError struct{ err error }

func (e *permanentError) Error() string   { return e.err.Error() }
func (e *permanentError) Unwrap() error   { return e.err }
func (e *permanentError) Is(t error) bool { return t == asynq.SkipRetry }

// RetryAfter returns an error that wraps err and has the job tried again no sooner than
// after d, in place of the usual backoff. It uses up a try. RetryAfter(d, nil) is nil.
func RetryAfter(d time.Duration, err error) error {
	if err == nil {
		return nil
	}
	return &retryAfterError{err, d}
}

// RetryDelay returns the delay that [RetryAfter] has given err, or an error it wraps; ok
// is false if none was given. It is for the tests of handlers.
func RetryDelay(err error) (d time.Duration, ok bool) {
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

// Snooze returns the error of a handler that has nothing to do yet and is to be run again
// after d; a negative d counts as 0. It uses up no try. The transaction of a [TxHandler] is
// rolled back.
func Snooze(d time.Duration) error { return &snoozeError{max(0, d)} }

// SnoozeDelay returns the time that [Snooze] has given err, or an error it wraps; ok is
// false if none was given. It is for the tests of handlers.
func SnoozeDelay(err error) (d time.Duration, ok bool) {
	if e, ok := errors.AsType[*snoozeError](err); ok {
		return e.delay, true
	}
	return 0, false
}

type snoozeError struct{ delay time.Duration }

func (e *snoozeError) Error() string { return fmt.Sprintf("snoozed for %s", e.delay) }

// PayloadError is the error for a payload that its kind can't take. It is permanent.
type PayloadError struct {
	Kind string
	// Err is that of [Payload.Validate], or says where the JSON is wrong.
	Err error
}

// Error returns the kind and what is wrong with the payload.
func (e *PayloadError) Error() string { return fmt.Sprintf("%s payload: %v", e.Kind, e.Err) }

// Unwrap returns Err.
func (e *PayloadError) Unwrap() error { return e.Err }

// DuplicateError is the error for a unique key that another job holds, which has not
// ended yet.
type DuplicateError struct {
	// Key is the key as [EnqueueOptions.UniqueKey] has it.
	Key string
	// ID and Queue are the holder's.
	ID, Queue string
}

// Error returns the key and its holder.
func (e *DuplicateError) Error() string {
	return fmt.Sprintf("tasks: unique key %q is held by job %s on queue %s", e.Key, e.ID, e.Queue)
}
