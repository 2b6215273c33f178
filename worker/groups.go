package worker

import (
	"context"
	"fmt"
	"slices"

	"github.com/carpool-go/carpool/tasks"
)

// groups are the groups of tasks as a part: those that have the methods
// Start(context.Context) error or Stop() have them called around the run.
type groups struct {
	ctx     context.Context // of the run
	list    []tasks.Group
	started []tasks.Group
}

func newGroups(ctx context.Context, list []tasks.Group) *groups {
	return &groups{ctx: ctx, list: list}
}

// Start starts the groups in their order. When one fails, the groups before it are
// stopped, and the error names it by its type.
func (g *groups) Start() error {
	for _, group := range g.list {
		if s, ok := group.(interface{ Start(context.Context) error }); ok {
			if err := s.Start(g.ctx); err != nil {
				g.Stop()
				return fmt.Errorf("start %T: %w", group, err)
			}
		}
		g.started = append(g.started, group)
	}
	return nil
}

// Stop stops in reverse order those that were started, and those that have nothing to
// start.
func (g *groups) Stop() {
	for _, group := range slices.Backward(g.started) {
		if s, ok := group.(interface{ Stop() }); ok {
			s.Stop()
		}
	}
	g.started = nil
}
