package monitor

import (
	"container/list"
	"log/slog"
	"net"
	"net/http"
	"sync"
	"time"
)

// NewServer returns a server of the monitor that nobody without a login can starve: each
// phase of a request has its time, and of the connections that ask for nothing the oldest
// goes when there are too many.
func NewServer(c Config) *http.Server {
	return &http.Server{
		Handler:           New(c),
		ReadHeaderTimeout: 10 * time.Second,
		ReadTimeout:       30 * time.Second,
		WriteTimeout:      time.Minute,
		IdleTimeout:       2 * time.Minute,
		ConnState:         (&silent{most: maxSilent}).note,
		ErrorLog:          slog.NewLogLogger(orDiscard(c.Logger).Handler(), slog.LevelWarn),
	}
}

// maxSilent is how many connections may be open that have not sent a request's header, or
// are between two requests. A browser has six.
const maxSilent = 100

// silent are the connections that are open and ask for nothing, the oldest first.
type silent struct {
	most int

	mu    sync.Mutex
	order list.List
	at    map[net.Conn]*list.Element
}

// note is called with each change of a connection's state.
func (s *silent) note(conn net.Conn, state http.ConnState) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if e := s.at[conn]; e != nil {
		s.order.Remove(e)
		delete(s.at, conn)
	}
	if state != http.StateNew && state != http.StateIdle {
		return
	}
	if s.at == nil {
		s.at = make(map[net.Conn]*list.Element)
	}
	s.at[conn] = s.order.PushBack(conn)
	if s.order.Len() > s.most {
		oldest := s.order.Remove(s.order.Front()).(net.Conn)
		delete(s.at, oldest)
		_ = oldest.Close() // its own goroutine finds out
	}
}
