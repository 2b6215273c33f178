package outbound

import (
	"context"
	"net/http"
)

// guardKey is the key of a context's [Guard].
type guardKey struct{}

// NewContext returns a context that carries g to [Client]; a nil g allows public addresses
// only. A worker gives such a context to every job.
func NewContext(ctx context.Context, g *Guard) context.Context {
	return context.WithValue(ctx, guardKey{}, g)
}

// Client returns an HTTP client for a handler, of the caller's own, that calls what
// the worker of the job allows: ctx is the one that the handler was given. From any
// other context it calls public addresses only. [Guard.Client] says what else it
// does, and [Reason] why a request failed, in words that show no secret.
func Client(ctx context.Context) *http.Client {
	g, _ := ctx.Value(guardKey{}).(*Guard)
	return g.Client()
}
