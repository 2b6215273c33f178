package delivery

import (
	"maps"
	"math/rand/v2"
	"slices"

	"github.com/carpool-go/carpool/internal/asynqwire"
)

// wheel shares slots among queues by their weights. Each draw goes to the queue that is
// furthest behind its share, which is the smooth weighted round robin of nginx: over as
// many draws as all weights together each queue has exactly its weight.
type wheel struct {
	queues  []string
	weights []int
	behind  []int
	total   int
}

func newWheel(weights map[string]int) *wheel {
	w := &wheel{queues: slices.Sorted(maps.Keys(weights))}
	for _, queue := range w.queues {
		w.weights = append(w.weights, weights[queue])
		w.total += weights[queue]
	}
	w.behind = make([]int, len(w.queues))
	return w
}

// shares draws a queue for each of so many slots. The queues are in a random order in which
// the heavier ones tend to come first: so those share what another one can't use.
func (w *wheel) shares(slots int) []asynqwire.Share {
	jobs := make([]int, len(w.queues))
	for range slots {
		most := 0
		for i := range w.queues {
			w.behind[i] += w.weights[i]
			if w.behind[i] > w.behind[most] {
				most = i
			}
		}
		w.behind[most] -= w.total
		jobs[most]++
	}
	shares := make([]asynqwire.Share, 0, len(w.queues))
	for _, i := range w.order() {
		shares = append(shares, asynqwire.Share{Queue: w.queues[i], Jobs: jobs[i]})
	}
	return shares
}

func (w *wheel) order() []int {
	left := make([]int, len(w.queues))
	for i := range left {
		left[i] = i
	}
	order := make([]int, 0, len(left))
	for total := w.total; len(left) > 1; {
		at, n := 0, rand.N(total)
		for n >= w.weights[left[at]] {
			n -= w.weights[left[at]]
			at++
		}
		total -= w.weights[left[at]]
		order = append(order, left[at])
		left = slices.Delete(left, at, at+1)
	}
	return append(order, left...)
}
