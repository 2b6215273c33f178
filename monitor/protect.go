package monitor

import (
	"bytes"
	"encoding/json"
	"io"
	"net"
	"net/http"
	"time"
)

// protect puts in front of asynqmon, which has neither, a login and a guard
// against other web pages that the reader has open.
func protect(pages http.Handler, cfg Config) http.Handler {
	guarded := http.NewCrossOriginProtection().Handler(pages)
	logins := newLogins(cfg.User, cfg.Password, orDiscard(cfg.Logger))
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		h := w.Header()
		h.Set("X-Frame-Options", "DENY")
		h.Set("X-Content-Type-Options", "nosniff")
		h.Set("Referrer-Policy", "no-referrer")
		if r.URL.Path == HealthPath {
			sayHealthy(w, r)
			return
		}
		if cfg.Password == "" {
			// A page elsewhere can point its own name at this address, and read
			// what is answered. The browser then sends that name.
			if host := hostOf(r.Host); !IsLoopback(host) && host != cfg.Host {
				http.Error(w, "this name is not known here; open the address that the monitor listens on", http.StatusForbidden)
				return
			}
			// The name is the sender's to choose, the address isn't.
			if !IsLoopback(addressOf(r)) {
				http.Error(w, "without a login it is shown on its own machine only", http.StatusForbidden)
				return
			}
		} else if !logins.admits(r) {
			logins.refuse(w, r)
			return
		}
		guarded.ServeHTTP(w, r)
	})
}

// HealthPath is answered with "ok", and nothing more, to everybody: platforms ask it before
// they send requests, and have no login. It says that the monitor serves. That Redis is
// away it doesn't tell, because no restart of the monitor would mend that.
const HealthPath = "/healthz"

func sayHealthy(w http.ResponseWriter, r *http.Request) {
	h := w.Header()
	h.Set("Content-Type", "text/plain; charset=utf-8")
	h.Set("Cache-Control", "no-store")
	switch r.Method {
	case http.MethodGet, http.MethodHead:
		_, _ = io.WriteString(w, "ok\n")
	default:
		h.Set("Allow", "GET, HEAD")
		h.Set("Connection", "close") // the body is left unread
		w.WriteHeader(http.StatusMethodNotAllowed)
		_ = http.NewResponseController(w).SetReadDeadline(time.Now())
	}
}

func hostOf(hostPort string) string {
	if host, _, err := net.SplitHostPort(hostPort); err == nil {
		return host
	}
	return hostPort
}

// shown is a payload or result as the page shows it. Its values may be personal
// or secret, so by default only the names of the fields are shown.
func (c Config) shown(data []byte) string {
	if c.ShowPayloads || len(data) == 0 {
		return string(data)
	}
	dec := json.NewDecoder(bytes.NewReader(data))
	dec.UseNumber()
	var v any
	if err := dec.Decode(&v); err != nil {
		return "(hidden; it is not JSON)"
	}
	masked, err := json.Marshal(mask(v))
	if err != nil {
		return "(hidden)"
	}
	return string(masked)
}

// mask replaces every value by an ellipsis. The names of nested fields are kept
// out too: deep down they are data as often as not.
func mask(v any) any {
	fields, ok := v.(map[string]any)
	if !ok {
		return "…"
	}
	masked := make(map[string]string, len(fields))
	for name := range fields {
		masked[name] = "…"
	}
	return masked
}
