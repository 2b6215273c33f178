package dbpool

import (
	"cmp"
	"fmt"
	"runtime"
	"slices"
	"strings"
	"time"
)

// Stats is how a pool stood at one moment: all of it but how acquiring went was
// read under one lock.
type Stats struct {
	// PoolSize is Config.Size.
	PoolSize int
	// CheckedIn connections are idle; CheckedOut ones are lent.
	CheckedIn, CheckedOut int
	// Overflow is how many connections are open beyond PoolSize.
	Overflow int
	// Invalid idle connections are suspects: another one's death was noticed
	// after they were last known to live. Each is asked before it is lent.
	Invalid int
	// Waiting is how many callers wait for a connection.
	Waiting int
	// Counts are totals since the pool was opened.
	Counts Counts
}

// Counts are totals since a pool was opened.
type Counts struct {
	Opened, ConnectErrors uint64
	// Why connections were closed: found dead or left in a bad state, at the
	// end of their life, idle beyond the pool's size, not given back in time.
	ClosedBroken, ClosedRecycled, ClosedOverflow, ClosedLeaked uint64
	// How acquiring went: at once, after a wait, not within Config.Timeout.
	AcquiredDirect, AcquiredWaited, TimedOut uint64
	// Waits has the number of acquires that took up to 1 ms, 10 ms, 100 ms,
	// 1 s, 10 s, and longer.
	Waits [6]uint64
}

// Stats returns how the pool stands.
func (p *Pool) Stats() Stats {
	p.mu.Lock()
	defer p.mu.Unlock()
	s := Stats{
		PoolSize: p.cfg.Size, CheckedIn: len(p.idle), CheckedOut: len(p.out),
		Overflow: max(0, p.open()-p.cfg.Size), Waiting: p.waiters.Len(), Counts: p.counts,
	}
	for i := range p.waits {
		s.Counts.Waits[i] = p.waits[i].Load()
		s.Counts.AcquiredDirect += s.Counts.Waits[i]
	}
	s.Counts.AcquiredWaited = p.waited.Load()
	s.Counts.AcquiredDirect -= s.Counts.AcquiredWaited
	deaths := p.deaths.Load()
	for _, m := range p.idle {
		if m.proven < deaths {
			s.Invalid++
		}
	}
	return s
}

func (p *Pool) observeWait(d time.Duration) {
	i := 0
	for bound := time.Millisecond; i < len(p.waits)-1 && d > bound; bound *= 10 {
		i++
	}
	p.waits[i].Add(1)
}

// TimeoutError says that no connection came free in time, and who had them.
type TimeoutError struct {
	Timeout           time.Duration
	Size, MaxOverflow int
	CheckedOut        int
	// Waiting counts the callers that waited, this one included.
	Waiting int
	// Holders are those who hold connections, the longest first.
	Holders []Holder
	// Own is how many connections the caller's own borrower holds, see
	// [Pool.Track]: callers that hold one and wait for another can wait for each
	// other.
	Own int
	// ConnectErr is what the last attempt to open a connection failed with, nil
	// if it succeeded.
	ConnectErr error
}

// Holder is somebody who holds a connection.
type Holder struct {
	// Name is the borrower's, see [Pool.Track]; "" for none.
	Name string
	For  time.Duration
}

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

// Unwrap returns ConnectErr.
func (e *TimeoutError) Unwrap() error { return e.ConnectErr }

// timeoutError is made while the caller, who may be a borrower, still waits. The
// caller holds the lock.
func (p *Pool) timeoutError(b *Borrower) *TimeoutError {
	e := &TimeoutError{
		Timeout: p.cfg.Timeout, Size: p.cfg.Size, MaxOverflow: p.cfg.MaxOverflow,
		CheckedOut: len(p.out), Waiting: p.waiters.Len(), ConnectErr: p.connectErr,
	}
	now := time.Now()
	for m := range p.out {
		e.Holders = append(e.Holders, Holder{m.borrower.String(), now.Sub(m.lent)})
		if b != nil && m.borrower == b {
			e.Own++
		}
	}
	slices.SortFunc(e.Holders, func(a, b Holder) int { return cmp.Compare(b.For, a.For) })
	return e
}

// holder describes who holds a connection, for a log. The caller holds the
// pool's lock.
func (m *member) holder(now time.Time) []any {
	var stack strings.Builder
	frames := runtime.CallersFrames(m.stack[:m.depth])
	for {
		f, more := frames.Next()
		if f.Function != "" {
			fmt.Fprintf(&stack, "%s\n\t%s:%d\n", f.Function, f.File, f.Line)
		}
		if !more {
			break
		}
	}
	attrs := []any{"held_by", m.borrower.String(), "held_for", now.Sub(m.lent).Round(time.Millisecond).String()}
	if m.rowsOpen.Load() {
		attrs = append(attrs, "rows", "left open")
	}
	return append(attrs, "acquired_at", stack.String())
}
