package monitor

import (
	"crypto/sha256"
	"crypto/subtle"
	"log/slog"
	"net/http"
	"sync"
	"time"

	"github.com/carpool-go/carpool/internal/wait"
)

// logins admits requests with the right user and password, at once and always. A wrong one
// is answered late, the later the more of them have come from its address, because a
// password can be guessed by asking often.
type logins struct {
	user, password [sha256.Size]byte
	log            *slog.Logger

	mu     sync.Mutex
	failed map[string]failures // by address
}

// failures are the wrong logins of one address.
type failures struct {
	n    int
	last time.Time
}

const (
	// firstDelay is how late the first wrong login is answered; each further one is
	// answered twice as late, up to maxDelay.
	firstDelay = 100 * time.Millisecond
	maxDelay   = time.Second
	// forgetAfter is how long an address's wrong logins are remembered after the last.
	forgetAfter = 10 * time.Minute
	// maxAddresses bounds of how many addresses they are.
	maxAddresses = 10_000
	// logEvery is of how many wrong logins of an address one is logged, after the first.
	logEvery = 100
)

func newLogins(user, password string, log *slog.Logger) *logins {
	return &logins{
		user: sha256.Sum256([]byte(user)), password: sha256.Sum256([]byte(password)),
		log: log, failed: make(map[string]failures),
	}
}

// admits compares in constant time, lengths included.
func (l *logins) admits(r *http.Request) bool {
	user, password, _ := r.BasicAuth()
	u, p := sha256.Sum256([]byte(user)), sha256.Sum256([]byte(password))
	return subtle.ConstantTimeCompare(u[:], l.user[:])&subtle.ConstantTimeCompare(p[:], l.password[:]) == 1
}

// refuse answers a request without the right login. It leaves the request's body unread,
// since nobody has to send it, and closes the connection.
func (l *logins) refuse(w http.ResponseWriter, r *http.Request) {
	if _, _, tried := r.BasicAuth(); tried { // a browser asks without a login first
		delay := l.note(addressOf(r))
		if wait.For(r.Context(), delay) != nil {
			return
		}
	}
	h := w.Header()
	h.Set("WWW-Authenticate", `Basic realm="carpool", charset="UTF-8"`)
	h.Set("Connection", "close")
	http.Error(w, "a login is needed", http.StatusUnauthorized)
	// The server would wait for the body when this has returned.
	_ = http.NewResponseController(w).SetReadDeadline(time.Now())
}

// note counts a wrong login, logs it, and returns how late it is to be answered.
func (l *logins) note(address string) (delay time.Duration) {
	l.mu.Lock()
	defer l.mu.Unlock()
	now := time.Now()
	if len(l.failed) >= maxAddresses {
		clear(l.failed)
	}
	f := l.failed[address]
	if now.Sub(f.last) > forgetAfter {
		f = failures{}
	}
	if f.n%logEvery == 0 {
		l.log.Warn("a login with a wrong user or password", "address", address, "before", f.n)
	}
	delay = min(maxDelay, firstDelay<<min(f.n, 10))
	l.failed[address] = failures{f.n + 1, now}
	return delay
}

// addressOf is the address that a request comes from. What headers say of it is the
// sender's to choose.
func addressOf(r *http.Request) string {
	return hostOf(r.RemoteAddr)
}

// orDiscard is the log of a monitor, also of one without a log.
func orDiscard(log *slog.Logger) *slog.Logger {
	if log == nil {
		return slog.New(slog.DiscardHandler)
	}
	return log
}
