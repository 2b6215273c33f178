// Package httplimit bounds the connections of an HTTP server, so that nobody starves it by
// opening many.
package httplimit

import (
	"container/list"
	"net"
	"net/http"
	"sync"
)

// Connections closes the connection that has been open longest when there are too many.
// Closing the oldest keeps the server open for those who come, which refusing the newest
// would not. Its method Note is a server's ConnState.
type Connections struct {
	// Most is how many may be open.
	Most int
	// AtWork counts those too that have sent the beginning of a request. Else only those
	// count that have sent nothing, or are between two requests.
	AtWork bool

	mu    sync.Mutex
	order list.List // the oldest first
	at    map[net.Conn]*list.Element
}

// Note is called with each change of a connection's state.
func (c *Connections) Note(conn net.Conn, state http.ConnState) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if state == http.StateActive && c.AtWork {
		return
	}
	if e := c.at[conn]; e != nil {
		c.order.Remove(e)
		delete(c.at, conn)
	}
	if state != http.StateNew && state != http.StateIdle {
		return
	}
	if c.at == nil {
		c.at = make(map[net.Conn]*list.Element)
	}
	c.at[conn] = c.order.PushBack(conn)
	if c.order.Len() > c.Most {
		oldest := c.order.Remove(c.order.Front()).(net.Conn)
		delete(c.at, oldest)
		_ = oldest.Close() // its own goroutine finds out
	}
}
