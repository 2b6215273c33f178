package dbpool

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"time"
)

// Stats is how a pool stood at one moment. Its numbers agree with each other,
// because they were read under one lock, all but AcquiredDirect, AcquiredWaited and
// Waits in its Counts.
type Stats struct {
	// PoolSize is Config.Size.
	PoolSize int
	// CheckedIn is how many connections are idle.
	CheckedIn int
	// CheckedOut is how many connections are lent, or are checked by a caller who
	// is about to get them.
	CheckedOut int
	// Overflow is how many connections are open beyond PoolSize. Besides those
	// checked in and out it includes those that are being opened, validated or
	// closed.
	Overflow int
	// Invalid is how many of the idle connections are stale: a fault was noticed
	// after they were last known to live. Each is pinged before it is lent.
	Invalid int
	// Waiting is how many callers wait for a connection.
	Waiting int
	// Counts are totals since the pool was made.
	Counts Counts
}

// Counts are totals since a pool was made.
type Counts struct {
	// Opened counts the connections that were opened.
	Opened uint64
	// ConnectErrors counts the attempts to open one that failed.
	ConnectErrors uint64
	// ClosedBroken counts the connections closed because they were found dead, or
	// were released in a bad state.
	ClosedBroken uint64
	// ClosedRecycled counts the connections closed at the end of their life.
	ClosedRecycled uint64
	// ClosedOverflow counts the connections closed because they were idle beyond
	// the pool's size.
	ClosedOverflow uint64
	// ClosedLeaked counts the connections closed because their holder forgot them:
	// in a bad state, or until after [Pool.Close].
	ClosedLeaked uint64
	// AcquiredDirect counts the acquires that got an idle connection at once.
	AcquiredDirect uint64
	// AcquiredWaited counts the acquires that waited for one.
	AcquiredWaited uint64
	// TimedOut counts the acquires that got none within Config.Timeout.
	TimedOut uint64
	// Waits is a histogram of acquires that succeeded: it has the number of those
	// that took up to 1 ms, 10 ms, 100 ms, 1 s and 10 s, and of those that took
	// longer.
	Waits [6]uint64
}

// Stats returns how the pool stands now. It is cheap enough to be called for each
// request or job.
func (p *Pool) Stats() Stats {
	p.mu.Lock()
	defer p.mu.Unlock()
	s := Stats{
		PoolSize: p.cfg.Size, CheckedIn: len(p.idle), CheckedOut: p.count[stateAcquired],
		Overflow: max(0, len(p.conns)-p.cfg.Size), Waiting: p.waiters.Len(), Counts: p.counts,
	}
	for i := range p.waits {
		s.Counts.Waits[i] = p.waits[i].Load()
		s.Counts.AcquiredDirect += s.Counts.Waits[i]
	}
	s.Counts.AcquiredWaited = p.waited.Load()
	s.Counts.AcquiredDirect -= s.Counts.AcquiredWaited
	for _, c := range p.idle {
		if c.stale() {
			s.Invalid++
		}
	}
	return s
}

// observeWait adds an acquire that took this long to the histogram.
func (p *Pool) observeWait(d time.Duration) {
	i := 0
	for bound := time.Millisecond; i < len(p.waits)-1 && d > bound; bound *= 10 {
		i++
	}
	p.waits[i].Add(1)
}

// TimeoutError is the error of [Pool.Acquire] when no connection came free within
// Config.Timeout. It says who had them.
type TimeoutError struct {
	// Timeout, Size and MaxOverflow are the pool's, from its Config.
	Timeout           time.Duration
	Size, MaxOverflow int
	// CheckedOut is how many connections were lent. It is less than Size and
	// MaxOverflow together if connections could not be opened, or not in time.
	CheckedOut int
	// Waiting is how many callers waited, this one included.
	Waiting int
	// Holders are those who held connections, the longest first.
	Holders []Holder
	// Own is how many of the connections the caller's own borrower held, see
	// [Pool.Track]. It is 0 in sound programs, because callers that hold one
	// connection and wait for another can wait for each other.
	Own int
	// ConnectErr is what the last attempt to open a connection failed with, nil if
	// it succeeded.
	ConnectErr error
}

// Holder is somebody who holds a connection, as a [TimeoutError] names them.
type Holder struct {
	// Name is the borrower's, see [Pool.Track]; "" for none.
	Name string
	// For is how long the connection has been held.
	For time.Duration
}

// Error says what was waited for and how long, names the first five holders, and
// says why no connection could be opened, if that was so.
func (e *TimeoutError) Error() string {
	var b strings.Builder
	fmt.Fprintf(&b, "no connection within %s: size %d + overflow %d ", e.Timeout, e.Size, e.MaxOverflow)
	if e.CheckedOut >= e.Size+e.MaxOverflow {
		b.WriteString("all checked out")
	} else {
		fmt.Fprintf(&b, "with %d checked out", e.CheckedOut)
	}
	fmt.Fprintf(&b, ", %d waiting", e.Waiting)
	for i, h := range e.Holders {
		switch {
		case i == 0:
			b.WriteString("; held by ")
		case i == 5:
			fmt.Fprintf(&b, " and %d more", len(e.Holders)-i)
		}
		if i >= 5 {
			break
		}
		if i > 0 {
			b.WriteString(", ")
		}
		name := h.Name
		if name == "" {
			name = "somebody"
		}
		fmt.Fprintf(&b, "%s for %s", name, h.For.Round(time.Millisecond))
	}
	if e.Own > 0 {
		fmt.Fprintf(&b, "; who waits holds %d of them: acquire one connection at a time", e.Own)
	}
	if e.ConnectErr != nil {
		fmt.Fprintf(&b, "; the last attempt to connect failed: %v", e.ConnectErr)
	}
	return b.String()
}

// Unwrap returns ConnectErr, for [errors.Is] and [errors.As].
func (e *TimeoutError) Unwrap() error { return e.ConnectErr }

// timeoutError returns the error of a waiter, who is still in line. b is its
// borrower, nil for none. The caller holds the lock.
func (p *Pool) timeoutError(b *Borrower) *TimeoutError {
	e := &TimeoutError{
		Timeout: p.cfg.Timeout, Size: p.cfg.Size, MaxOverflow: p.cfg.MaxOverflow,
		CheckedOut: p.count[stateAcquired], Waiting: p.waiters.Len(), ConnectErr: p.connectErr,
	}
	now := time.Now()
	for c := range p.conns {
		if c.state != stateAcquired {
			continue
		}
		e.Holders = append(e.Holders, Holder{c.borrower.String(), now.Sub(c.acquiredAt)})
		if b != nil && c.borrower == b {
			e.Own++
		}
	}
	slices.SortFunc(e.Holders, func(a, b Holder) int { return cmp.Compare(b.For, a.For) })
	return e
}
