package scheduler

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"regexp"
	"time"

	"github.com/google/uuid"

	"github.com/carpool-go/carpool/internal/asynqwire"
	"github.com/carpool-go/carpool/internal/instance"
	"github.com/carpool-go/carpool/internal/outbox"
	"github.com/carpool-go/carpool/tasks"
)

// Entry is one thing that is run by the clock: a job, and when it is enqueued. Its
// zero value is not valid, as Name, Cron and Payload are required.
type Entry struct {
	// Name is unique among all entries, and part of the ids of its jobs: 1 to 100
	// letters, digits, or _ . : -
	Name string
	// Cron and TimeZone are as [ParseSchedule] takes them.
	Cron, TimeZone string
	// Payload is the job's, and decides its kind.
	Payload tasks.Payload
	// Options override the kind's own for the entry's jobs; zero values don't.
	// Timeout is from 1 s to 30 days, Retention from 1 s to 366 days. Isolation
	// must be left out, because it belongs to the kind.
	Options tasks.Options
	// Missed says what becomes of ticks that nobody was there for; "" is
	// [MissedOnce].
	Missed Missed
	// Overlap says what becomes of a tick whose previous job has not ended; "" is
	// [OverlapAllow].
	Overlap Overlap
}

// Missed is what becomes of ticks that are found more than ten seconds late,
// because no worker ran, or Postgres was away. Those of more than five years ago are
// left out, whatever the policy.
type Missed string

const (
	// MissedSkip leaves them out.
	MissedSkip Missed = "skip"
	// MissedOnce enqueues the last of them, unless a tick that is on time does
	// their work.
	MissedOnce Missed = "once"
	// MissedAll enqueues each of them, up to the last hundred.
	MissedAll Missed = "all"
)

// Overlap is what becomes of a tick while the job of the one before it is queued,
// runs, or waits for a retry. A job that was archived has ended.
type Overlap string

const (
	// OverlapAllow enqueues it all the same.
	OverlapAllow Overlap = "allow"
	// OverlapSkip leaves it out.
	OverlapSkip Overlap = "skip"
	// OverlapQueue lets one tick wait for the end, and leaves out further ones.
	OverlapQueue Overlap = "queue"
)

var entryName = regexp.MustCompile(`^[A-Za-z0-9_.:-]{1,100}$`)

// The bounds of the times in an entry's options; each is a second at least.
const (
	MaxTimeout   = 30 * 24 * time.Hour
	MaxRetention = 366 * 24 * time.Hour
)

// Validate reports everything that is wrong with the entry, joined by [errors.Join]. Each
// error begins with the name of the field as it is called in carpool.schedules. Whether a
// worker knows the kind, and how large payloads may be, it can't tell.
func (e Entry) Validate() error {
	var faults []error
	add := func(format string, args ...any) { faults = append(faults, fmt.Errorf(format, args...)) }
	if !entryName.MatchString(e.Name) {
		add("name: %.100q is not made of 1 to 100 letters, digits, or _ . : -", e.Name)
	}
	if e.Payload == nil {
		add("payload: is missing")
	} else if err := e.Payload.Validate(); err != nil {
		add("payload: %w", err)
	}
	if o := e.Options; o.Queue != "" && !asynqwire.IsQueueName(o.Queue) {
		add("queue: %.100q is not made of 1 to 100 letters, digits, or _ . : -", o.Queue)
	}
	if e.Payload != nil {
		if err := instance.CheckQueue(e.Options.Queue, e.Payload.Kind()); err != nil {
			faults = append(faults, err)
		}
	}
	if n := e.Options.MaxRetry; n > math.MaxInt32 {
		add("max_retry: %d is more than %d", n, math.MaxInt32)
	}
	if t := e.Options.Timeout; t != 0 && (t < time.Second || t > MaxTimeout) {
		add("timeout: %s is not from 1s to 30 days", t)
	}
	if r := e.Options.Retention; r != 0 && (r < time.Second || r > MaxRetention) {
		add("retention: %s is not from 1s to 366 days", r)
	}
	if e.Options.Isolation != "" {
		add("isolation: belongs to the kind; an entry can't override it")
	}
	switch e.Missed {
	case "", MissedSkip, MissedOnce, MissedAll:
	default:
		add("missed: %.100q is not one of skip, once, all", e.Missed)
	}
	switch e.Overlap {
	case "", OverlapAllow, OverlapSkip, OverlapQueue:
	default:
		add("overlap: %.100q is not one of allow, skip, queue", e.Overlap)
	}
	if _, err := parseZone(e.TimeZone); err != nil {
		faults = append(faults, err)
	}
	if _, err := ParseSchedule(e.Cron, ""); err != nil {
		faults = append(faults, err)
	}
	return errors.Join(faults...)
}

// definition is an entry as carpool.schedules has it; null is nil.
type definition struct {
	name, cron, zone, kind string
	payload                string // as JSON
	queue                  *string
	maxRetry               *int
	timeout, retention     *float64 // in seconds
	missed                 Missed
	overlap                Overlap
}

func (e Entry) definition() (definition, error) {
	payload, err := json.Marshal(e.Payload)
	if err != nil {
		return definition{}, fmt.Errorf("payload: %w", err)
	}
	d := definition{
		name: e.Name, cron: e.Cron, zone: cmp.Or(e.TimeZone, "UTC"), kind: e.Payload.Kind(), payload: string(payload),
		missed: cmp.Or(e.Missed, MissedOnce), overlap: cmp.Or(e.Overlap, OverlapAllow),
	}
	o := e.Options
	if o.Queue != "" {
		d.queue = &o.Queue
	}
	d.maxRetry = outbox.MaxRetry(o.MaxRetry)
	if s := o.Timeout.Seconds(); s != 0 {
		d.timeout = &s
	}
	if s := o.Retention.Seconds(); s != 0 {
		d.retention = &s
	}
	return d, nil
}

// job is the entry's job of that id as the outbox takes it.
func (d *definition) job(id uuid.UUID) outbox.Row {
	return outbox.Row{
		ID: id.String(), Kind: d.kind, Payload: []byte(d.payload), Queue: textOf(d.queue),
		MaxRetry: d.maxRetry, Timeout: duration(d.timeout), Retention: duration(d.retention),
	}
}

// duration is a number of seconds; nil is 0.
func duration(seconds *float64) time.Duration {
	if seconds == nil {
		return 0
	}
	return time.Duration(*seconds * float64(time.Second))
}

// tickSpace is the namespace of the ids of ticks' jobs.
var tickSpace = uuid.MustParse("6d2f0c4e-8a53-5c1b-9d0e-636172706f6f")

// tickID is the id of the job of an entry's tick: the same, whoever reckons it.
func tickID(name string, tick time.Time) uuid.UUID {
	return uuid.NewSHA1(tickSpace, fmt.Appendf(nil, "%s %d", name, tick.Unix()))
}
