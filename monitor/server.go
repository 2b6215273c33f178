package monitor

import (
	"log/slog"
	"net/http"
	"time"

	"github.com/carpool-go/carpool/internal/httplimit"
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
		ConnState:         (&httplimit.Connections{Most: maxSilent}).Note,
		ErrorLog:          slog.NewLogLogger(orDiscard(c.Logger).Handler(), slog.LevelWarn),
	}
}

// maxSilent is how many connections may be open that have not sent a request's header, or
// are between two requests. A browser has six.
const maxSilent = 100
