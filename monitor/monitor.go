// Package monitor shows the queues to people: asynqmon behind a login, as an
// [http.Handler]. It is for programs that serve it themselves; a worker's own binary has
// it as the command monitor.
package monitor

import (
	"log/slog"
	"net"
	"net/http"

	"github.com/hibiken/asynqmon"
	"github.com/redis/go-redis/v9"

	"github.com/carpool-go/carpool/admin"
)

// Config says what the monitor shows, and to whom.
type Config struct {
	// Redis holds the queues; see tasks.OpenRedis. The caller closes it. Required.
	Redis redis.UniversalClient
	// User and Password are those of the login. With the Password "" there is no login, and
	// the pages are shown on this machine only, under its names and Host.
	User, Password string
	// Host is the name or address that the monitor listens on; "" is the machine's own.
	Host string
	// ReadOnly lets nobody change anything.
	ReadOnly bool
	// ShowPayloads shows the values in payloads and results. They may be personal or secret,
	// so by default only the names of the fields are shown.
	ShowPayloads bool
	// Logger takes wrong logins; nil drops them.
	Logger *slog.Logger
}

// New returns the monitor. What is done with jobs of the archive on its pages is
// [admin.Admin]'s to do, so that it is what the command line does; the rest is asynqmon's.
func New(c Config) http.Handler {
	options := asynqmon.Options{
		ReadOnly:         c.ReadOnly,
		PayloadFormatter: asynqmon.PayloadFormatterFunc(func(_ string, data []byte) string { return c.shown(data) }),
		ResultFormatter:  asynqmon.ResultFormatterFunc(func(_ string, data []byte) string { return c.shown(data) }),
	}
	pages := newPages(c.Redis, options)
	if !c.ReadOnly {
		pages = changeArchived(admin.New(c.Redis, nil), pages)
	}
	return protect(pages, c)
}

// shared lets asynqmon use the client we have. It asks for one twice.
type shared struct{ rdb redis.UniversalClient }

func (s shared) MakeRedisClient() any { return s.rdb }

// IsLoopback reports whether a name or address leads to this machine and can't be reached
// from another.
func IsLoopback(host string) bool {
	if host == "localhost" {
		return true
	}
	ip := net.ParseIP(host)
	return ip != nil && ip.IsLoopback()
}
