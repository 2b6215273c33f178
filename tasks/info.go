package tasks

import (
	"time"

	"github.com/hibiken/asynq"

	"github.com/carpool-go/carpool/internal/asynqwire"
	"github.com/carpool-go/carpool/internal/reason"
)

// Info is what Redis knows of a job at one moment.
type Info struct {
	ID    string
	Kind  string
	Queue string
	State State
	// Payload is what the job carries, as JSON.
	Payload []byte
	// MaxRetry is how many attempts may follow the first one, and Retried how many did.
	MaxRetry, Retried int
	// Timeout bounds each attempt; 0 if another program enqueued the job without one.
	Timeout time.Duration
	// Retention is how long the job stays in Redis when it is done.
	Retention time.Duration
	// RunAt is the time before which the job isn't run, in [StateScheduled] and
	// [StateRetry]; zero in the others.
	RunAt time.Time
	// Result is that of a job that is done, or what a job that runs shows by
	// [Job.Progress], as JSON; nil for none.
	Result []byte
	// LastError is why the last failed attempt failed, "cancelled" for a job that was
	// cancelled while it ran; "" if none has.
	LastError string
}

// State says where a job is on its way. Its text is asynq's.
type State string

const (
	// StatePending is the state of a job that waits for a worker.
	StatePending State = "pending"
	// StateActive is the state of a job that a worker runs.
	StateActive State = "active"
	// StateScheduled is the state of a job whose time has not come.
	StateScheduled State = "scheduled"
	// StateRetry is the state of a job that is tried again later.
	StateRetry State = "retry"
	// StateArchived is the state of a job that was given up.
	StateArchived State = "archived"
	// StateCompleted is the state of a job that is done, while it is retained.
	StateCompleted State = "completed"
	// StateAggregating is the state of a job that a plain asynq client has put into a
	// group of asynq's, which carpool itself never does.
	StateAggregating State = "aggregating"
)

// infoOf is what asynq knows of a job, without what carpool adds to it.
func infoOf(t *asynq.TaskInfo) *Info {
	info := &Info{
		ID: t.ID, Kind: t.Type, Queue: t.Queue, State: State(t.State.String()), Payload: t.Payload,
		MaxRetry: t.MaxRetry, Retried: t.Retried, Timeout: t.Timeout, Retention: t.Retention,
		Result: t.Result, LastError: t.LastErr,
	}
	if n, ok := asynqwire.MaxRetry(t.Headers); ok {
		info.MaxRetry = n
		info.Timeout = max(0, t.Timeout-asynqwire.TimeoutGrace)
	}
	if info.State == StateArchived {
		info.LastError, _ = reason.OfArchived(t.LastErr, t.Retried)
	}
	if info.State == StateScheduled || info.State == StateRetry {
		info.RunAt = t.NextProcessAt
	}
	return info
}
