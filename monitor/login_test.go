package monitor

import (
	"bufio"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/carpool-go/carpool/internal/testservers"
)

func TestLogins_WrongOnesAreAnsweredLaterAndLaterByAddress(t *testing.T) {
	t.Parallel()
	l := newLogins("carpool", "open sesame", slog.New(slog.DiscardHandler))
	var delays []time.Duration
	for range 8 {
		delays = append(delays, l.note("192.0.2.1"))
	}
	for i, want := range []time.Duration{100, 200, 400, 800, 1000, 1000, 1000, 1000} {
		if want *= time.Millisecond; delays[i] != want {
			t.Errorf("wrong login %d is answered after %s, want %s", i+1, delays[i], want)
		}
	}
	if delay := l.note("192.0.2.2"); delay != firstDelay {
		t.Errorf("another address waits for %s", delay)
	}
	l.failed["192.0.2.1"] = failures{8, time.Now().Add(-forgetAfter - time.Second)}
	if delay := l.note("192.0.2.1"); delay != firstDelay {
		t.Errorf("what was long ago counts: %s", delay)
	}
}

func TestLogins_AreRememberedOfABoundedNumberOfAddresses(t *testing.T) {
	t.Parallel()
	l := newLogins("carpool", "open sesame", slog.New(slog.DiscardHandler))
	for i := range 2*maxAddresses + 1 {
		l.note(fmt.Sprint(i))
	}
	if len(l.failed) > maxAddresses {
		t.Errorf("%d addresses are remembered", len(l.failed))
	}
}

func TestMonitor_WrongLoginsAreLoggedWithoutThePasswordAndTheRightOneIsNeverKeptOut(t *testing.T) {
	t.Parallel()
	log := new(testservers.Log)
	at := serve(t, Config{Password: "open sesame", Logger: slog.New(slog.NewJSONHandler(log, nil))})
	var wrong sync.WaitGroup
	for range 20 {
		wrong.Go(func() {
			if code, _ := ask(t, "GET", at+"/api/queues", func(r *http.Request) { r.SetBasicAuth("carpool", "s3cr3t") }); code != http.StatusUnauthorized {
				t.Errorf("a wrong password is answered with %d", code)
			}
		})
	}
	for range 20 {
		if code, _ := ask(t, "GET", at+"/api/queues", func(r *http.Request) { r.SetBasicAuth("carpool", "open sesame") }); code != http.StatusOK {
			t.Errorf("the right password is answered with %d", code)
		}
	}
	wrong.Wait()
	if got := log.String(); strings.Count(got, "wrong user or password") != 1 || !strings.Contains(got, `"address":"127.0.0.1"`) || strings.Contains(got, "s3cr3t") {
		t.Errorf("the log has\n%s", got)
	}
}

// Whoever has no login can't hold a connection with a body that never comes.
func TestMonitor_RequestWithoutALoginIsAnsweredBeforeItsBodyAndItsConnectionIsClosed(t *testing.T) {
	t.Parallel()
	at := serve(t, Config{Password: "open sesame"})
	for name, header := range map[string]string{
		"announced": "Content-Length: 1000\r\n",
		"chunked":   "Transfer-Encoding: chunked\r\n",
	} {
		conn, err := net.Dial("tcp", strings.TrimPrefix(at, "http://"))
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		_ = conn.SetDeadline(time.Now().Add(time.Minute))
		if _, err := fmt.Fprintf(conn, "POST /api/queues/default:pause HTTP/1.1\r\nHost: x\r\n%s\r\n", header); err != nil {
			t.Fatal(err)
		}
		r := bufio.NewReader(conn)
		answer, err := http.ReadResponse(r, nil)
		if err != nil || answer.StatusCode != http.StatusUnauthorized {
			t.Fatalf("%s: %+v, error %v; want 401", name, answer, err)
		}
		if _, err := io.Copy(io.Discard, answer.Body); err != nil {
			t.Fatal(err)
		}
		if _, err := r.ReadByte(); err == nil || strings.Contains(err.Error(), "timeout") {
			t.Errorf("%s: the connection is still open: %v", name, err)
		}
	}
}

// Whoever opens connections and says nothing doesn't keep the others out.
func TestNewServer_SilentConnectionsMakeRoomForThoseThatAsk(t *testing.T) {
	t.Parallel()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	server := NewServer(Config{Redis: open(t, testservers.Redis(t)), User: "carpool", Password: "open sesame"})
	served := make(chan error, 1)
	go func() { served <- server.Serve(listener) }()
	t.Cleanup(func() {
		_ = server.Close()
		<-served
	})
	var silent []net.Conn
	for range 3 * maxSilent {
		conn, err := net.Dial("tcp", listener.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		silent = append(silent, conn)
	}
	for range 5 {
		if code, _ := ask(t, "GET", "http://"+listener.Addr().String()+"/api/queues", func(r *http.Request) {
			r.SetBasicAuth("carpool", "open sesame")
			r.Close = true
		}); code != http.StatusOK {
			t.Errorf("the right login is answered with %d", code)
		}
	}
	_ = silent[0].SetDeadline(time.Now().Add(time.Minute))
	if _, err := silent[0].Read(make([]byte, 1)); err == nil || strings.Contains(err.Error(), "timeout") {
		t.Errorf("the oldest silent connection is still open: %v", err)
	}
}

// A platform has no login, and is told nothing but that the monitor serves.
func TestHealth_NeedsNoLoginAndSaysNothing(t *testing.T) {
	t.Parallel()
	for name, cfg := range map[string]Config{
		"with a login":    {Password: "open sesame"},
		"without a login": {},
		"without Redis":   {Password: "open sesame", Redis: open(t, "redis://127.0.0.1:1")},
	} {
		at := serve(t, cfg)
		another := func(r *http.Request) { r.Host = "carpool.onrender.com" } // a platform's own name
		if code, body := ask(t, "GET", at+HealthPath, another); code != http.StatusOK || body != "ok\n" {
			t.Errorf("%s: %d, %q", name, code, body)
		}
		if code, body := ask(t, "HEAD", at+HealthPath, another); code != http.StatusOK || body != "" {
			t.Errorf("%s, HEAD: %d, %q", name, code, body)
		}
		if code, _ := ask(t, "POST", at+HealthPath, another); code != http.StatusMethodNotAllowed {
			t.Errorf("%s, POST: %d", name, code)
		}
		for _, path := range []string{HealthPath + "/", HealthPath + "/../api/queues", "//healthz", "/api/queues"} {
			if code, body := ask(t, "GET", at+path, another); code < 400 || body == "ok\n" {
				t.Errorf("%s: %s is answered with %d, %q", name, path, code, body)
			}
		}
	}
}
