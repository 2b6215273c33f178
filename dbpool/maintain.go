package dbpool

import (
	"context"
	"encoding/json"
	"fmt"
	"time"
)

// maintainEvery is the pause between two rounds of maintain.
const maintainEvery = time.Second

// maintain reports leaks, closes the overflow that has been idle long enough, and
// replaces connections whose life is over, until the pool is closed.
func (p *Pool) maintain() {
	tick := time.NewTicker(maintainEvery)
	defer tick.Stop()
	for {
		select {
		case <-p.ctx.Done():
			return
		case now := <-tick.C:
			p.reportLeaks(now)
			for p.closeOneOverflow(now) {
			}
			p.recycleOne(now)
		}
	}
}

// reportLeaks logs each connection that has been on loan for LeakAfter, once for
// each loan.
func (p *Pool) reportLeaks(now time.Time) {
	if p.cfg.LeakAfter <= 0 {
		return
	}
	var reports [][]any
	p.mu.Lock()
	for c := range p.conns {
		if c.state == stateAcquired && !c.reported && now.Sub(c.acquiredAt) >= p.cfg.LeakAfter && c.loan.Load() != 0 {
			c.reported = true
			reports = append(reports, c.holderAttrs(now))
		}
	}
	p.mu.Unlock()
	for _, attrs := range reports {
		p.log.Warn("a connection is held for long; if it was forgotten, it is missing to others", attrs...)
	}
}

// closeOneOverflow closes the connection that has been idle longest, if more than
// Size are open and it has been idle for OverflowIdle. It reports whether it did.
func (p *Pool) closeOneOverflow(now time.Time) bool {
	p.mu.Lock()
	if len(p.conns)-p.count[stateClosing] <= p.cfg.Size || len(p.idle) == 0 || now.Sub(p.idle[0].idleSince) < p.cfg.OverflowIdle {
		p.mu.Unlock()
		return false
	}
	c := p.idle[0]
	p.setState(c, stateDetached)
	p.mu.Unlock()
	p.destroy(c, closedOverflow)
	return true
}

// recycleGap is the least time between two connections that are closed for their
// age. It keeps the pool from being emptied when the life of many ends at once, as
// after a machine's sleep, and lets all of them go within a tenth of their life.
func (p *Pool) recycleGap() time.Duration {
	return min(time.Second, p.cfg.Recycle/10/time.Duration(p.cfg.Size+p.cfg.MaxOverflow))
}

// mayRecycle reports whether a connection may be closed for its age now, and if so
// begins the next recycleGap.
func (p *Pool) mayRecycle(now time.Time) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.mayRecycleLocked(now)
}

// mayRecycleLocked is mayRecycle for a caller that holds the lock.
func (p *Pool) mayRecycleLocked(now time.Time) bool {
	if now.Sub(p.recycledAt) < p.recycleGap() {
		return false
	}
	p.recycledAt = now
	return true
}

// recycleOne replaces one idle connection whose life is over.
func (p *Pool) recycleOne(now time.Time) {
	p.mu.Lock()
	for _, c := range p.idle {
		if c.expired(now) && p.mayRecycleLocked(now) {
			p.setState(c, stateDetached)
			p.mu.Unlock()
			p.destroy(c, closedRecycled)
			if _, err := p.refill(p.ctx, 1); err != nil && p.ctx.Err() == nil {
				p.log.Warn("a connection was recycled, but no new one could be opened", "error", err)
			}
			return
		}
	}
	p.mu.Unlock()
}

// refill opens up to n connections, one after another, until Size are open. It
// returns how many it opened, and stops at the first error.
func (p *Pool) refill(ctx context.Context, n int) (opened int, err error) {
	for opened < n && ctx.Err() == nil {
		p.mu.Lock()
		if p.closed || len(p.conns) >= p.cfg.Size {
			p.mu.Unlock()
			return opened, nil
		}
		c := p.newConn()
		p.mu.Unlock()
		done := make(chan error, 1)
		go func() { done <- p.connect(c) }()
		select {
		case err := <-done:
			if err != nil {
				return opened, err
			}
			opened++
		case <-ctx.Done(): // the attempt goes on, because its connection will be of use
		}
	}
	return opened, ctx.Err()
}

// Validation is what [Pool.Validate] did. The pool is sound if Errors is 0.
type Validation struct {
	// Checked counts the idle connections that were looked at.
	Checked int
	// Replaced counts the new connections that were opened in place of those that
	// were dead or whose life was over.
	Replaced int
	// Errors counts the connections that could not be opened. It is 0 or 1, because
	// the first failure ends the attempts.
	Errors int
	// Took is how long the validation took.
	Took time.Duration
}

// MarshalJSON writes an object with the numbers checked, replaced, errors and
// took_ms, the last in milliseconds.
func (v Validation) MarshalJSON() ([]byte, error) {
	return json.Marshal(struct {
		Checked  int   `json:"checked"`
		Replaced int   `json:"replaced"`
		Errors   int   `json:"errors"`
		TookMS   int64 `json:"took_ms"`
	}{v.Checked, v.Replaced, v.Errors, v.Took.Milliseconds()})
}

// Validate pings each idle connection, closes those that are dead or whose life is
// over, and opens new ones until Config.Size are open. It is for a clock to call,
// every minute or so; the pool does not call it.
//
// It takes one connection at a time, the longest idle first, because all others
// stay available to callers of Acquire meanwhile. Once one is silent for
// Config.PingTimeout, it takes all that are stale at once, because each of them may
// be silent as long.
//
// A server that is away is counted in the result and is no error. The error is the
// cause of ctx's end or [ErrClosed], wrapped; with it, the result tells what was
// done so far.
func (p *Pool) Validate(ctx context.Context) (Validation, error) {
	began := time.Now()
	var v Validation
	p.mu.Lock()
	p.validations++
	run := p.validations
	p.mu.Unlock()
	replace := 0 // those that were dead, or whose life was over
	for {
		if err := ctx.Err(); err != nil {
			return v, fmt.Errorf("dbpool: validate: %w", context.Cause(ctx))
		}
		c, err := p.nextToValidate(run)
		if err != nil {
			return v, fmt.Errorf("dbpool: validate: %w", err)
		}
		if c == nil {
			break
		}
		v.Checked++
		if now := time.Now(); c.expired(now) && p.mayRecycle(now) {
			replace++
			p.destroy(c, closedRecycled)
			continue
		}
		h := c.ping()
		if h == alive {
			p.putBack(c)
			continue
		}
		replace++
		p.destroy(c, closedBroken)
		if h == silent {
			stale := p.detachStale()
			for _, c := range stale {
				if c.validation < run {
					c.validation = run
					v.Checked++
				}
			}
			replace += p.pingAll(stale)
		}
	}
	opened, err := p.refill(ctx, p.cfg.Size)
	v.Replaced = min(replace, opened)
	if ctx.Err() != nil {
		return v, fmt.Errorf("dbpool: validate: %w", context.Cause(ctx))
	}
	if err != nil {
		v.Errors++
		p.log.Warn("validation could not open a connection", "error", err)
	}
	v.Took = time.Since(began)
	return v, nil
}

// nextToValidate detaches the connection that has been idle longest of those that
// the validation of this number has yet to look at. It returns nil if there is none.
func (p *Pool) nextToValidate(run uint64) (*conn, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return nil, ErrClosed
	}
	for _, c := range p.idle {
		if c.validation < run {
			c.validation = run
			p.setState(c, stateDetached)
			return c, nil
		}
	}
	return nil, nil
}
