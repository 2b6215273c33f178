package health

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

func listen(t *testing.T, log io.Writer) *Server {
	t.Helper()
	s, err := Listen("127.0.0.1:0", slog.New(slog.NewJSONHandler(log, nil)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	return s
}

func ask(t *testing.T, method, url, accept string) (code int, contentType, body string) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), method, url, nil)
	if err != nil {
		t.Fatal(err)
	}
	if accept != "" {
		req.Header.Set("Accept", accept)
	}
	resp, err := (&http.Transport{DisableKeepAlives: true}).RoundTrip(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	data, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, resp.Header.Get("Content-Type"), string(data)
}

func TestServer_AnswersInWordsAndAsJSON(t *testing.T) {
	t.Parallel()
	s := listen(t, io.Discard)
	url := "http://" + s.Addr()
	const text, asJSON = "text/plain; charset=utf-8", "application/json"
	s.Ready(Check{"redis", func(context.Context) (string, error) { return "", nil }})
	for name, c := range map[string]struct {
		method, path, accept string
		code                 int
		contentType, body    string
	}{
		"words":                 {"GET", "/readyz", "", 200, text, "ready\nredis: ok\n"},
		"words for curl":        {"GET", "/readyz", "*/*", 200, text, "ready\nredis: ok\n"},
		"words for a browser":   {"GET", "/readyz", "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8", 200, text, "ready\nredis: ok\n"},
		"JSON by a parameter":   {"GET", "/readyz?format=json", "", 200, asJSON, `{"ok":true,"message":"ready","checks":[{"name":"redis","ok":true,"message":"ok"}]}` + "\n"},
		"JSON by Accept":        {"GET", "/livez", "text/html, application/json;q=0.9", 200, asJSON, `{"ok":true,"message":"alive"}` + "\n"},
		"a parameter wins":      {"GET", "/livez?format=text", asJSON, 200, text, "alive\n"},
		"another format":        {"GET", "/livez?format=xml", "", 400, text, "format is json or text\n"},
		"no body for HEAD":      {"HEAD", "/readyz", "", 200, text, ""},
		"nothing else":          {"GET", "/", "", 404, text, "404 page not found\n"},
		"nothing can be posted": {"POST", "/readyz", "", 405, text, "Method Not Allowed\n"},
	} {
		code, contentType, body := ask(t, c.method, url+c.path, c.accept)
		if code != c.code || contentType != c.contentType || body != c.body {
			t.Errorf("%s: %d, %s, %q", name, code, contentType, body)
		}
	}
}

// What a check's error says may name servers; it is for the log, once.
func TestServer_ShowsTheFaultAndLogsTheErrorOnce(t *testing.T) {
	t.Parallel()
	var log strings.Builder
	s := listen(t, &log)
	var down atomic.Bool
	down.Store(true)
	s.Ready(Check{"redis", func(context.Context) (string, error) {
		if down.Load() {
			return "it does not answer", errors.New("dial tcp 10.1.2.3:6379")
		}
		return "", nil
	}})
	for range 2 {
		code, _, body := ask(t, "GET", "http://"+s.Addr()+"/readyz", "")
		if code != 503 || body != "not ready\nredis: it does not answer\n" {
			t.Errorf("%d, %q", code, body)
		}
		s.asking.Lock()
		s.lastAt = time.Time{}
		s.asking.Unlock()
	}
	down.Store(false)
	if code, _, body := ask(t, "GET", "http://"+s.Addr()+"/readyz", ""); code != 200 {
		t.Errorf("%d, %q", code, body)
	}
	s.Close()
	if strings.Count(log.String(), `"redis":"it does not answer: dial tcp 10.1.2.3:6379"`) != 1 || strings.Count(log.String(), "is ready again") != 1 {
		t.Errorf("it logs\n%s", &log)
	}
}

func TestServer_ManyWhoAskMakeOneCheckASecond(t *testing.T) {
	t.Parallel()
	s := listen(t, io.Discard)
	var checks atomic.Int32
	s.Ready(Check{"redis", func(context.Context) (string, error) {
		checks.Add(1)
		return "", nil
	}})
	began := time.Now()
	var asking sync.WaitGroup
	for range 30 {
		asking.Go(func() { ask(t, "GET", "http://"+s.Addr()+"/readyz", "") })
	}
	asking.Wait()
	if most := int32(1 + time.Since(began)/keepFor); checks.Load() > most {
		t.Errorf("%d checks, want %d at most", checks.Load(), most)
	}
}

func TestServer_ACheckThatDoesNotAnswerIsGivenUp(t *testing.T) {
	t.Parallel()
	s := listen(t, io.Discard)
	asked := make(chan struct{}, 1)
	s.Ready(Check{"database", func(ctx context.Context) (string, error) {
		asked <- struct{}{}
		<-ctx.Done()
		return "it does not answer", context.Cause(ctx)
	}})
	if code, _, body := ask(t, "GET", "http://"+s.Addr()+"/readyz", ""); code != 503 || !strings.Contains(body, "database: it does not answer") {
		t.Errorf("%d, %s", code, body)
	}
	<-asked

	// The end of the server is the end of a check too.
	time.Sleep(keepFor)
	conn, err := net.Dial("tcp", s.Addr())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	_, _ = io.WriteString(conn, "GET /readyz HTTP/1.0\r\n\r\n")
	<-asked
	began := time.Now()
	s.Close()
	if took := time.Since(began); took >= checkTimeout {
		t.Errorf("Close took %s", took)
	}
}

// Whoever opens connections and says nothing, or half of it, doesn't keep the others out.
func TestServer_ConnectionsThatStandStillMakeRoom(t *testing.T) {
	t.Parallel()
	for name, said := range map[string]string{"nothing": "", "half": "GET /livez HTTP/1.1\r\nHost: "} {
		s := listen(t, io.Discard)
		var oldest net.Conn
		for i := range 3 * maxConnections {
			conn, err := net.Dial("tcp", s.Addr())
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			if i == 0 {
				oldest = conn
			}
			_, _ = io.WriteString(conn, said)
		}
		if code, _, _ := ask(t, "GET", "http://"+s.Addr()+"/livez", ""); code != 200 {
			t.Errorf("%s: %d", name, code)
		}
		_ = oldest.SetDeadline(time.Now().Add(time.Minute))
		if _, err := io.ReadAll(oldest); errors.Is(err, context.DeadlineExceeded) || err != nil && strings.Contains(err.Error(), "timeout") {
			t.Errorf("%s: the oldest is still open: %v", name, err)
		}
	}
}
