package scheduler

import "time"

const (
	// onTime is how late a tick may be found without counting as missed. It is
	// more than it takes another instance to go on where one was stopped.
	onTime = 10 * time.Second
	// missedLongest bounds how far back is looked for them.
	missedLongest = 5 * 366 * 24 * time.Hour
	// missedMost bounds how many missed ticks are made up for.
	missedMost = 100
)

// position is how far an entry is.
type position struct {
	lastTick    time.Time // all ticks up to it are decided
	waitingTick time.Time // zero: none waits
	changedAt   time.Time // what was before it, under another definition, is past
}

func (p position) since() time.Time {
	if p.lastTick.After(p.changedAt) {
		return p.lastTick
	}
	return p.changedAt
}

func (p position) waits() bool { return p.waitingTick.After(p.changedAt) }

func waiting(p position) int {
	if p.waits() {
		return 1
	}
	return 0
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
	d := decision{next: p}
	if !p.waits() {
		d.next.waitingTick = time.Time{}
	}
	if len(due) > 0 {
		d.next.lastTick = due[len(due)-1]
	}
	taken := due
	if missed != MissedAll {
		late := 0
		for late < len(due) && now.Sub(due[late]) > onTime {
			late++
		}
		taken = due[late:]
		if missed == MissedOnce && len(taken) == 0 && late > 0 {
			taken = due[late-1:]
		}
	}
	switch overlap {
	case OverlapSkip:
		switch {
		case running:
			taken = nil
		case len(taken) > 1:
			taken = taken[len(taken)-1:]
		}
	case OverlapQueue:
		line := taken
		if p.waits() {
			line = append([]time.Time{p.waitingTick}, taken...)
		}
		taken = nil
		d.next.waitingTick = time.Time{}
		if len(line) > 0 && !running {
			taken, line = line[:1], line[1:]
		}
		if len(line) > 0 {
			d.next.waitingTick = line[0]
		}
	}
	d.enqueue = taken
	d.leftOut = earlier + len(due) - len(taken) + waiting(p) - waiting(d.next)
	return d
}

// dueTicks returns the ticks after since and up to now, the last missedMost of
// them at most, and 1 if there are earlier ones, since all of them might be
// millions.
func dueTicks(s Schedule, since, now time.Time) (due []time.Time, earlier int) {
	if longest := now.Add(-missedLongest); since.Before(longest) {
		since = longest
	}
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
