// Package wait is a sleep that a context can end.
package wait

import (
	"context"
	"time"
)

// For waits for d and returns nil; if ctx ends first, or has ended already, it
// returns the context's cause at once.
func For(ctx context.Context, d time.Duration) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-timer.C:
		return nil
	}
}
