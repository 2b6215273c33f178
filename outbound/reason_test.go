package outbound

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
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
	return serve(t, l, func(conn net.Conn) {
		_, _ = conn.Read(make([]byte, 4096))
		_, _ = conn.Write([]byte(text))
	})
}

// serve has each connection served, then closes it.
func serve(t *testing.T, l net.Listener, one func(net.Conn)) (address string) {
	t.Helper()
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			one(conn)
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
	for address, want := range map[string]string{
		gone.URL:   "connection refused",
		secure.URL: "tls: failed to verify certificate",
		"https://" + sends(t, "HTTP/1.1 400 s3cret\r\n\r\n"):                                             "server gave HTTP response to HTTPS client",
		"https://" + sends(t, "SSH-2.0-s3cret\r\n"):                                                      "tls: first record does not look like a TLS handshake",
		"http://" + sends(t, ""):                                                                         "the server closed the connection before it had answered",
		"http://" + sends(t, "HTTP/1.1 200 OK\r\nSome: "):                                                "the server closed the connection before it had answered",
		"http://" + sends(t, "POST /s3cret?s3cret s3cret\r\n\r\n"):                                       "the server's answer is not valid HTTP",
		"http://" + sends(t, "HTTP/1.1 s3cret\r\n\r\n"):                                                  "the server's answer is not valid HTTP",
		"http://" + sends(t, "HTTP/1.1 200 OK\r\ns3cret\r\n\r\n"):                                        "the server's answer is not valid HTTP",
		"http://" + sends(t, "HTTP/1.1 200 OK\r\nContent-Length: s3cret\r\n\r\n"):                        "the server's answer is not valid HTTP",
		"http://" + sends(t, "HTTP/1.1 200 OK\r\nTransfer-Encoding: s3cret\r\n\r\n"):                     "the server's answer is not valid HTTP",
		"http://" + sends(t, "HTTP/1.1 302 Found\r\nLocation: http://[s3cret\r\n\r\n"):                   "a redirect leads to a URL that can't be read",
		"http://" + sends(t, "HTTP/1.1 302 Found\r\nLocation: s3cret:x\r\n\r\n"):                         "a redirect to a URL that is not https or http",
		"http://" + sends(t, "HTTP/1.1 302 Found\r\nLocation: http://s3cret.invalid/\r\n\r\n"):           "the host's name can't be resolved: ",
		"https://" + certified(t, x509.Certificate{}):                                                    "tls: failed to verify certificate: it is signed by an unknown authority",
		"https://" + certified(t, x509.Certificate{DNSNames: []string{"s3cret.example"}}):                "tls: failed to verify certificate: it is for another host",
		"https://" + certified(t, x509.Certificate{URIs: []*url.URL{{Scheme: "http", Host: "[s3cret"}}}): "tls: the server's certificate can't be read",
		"http://10.0.0.1": "outbound: 10.0.0.1 is a private address",
	} {
		_, err := get(g, strings.Replace(address, "://", "://user:s3cret@", 1)+"/s3cret?token=s3cret")
		if err == nil {
			t.Errorf("%s: no error", address)
			continue
		}
		reason := Reason(err)
		if !strings.Contains(reason.Error(), want) {
			t.Errorf("%s: reason %q, want %q", address, reason, want)
		}
		if strings.Contains(reason.Error(), "s3cret") {
			t.Errorf("%s: reason %q shows what may be secret", address, reason)
		}
		if wantBlocked := strings.Contains(want, "redirect") || strings.Contains(want, "private"); isBlocked(reason) != wantBlocked {
			t.Errorf("%s: %#v, blocked should be %t", address, reason, wantBlocked)
		}
	}
}

// certified serves TLS with a certificate that it signs itself.
func certified(t *testing.T, template x509.Certificate) (address string) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template.SerialNumber, template.Subject = big.NewInt(1), pkix.Name{CommonName: "s3cret"}
	template.NotBefore, template.NotAfter = time.Now().Add(-time.Hour), time.Now().Add(time.Hour)
	if template.DNSNames == nil {
		template.IPAddresses = []net.IP{net.IPv4(127, 0, 0, 1)}
	}
	der, err := x509.CreateCertificate(rand.Reader, &template, &template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	l, err := tls.Listen("tcp", "127.0.0.1:0", &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}})
	if err != nil {
		t.Fatal(err)
	}
	return serve(t, l, func(conn net.Conn) { _ = conn.(*tls.Conn).Handshake() }) // which the client breaks off
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
