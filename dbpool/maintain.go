package dbpool

import (
	"context"
	"encoding/json"
	"fmt"
	"time"
)

// maintainEvery is how often the pool looks after itself.
const maintainEvery = time.Second

// maintain closes overflow that is idle, recycles what is too old, and reports
// leaks, until the pool is closed.
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

func (p *Pool) reportLeaks(now time.Time) {
	if p.cfg.LeakAfter <= 0 {
		return
	}
	var reports [][]any
	p.mu.Lock()
	for m := range p.out {
		if !m.reported && now.Sub(m.lent) >= p.cfg.LeakAfter && m.loan.Load() != 0 {
			m.reported = true
			reports = append(reports, m.holder(now))
		}
	}
	p.mu.Unlock()
	for _, attrs := range reports {
		p.log.Warn("a connection is held for long; if it was forgotten, it is missing to others", attrs...)
	}
}

// closeOneOverflow closes the connection that was idle longest, if there are
// more than Size and it has been idle for OverflowIdle.
func (p *Pool) closeOneOverflow(now time.Time) bool {
	p.mu.Lock()
	if p.open() <= p.cfg.Size || len(p.idle) == 0 || now.Sub(p.idle[0].idleSince) < p.cfg.OverflowIdle {
		p.mu.Unlock()
		return false
	}
	m := p.setAside(0)
	p.mu.Unlock()
	p.dispose(m, closedOverflow)
	return true
}

// recycleGap is the least time between two connections that are closed for their
// age. When many are too old at once, as after a machine's sleep, they go in turn,
// so that the pool isn't emptied; all of them within a tenth of their life.
func (p *Pool) recycleGap() time.Duration {
	return min(time.Second, p.cfg.Recycle/10/time.Duration(p.cfg.Size+p.cfg.MaxOverflow))
}

// mayRecycle reports whether it is the turn of a connection that is too old to be
// closed, and if so takes the turn.
func (p *Pool) mayRecycle(now time.Time) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.mayRecycleLocked(now)
}

func (p *Pool) mayRecycleLocked(now time.Time) bool {
	if now.Sub(p.recycledAt) < p.recycleGap() {
		return false
	}
	p.recycledAt = now
	return true
}

// recycleOne replaces one idle connection that is at the end of its life.
func (p *Pool) recycleOne(now time.Time) {
	p.mu.Lock()
	for i, m := range p.idle {
		if m.expired(now) && p.mayRecycleLocked(now) {
			p.setAside(i)
			p.mu.Unlock()
			p.dispose(m, closedRecycled)
			if _, err := p.refill(p.ctx, 1); err != nil && p.ctx.Err() == nil {
				p.log.Warn("a connection was recycled, but no new one could be opened", "error", err)
			}
			return
		}
	}
	p.mu.Unlock()
}

// setAside takes an idle connection out of reach. The caller holds the lock.
func (p *Pool) setAside(i int) *member {
	m := p.idle[i]
	p.idle = append(p.idle[:i], p.idle[i+1:]...)
	p.aside++
	return m
}

// refill opens up to n connections, one after another, until Size are open, and
// returns how many it opened and the first error.
func (p *Pool) refill(ctx context.Context, n int) (opened int, err error) {
	for opened < n && ctx.Err() == nil {
		p.mu.Lock()
		if p.closed || p.open() >= p.cfg.Size {
			p.mu.Unlock()
			return opened, nil
		}
		p.opening++
		p.mu.Unlock()
		done := make(chan error, 1)
		go func() { done <- p.openOne() }()
		select {
		case err := <-done:
			if err != nil {
				return opened, err
			}
			opened++
		case <-ctx.Done(): // the connection will be of use all the same
		}
	}
	return opened, ctx.Err()
}

// Validation is what [Pool.Validate] did.
type Validation struct {
	// Checked idle connections were asked for an answer; Replaced were dead or at
	// the end of their life, and new ones were opened.
	Checked, Replaced int
	// Errors counts connections that could not be opened.
	Errors int
	Took   time.Duration
}

// MarshalJSON writes checked, replaced, errors, and took_ms in milliseconds.
func (v Validation) MarshalJSON() ([]byte, error) {
	return json.Marshal(struct {
		Checked  int   `json:"checked"`
		Replaced int   `json:"replaced"`
		Errors   int   `json:"errors"`
		TookMS   int64 `json:"took_ms"`
	}{v.Checked, v.Replaced, v.Errors, v.Took.Milliseconds()})
}

// Validate asks each idle connection for an answer, the longest idle first and
// one at a time, so that all others stay within reach; once one is silent for
// Config.PingTimeout, all suspects at once. It closes those that don't answer, and
// opens new ones up to Config.Size.
// A server that is away is no error, but counted in the result; the error is
// ctx's, or [ErrClosed].
func (p *Pool) Validate(ctx context.Context) (Validation, error) {
	began := time.Now()
	var v Validation
	p.mu.Lock()
	p.validations++
	run := p.validations
	p.mu.Unlock()
	replace := 0 // dead, or too old
	for {
		if err := ctx.Err(); err != nil {
			return v, fmt.Errorf("dbpool: validate: %w", context.Cause(ctx))
		}
		m, err := p.nextToValidate(run)
		if err != nil {
			return v, fmt.Errorf("dbpool: validate: %w", err)
		}
		if m == nil {
			break
		}
		v.Checked++
		if now := time.Now(); m.expired(now) && p.mayRecycle(now) {
			replace++
			p.dispose(m, closedRecycled)
			continue
		}
		h := m.ping()
		if h == alive {
			p.bringBack(m)
			continue
		}
		replace++
		p.dispose(m, closedBroken)
		if h == silent {
			suspects := p.setSuspectsAside()
			for _, m := range suspects {
				if m.validated < run {
					m.validated = run
					v.Checked++
				}
			}
			replace += p.ask(suspects)
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

// nextToValidate sets aside the idle connection that this validation has not
// looked at and that was idle longest; nil if there is none.
func (p *Pool) nextToValidate(run uint64) (*member, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return nil, ErrClosed
	}
	for i, m := range p.idle {
		if m.validated < run {
			m.validated = run
			return p.setAside(i), nil
		}
	}
	return nil, nil
}
