// Package health tells over HTTP whether a worker is well, to platforms and to people.
package health

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"mime"
	"net"
	"net/http"
	"strings"
	"sync"
	"time"

	"github.com/carpool-go/carpool/internal/httplimit"
)

// The paths that a [Server] answers.
const (
	LivePath  = "/livez"
	ReadyPath = "/readyz"
)

// Check is one thing that a worker can't do without.
type Check struct {
	// Name is how it is shown: a word.
	Name string
	// Ask returns "" if all is well. Else it returns what everybody may read, without a
	// name or an address, and what is logged, which may be nil. It returns soon after ctx
	// ends.
	Ask func(ctx context.Context) (fault string, err error)
}

// Report is what a [Server] answers.
type Report struct {
	OK bool `json:"ok"`
	// Message is the answer in words.
	Message string `json:"message"`
	// Checks are what was asked for it; none while the worker starts or stops.
	Checks []Result `json:"checks,omitempty"`
}

// Result is the answer of one [Check].
type Result struct {
	Name    string `json:"name"`
	OK      bool   `json:"ok"`
	Message string `json:"message"`
}

// String is the report in words, a line for each check.
func (r Report) String() string {
	lines := []string{r.Message}
	for _, c := range r.Checks {
		lines = append(lines, c.Name+": "+c.Message)
	}
	return strings.Join(lines, "\n") + "\n"
}

// Server answers at [LivePath] with 200 as long as it can, and at [ReadyPath] with 200 if
// all checks pass, and else with 503. While the worker starts, it is alive and not ready.
//
// Its checks are made when it is asked, once a second at most however often that is.
type Server struct {
	http     *http.Server
	listener net.Listener
	log      *slog.Logger
	ctx      context.Context // of the checks
	cancel   context.CancelFunc
	serving  sync.WaitGroup

	mu       sync.Mutex // guards the rest
	notReady string     // why the checks are not made; "" once they are
	checks   []Check

	asking  sync.Mutex // is held while checks are made; guards the rest
	last    Report
	lastAt  time.Time
	unready bool // that was logged
}

const (
	// checkTimeout bounds the checks, which are made side by side.
	checkTimeout = 2 * time.Second
	// keepFor is how long a report is given to who asks next.
	keepFor = time.Second
	// maxConnections is how many are open at once. An answer takes little longer than
	// checkTimeout, and who asks are few.
	maxConnections = 50
	// requestTime is how long a request may take to arrive, and answerTime how long it may
	// take in all.
	requestTime = 2 * time.Second
	answerTime  = 10 * time.Second
)

// Listen serves at an address, host:port, until [Server.Close].
func Listen(address string, log *slog.Logger) (*Server, error) {
	listener, err := net.Listen("tcp", address)
	if err != nil {
		return nil, err
	}
	s := &Server{listener: listener, log: log, notReady: "it starts"}
	s.ctx, s.cancel = context.WithCancel(context.Background())
	mux := http.NewServeMux()
	mux.HandleFunc("GET "+LivePath, func(w http.ResponseWriter, r *http.Request) {
		answer(w, r, Report{OK: true, Message: "alive"})
	})
	mux.HandleFunc("GET "+ReadyPath, func(w http.ResponseWriter, r *http.Request) {
		answer(w, r, s.report())
	})
	s.http = &http.Server{
		Handler:           mux,
		ReadHeaderTimeout: requestTime,
		ReadTimeout:       requestTime,
		WriteTimeout:      answerTime,
		MaxHeaderBytes:    8 << 10,
		ConnState:         (&httplimit.Connections{Most: maxConnections, AtWork: true}).Note,
		ErrorLog:          slog.NewLogLogger(log.Handler(), slog.LevelDebug),
	}
	s.http.SetKeepAlivesEnabled(false)
	s.serving.Go(func() {
		if err := s.http.Serve(listener); !errors.Is(err, http.ErrServerClosed) {
			log.Error("the worker's health is not served any more", "error", err)
		}
	})
	return s, nil
}

// Addr is where it listens.
func (s *Server) Addr() string { return s.listener.Addr().String() }

// NotReady has the worker not ready for a reason, such as "it starts", until
// [Server.Ready].
func (s *Server) NotReady(why string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.notReady = why
}

// Ready has the worker ready as long as the checks pass.
func (s *Server) Ready(checks ...Check) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.notReady, s.checks = "", checks
}

// Close ends the server and what it does. It may be called twice.
func (s *Server) Close() {
	s.cancel() // checks end, and are answered
	ctx, cancel := context.WithTimeout(context.Background(), keepFor)
	defer cancel()
	if s.http.Shutdown(ctx) != nil {
		_ = s.http.Close()
	}
	s.serving.Wait()
}

// report is whether the worker is ready.
func (s *Server) report() Report {
	s.asking.Lock()
	defer s.asking.Unlock()
	s.mu.Lock()
	notReady, checks := s.notReady, s.checks
	s.mu.Unlock()
	if notReady != "" {
		return Report{Message: "not ready: " + notReady}
	}
	if time.Since(s.lastAt) >= keepFor {
		s.last = s.ask(checks)
		s.lastAt = time.Now()
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.notReady != "" { // it has begun to stop meanwhile
		return Report{Message: "not ready: " + s.notReady}
	}
	return s.last
}

// ask makes the checks, and logs that the worker has ceased to be ready, or is again.
func (s *Server) ask(checks []Check) Report {
	ctx, cancel := context.WithTimeoutCause(s.ctx, checkTimeout, fmt.Errorf("no answer within %s", checkTimeout))
	defer cancel()
	report := Report{OK: true, Message: "ready", Checks: make([]Result, len(checks))}
	errs := make([]error, len(checks))
	var asked sync.WaitGroup
	for i, c := range checks {
		asked.Go(func() {
			fault, err := c.Ask(ctx)
			report.Checks[i] = Result{c.Name, fault == "", cmp.Or(fault, "ok")}
			errs[i] = err
		})
	}
	asked.Wait()
	var attrs []any
	for i, c := range report.Checks {
		if c.OK {
			continue
		}
		report.OK, report.Message = false, "not ready"
		why := c.Message
		if errs[i] != nil {
			why += ": " + errs[i].Error()
		}
		attrs = append(attrs, c.Name, why)
	}
	switch {
	case s.ctx.Err() != nil: // it says nothing of the worker
	case !report.OK && !s.unready:
		s.unready = true
		s.log.Warn("the worker is not ready", attrs...)
	case report.OK && s.unready:
		s.unready = false
		s.log.Info("the worker is ready again")
	}
	return report
}

// answer writes a report: in words, or as JSON where the request says ?format=json, or
// accepts application/json.
func answer(w http.ResponseWriter, r *http.Request, report Report) {
	h := w.Header()
	h.Set("Cache-Control", "no-store")
	h.Set("X-Content-Type-Options", "nosniff")
	asJSON := accepts(r, "application/json")
	switch r.FormValue("format") {
	case "":
	case "json":
		asJSON = true
	case "text":
		asJSON = false
	default:
		http.Error(w, "format is json or text", http.StatusBadRequest)
		return
	}
	status := http.StatusOK
	if !report.OK {
		status = http.StatusServiceUnavailable
	}
	text := report.String()
	h.Set("Content-Type", "text/plain; charset=utf-8")
	if asJSON {
		h.Set("Content-Type", "application/json")
		data, _ := json.Marshal(report) // it has nothing that can't be written
		text = string(data) + "\n"
	}
	w.WriteHeader(status)
	_, _ = io.WriteString(w, text)
}

// accepts reports whether a request names a type among those that it accepts.
func accepts(r *http.Request, mediaType string) bool {
	for _, list := range r.Header.Values("Accept") {
		for part := range strings.SplitSeq(list, ",") {
			if named, _, err := mime.ParseMediaType(part); err == nil && named == mediaType {
				return true
			}
		}
	}
	return false
}
