package scheduler

import "time"

const (
	// onTime is how late a tick may be found without counting as missed. It is
	// more than it takes another instance to go on where one was stopped.
	onTime = 10 * time.Second
	// missedLongest bounds how far back missed ticks are looked for.
	missedLongest = 5 * 366 * 24 * time.Hour
	// missedMost bounds how many missed ticks are made up for.
	missedMost = 100
)

// position is how far an entry is.
type position struct {
	lastTick    time.Time // all ticks up to it are decided
	waitingTick time.Time // OverlapQueue's; zero: none waits
	// changedAt is when the entry last got another schedule, or was enabled or
	// disabled. Ticks of before are nobody's, and one that waited is dropped.
	changedAt time.Time
}

// since is the time after which ticks are undecided.
func (p position) since() time.Time { return later(p.lastTick, p.changedAt) }

func later(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}

// waits reports whether a tick waits for the end of the job before it.
func (p position) waits() bool { return p.waitingTick.After(p.changedAt) }

// waiting is the tick that waits, or the zero time.
func (p position) waiting() time.Time {
	if p.waits() {
		return p.waitingTick
	}
	return time.Time{}
}

// decision is what becomes of the ticks that are due.
type decision struct {
	enqueue []time.Time // in their order
	next    position
	leftOut int // how many the policies left out, of those that were counted
}

// decide applies an entry's policies to the ticks that are due at now. running
// tells whether the entry's last job has not ended.
func decide(s Schedule, missed Missed, overlap Overlap, p position, now time.Time, running bool) decision {
	due, earlier := dueTicks(s, p.since(), now)
	kept := applyMissed(missed, due, now)
	enqueue, waiting := applyOverlap(overlap, kept, p.waiting(), running)

	next := position{lastTick: p.lastTick, waitingTick: waiting, changedAt: p.changedAt}
	if len(due) > 0 {
		next.lastTick = due[len(due)-1]
	}
	offered := earlier + len(due) + count(p.waiting())
	return decision{enqueue: enqueue, next: next, leftOut: offered - len(enqueue) - count(waiting)}
}

// count is 1 for a tick and 0 for none.
func count(tick time.Time) int {
	if tick.IsZero() {
		return 0
	}
	return 1
}

// dueTicks returns the ticks after since and up to now, the last missedMost of
// them at most, and 1 or more if there are earlier ones. These are not all
// counted, because they might be millions.
func dueTicks(s Schedule, since, now time.Time) (due []time.Time, earlier int) {
	since = later(since, now.Add(-missedLongest))
	for back := time.Hour; ; back *= 8 {
		from, whole := now.Add(-back), false
		if !from.After(since) {
			from, whole = since, true
		}
		due = due[:0]
		n := 0
		for at := s.Next(from); !at.IsZero() && !at.After(now); at = s.Next(at) {
			n++
			if len(due) == missedMost {
				due = append(due[:0], due[1:]...)
			}
			due = append(due, at)
		}
		if n > missedMost {
			return due, n - missedMost
		}
		if whole {
			return due, 0
		}
		if n == missedMost {
			return due, 1
		}
	}
}

// applyMissed returns those of the ticks that are due which are not left out for
// having been missed.
func applyMissed(policy Missed, due []time.Time, now time.Time) []time.Time {
	late := 0
	for late < len(due) && now.Sub(due[late]) > onTime {
		late++
	}
	switch {
	case policy == MissedAll:
		return due
	case policy == MissedOnce && late > 0 && late == len(due):
		return due[late-1:] // none is on time that would do their work
	default:
		return due[late:]
	}
}

// applyOverlap returns those of the ticks that may be enqueued now, and the one
// that waits from now on; zero is none. waiting is the one that has waited so far,
// and running tells whether the entry's last job has not ended. Only OverlapQueue
// lets a tick wait, or ends its wait: it is kept where the policy was changed.
func applyOverlap(policy Overlap, ticks []time.Time, waiting time.Time, running bool) (enqueue []time.Time, nowWaiting time.Time) {
	switch policy {
	case OverlapSkip:
		if running || len(ticks) == 0 {
			return nil, waiting
		}
		return ticks[len(ticks)-1:], waiting
	case OverlapQueue:
		line := ticks
		if !waiting.IsZero() {
			line = append([]time.Time{waiting}, ticks...)
		}
		if !running && len(line) > 0 {
			enqueue, line = line[:1], line[1:]
		}
		if len(line) > 0 {
			nowWaiting = line[0]
		}
		return enqueue, nowWaiting
	default:
		return ticks, waiting
	}
}
