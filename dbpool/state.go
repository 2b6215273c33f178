package dbpool

import (
	"slices"
	"time"
)

// state is what a connection is doing. These are the ways from one to another:
//
//	closed ───▶ connecting ───▶ idle ◀────▶ acquired
//	   ▲            │           │  ▲         │  │
//	   │            │           ▼  │         │  │
//	   │          failed       detached ◀────┘  │
//	   │            ▼              ▼            │
//	   └───────────────────────── closing ◀─────┘
//
// Whatever would become idle becomes acquired at once if somebody waits, and
// detached if the pool is closed. A detached connection is out of everybody's
// reach while it is pinged, which makes it idle again. One that is closing keeps its
// place until the server has closed its end too.
type state int

const (
	stateClosed     state = iota // not opened yet, or of no more use
	stateConnecting              // connect opens it
	stateIdle                    // it waits in Pool.idle to be acquired
	stateAcquired                // a caller checks it before its loan, or has it on loan
	stateDetached                // the pool pings it, or is about to close it
	stateClosing                 // the pool waits for the server to close its end
	numStates
)

// setState moves a connection into another state, and keeps Pool.conns, Pool.idle
// and Pool.count true. One that becomes idle gets its place by its idleSince,
// because one that was validated has been idle since its last loan all the same.
// The caller holds the lock.
func (p *Pool) setState(c *conn, to state) {
	switch c.state {
	case stateClosed:
		p.conns[c] = struct{}{}
	case stateIdle:
		i := slices.Index(p.idle, c)
		p.idle = slices.Delete(p.idle, i, i+1)
	}
	p.count[c.state]--
	c.state = to
	p.count[to]++
	switch to {
	case stateClosed:
		delete(p.conns, c)
	case stateIdle:
		i := len(p.idle)
		for i > 0 && p.idle[i-1].idleSince.After(c.idleSince) {
			i--
		}
		p.idle = slices.Insert(p.idle, i, c)
	}
}

// acquireLocked makes a connection acquired by a borrower, nil for none. The caller
// holds the lock.
func (p *Pool) acquireLocked(c *conn, b *Borrower, now time.Time) {
	c.acquiredAt, c.borrower, c.reported = now, b, false
	p.setState(c, stateAcquired)
}

// detach takes a connection out of everybody's reach.
func (p *Pool) detach(c *conn) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.setState(c, stateDetached)
}

// putBack makes a connection available. If the pool is closed, so is the
// connection.
func (p *Pool) putBack(c *conn) {
	p.mu.Lock()
	kept := p.putBackLocked(c)
	p.mu.Unlock()
	if !kept {
		p.destroy(c, closedWithPool)
	}
}

// putBackLocked hands a connection to the first waiter, or makes it idle. If the
// pool is closed, it detaches the connection instead and returns false: then it is
// the caller's to destroy. The caller holds the lock.
func (p *Pool) putBackLocked(c *conn) (kept bool) {
	if p.closed {
		p.setState(c, stateDetached)
		return false
	}
	if w := p.nextWaiter(); w != nil {
		p.acquireLocked(c, w.borrower, time.Now())
		w.ch <- handover{conn: c}
		return true
	}
	p.setState(c, stateIdle)
	return true
}

// closeReason is why a connection is closed; [Counts] has a number for most of
// them.
type closeReason int

const (
	closedWithPool closeReason = iota // the pool is closed
	closedBroken                      // it is dead
	closedUnfit                       // it was released in a bad state
	closedRecycled                    // its life is over
	closedOverflow                    // it is idle and beyond the size
	closedLeaked                      // its borrower forgot it, and left it in a bad state
)

// destroy closes a connection that is out of everybody's reach, counts it, and opens
// another one in its place if somebody waits.
func (p *Pool) destroy(c *conn, reason closeReason) {
	p.mu.Lock()
	p.beginClosing(c, reason)
	p.mu.Unlock()
	p.finishClosing(c)
}

// destroyLater is destroy for a caller that doesn't wait for the server.
func (p *Pool) destroyLater(c *conn, reason closeReason) {
	p.mu.Lock()
	p.beginClosing(c, reason)
	p.mu.Unlock()
	go p.finishClosing(c)
}

// beginClosing is the part of destroy that takes no time. The caller holds the lock.
func (p *Pool) beginClosing(c *conn, reason closeReason) {
	p.setState(c, stateClosing)
	switch reason {
	case closedBroken, closedUnfit:
		p.counts.ClosedBroken++
	case closedRecycled:
		p.counts.ClosedRecycled++
	case closedOverflow:
		p.counts.ClosedOverflow++
	case closedLeaked:
		p.counts.ClosedLeaked++
	}
}

func (p *Pool) finishClosing(c *conn) {
	c.close()
	p.vacate(c)
}

// vacate gives the place of a connection that is closed to whoever waits.
func (p *Pool) vacate(c *conn) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.setState(c, stateClosed)
	p.connectForWaiters()
}
