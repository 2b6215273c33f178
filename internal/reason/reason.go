// Package reason has the words for why a job ended that are kept with the job, as its last
// error, and are read again later: by the next delivery, and by those who look at the
// archive.
package reason

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/hibiken/asynq"
)

const (
	// Crashed is the last error of a job whose worker died. asynq's own recoverer writes
	// asynq.ErrLeaseExpired.
	Crashed = "its worker died, or lost its lease, while it ran"
	// Unfetched is the last error of a job that was given back without a sign that it had
	// begun.
	Unfetched = "the answer to its fetch was lost, or its worker died before another one saw it run"
	// Cancelled is the reason of a job that was cancelled while it ran.
	Cancelled = "cancelled"
	// gaveUp begins the reason of a job that was given up without a run: the last times it
	// was delivered, its worker died.
	gaveUp = "given up: "
	// notLookedUp stands between the reason why a job is given up, which the next delivery
	// must find again, and why its record could not be looked up.
	notLookedUp = "; whether it was done before could not be looked up: "
)

// OfUnended returns, for a job's last error, why the attempt had no end: neither its
// handler's, nor one that the executor has seen. It is "" for an attempt that had one.
func OfUnended(lastErr string) string {
	reason, _, _ := strings.Cut(lastErr, notLookedUp)
	switch reason {
	case Crashed, asynq.ErrLeaseExpired.Error(), context.DeadlineExceeded.Error():
		return reason
	}
	return ""
}

// GaveUp is the error for a job that isn't run any more because of a reason of
// [OfUnended], after so many tries. Whoever puts the job back in asynqmon has it run once
// more for each time; with the command archive retry it begins anew.
func GaveUp(unended string, tries int) error {
	if unended == asynq.ErrLeaseExpired.Error() {
		unended = Crashed
	}
	return fmt.Errorf("%s%s (try %d)", gaveUp, unended, tries)
}

// NotLookedUp wraps why the record of a job that is to be given up could not be looked up.
// The reason, an error's or [OfUnended]'s, is found again by [OfUnended].
func NotLookedUp(reason error, err error) error {
	return fmt.Errorf("%w%s%w", reason, notLookedUp, err)
}

// Unended is the error with a reason of [OfUnended] for its text.
func Unended(reason string) error { return errors.New(reason) }

// OfArchived returns why a job is in the archive, from its last error, and how often it
// was tried, from the retries that it has used.
func OfArchived(lastErr string, retried int) (reason string, tries int) {
	switch {
	case lastErr == context.Canceled.Error(): // asynq's word for it
		return Cancelled, retried + 1
	case strings.HasPrefix(lastErr, gaveUp):
		return lastErr, retried // the last time it was delivered it wasn't run
	}
	return lastErr, retried + 1
}
