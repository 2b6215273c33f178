package delivery

import "sync"

// hands are the goroutines that jobs run in. They are used again, because a new one for
// each job has to grow its stack anew; a handler that ends its goroutine ends its hand.
type hands struct {
	mu     sync.Mutex
	idle   []chan func()
	closed bool
	open   sync.WaitGroup
}

// do runs work in a hand and waits for its end, also if that is the hand's.
func (h *hands) do(work func()) {
	ended := make(chan struct{})
	h.take() <- func() {
		defer close(ended)
		work()
	}
	<-ended
}

// take returns an idle hand, or a new one.
func (h *hands) take() chan func() {
	h.mu.Lock()
	defer h.mu.Unlock()
	if n := len(h.idle); n > 0 {
		hand := h.idle[n-1]
		h.idle = h.idle[:n-1]
		return hand
	}
	hand := make(chan func(), 1)
	h.open.Go(func() {
		for work := range hand {
			work()
			if !h.put(hand) {
				return
			}
		}
	})
	return hand
}

// put makes a hand idle; false if it isn't needed any more.
func (h *hands) put(hand chan func()) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	if !h.closed {
		h.idle = append(h.idle, hand)
	}
	return !h.closed
}

// close ends the hands that are idle, now or later.
func (h *hands) close() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.closed = true
	for _, hand := range h.idle {
		close(hand)
	}
	h.idle = nil
}
