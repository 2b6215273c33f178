package outbound

import (
	"context"
	"crypto/tls"
	"errors"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"
)

// sends answers each connection with text, whatever it is asked, then closes it.
func sends(t *testing.T, text string) (address string) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			_, _ = conn.Read(make([]byte, 4096))
			_, _ = conn.Write([]byte(text))
			_ = conn.Close()
		}
	}()
	t.Cleanup(func() { _ = l.Close(); <-done })
	return l.Addr().String()
}

func TestReason_SaysWhyWithoutTheURLOrWhatTheServerSent(t *testing.T) {
	t.Parallel()
	gone := httptest.NewServer(nil)
	gone.Close()
	secure := httptest.NewUnstartedServer(nil)
	secure.Config.ErrorLog = discardLog()
	secure.StartTLS()
	t.Cleanup(secure.Close)
	g := guard(t, "127.0.0.1")
	for url, want := range map[string]string{
		gone.URL:   "connection refused",
		secure.URL: "tls: failed to verify certificate",
		"https://" + sends(t, "HTTP/1.1 400 s3cret\r\n\r\n"):                           "server gave HTTP response to HTTPS client",
		"https://" + sends(t, "SSH-2.0-s3cret\r\n"):                                    "tls: first record does not look like a TLS handshake",
		"http://" + sends(t, ""):                                                       "the server closed the connection before it had answered",
		"http://" + sends(t, "HTTP/1.1 200 OK\r\nSome: "):                              "the server closed the connection before it had answered",
		"http://" + sends(t, "POST /s3cret?s3cret s3cret\r\n\r\n"):                     "the server's answer is not valid HTTP",
		"http://" + sends(t, "HTTP/1.1 s3cret\r\n\r\n"):                                "the server's answer is not valid HTTP",
		"http://" + sends(t, "HTTP/1.1 200 OK\r\ns3cret\r\n\r\n"):                      "the server's answer is not valid HTTP",
		"http://" + sends(t, "HTTP/1.1 200 OK\r\nContent-Length: s3cret\r\n\r\n"):      "the server's answer is not valid HTTP",
		"http://" + sends(t, "HTTP/1.1 200 OK\r\nTransfer-Encoding: s3cret\r\n\r\n"):   "the server's answer is not valid HTTP",
		"http://" + sends(t, "HTTP/1.1 302 Found\r\nLocation: http://[s3cret\r\n\r\n"): "a redirect leads to a URL that can't be read",
		"http://10.0.0.1": "outbound: 10.0.0.1 is a private address",
	} {
		_, err := get(g, strings.Replace(url, "://", "://user:s3cret@", 1)+"/s3cret?token=s3cret")
		if err == nil {
			t.Errorf("%s: no error", url)
			continue
		}
		reason := Reason(err)
		if !strings.Contains(reason.Error(), want) {
			t.Errorf("%s: reason %q, want %q", url, reason, want)
		}
		if strings.Contains(reason.Error(), "s3cret") {
			t.Errorf("%s: reason %q shows what may be secret", url, reason)
		}
		if wantBlocked := strings.Contains(want, "redirect") || strings.Contains(want, "private"); isBlocked(reason) != wantBlocked {
			t.Errorf("%s: %#v, blocked should be %t", url, reason, wantBlocked)
		}
	}
}

func TestReason_OfTheContextsEnd(t *testing.T) {
	t.Parallel()
	s := server(t, func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() })
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, s.URL, nil)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := guard(t, "127.0.0.1").Client().Do(req)
	if err == nil {
		resp.Body.Close()
	}
	if !errors.Is(Reason(err), context.DeadlineExceeded) {
		t.Error(err)
	}
}

func TestReason_OfATLSHandshakeThatFails(t *testing.T) {
	t.Parallel()
	secure := httptest.NewUnstartedServer(nil)
	secure.TLS = &tls.Config{ClientAuth: tls.RequireAnyClientCert}
	secure.Config.ErrorLog = discardLog()
	secure.StartTLS()
	t.Cleanup(secure.Close)
	client := guard(t, "127.0.0.1").Client()
	client.Transport.(*http.Transport).TLSClientConfig = secure.Client().Transport.(*http.Transport).TLSClientConfig
	resp, err := client.Get(secure.URL)
	if err == nil {
		resp.Body.Close()
	}
	if err == nil || !strings.Contains(Reason(err).Error(), "certificate required") {
		t.Error(err)
	}
}
