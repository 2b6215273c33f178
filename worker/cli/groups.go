package cli

import (
	"context"
	"fmt"
	"slices"
	"sync"

	"github.com/carpool-go/carpool/tasks"
)

// startGroups calls Start(ctx) error of the groups that have it, in their order, and
// returns a function that calls Stop() of the groups that have it, in reverse order.
// When one fails to start, the groups before it are stopped, and the error names it by
// its type. stop may be called twice.
func startGroups(ctx context.Context, groups []tasks.Group) (stop func(), err error) {
	var stops []func()
	stop = sync.OnceFunc(func() {
		for _, stop := range slices.Backward(stops) {
			stop()
		}
	})
	for _, group := range groups {
		if g, ok := group.(interface{ Start(context.Context) error }); ok {
			if err := g.Start(ctx); err != nil {
				stop()
				return nil, fmt.Errorf("start %T: %w", group, err)
			}
		}
		if g, ok := group.(interface{ Stop() }); ok {
			stops = append(stops, g.Stop)
		}
	}
	return stop, nil
}
