package testservers

import (
	"net/url"
	"strings"
	"testing"
)

// ParseURL parses the URL of a server.
func ParseURL(t testing.TB, raw string) *url.URL {
	t.Helper()
	u, err := url.Parse(raw)
	if err != nil {
		t.Fatal(err)
	}
	return u
}

// WithParam returns a URL with a parameter of its query set to value. The URL may have several hosts, which net/url
// doesn't take.
func WithParam(t testing.TB, raw, name, value string) string {
	t.Helper()
	server, rawQuery, _ := strings.Cut(raw, "?")
	query, err := url.ParseQuery(rawQuery)
	if err != nil {
		t.Fatal(err)
	}
	query.Set(name, value)
	return server + "?" + query.Encode()
}

// ThroughProxy starts a proxy to the server of a URL, and returns the URL that leads through it. It ends with the test.
func ThroughProxy(t testing.TB, raw string) (string, *Proxy) {
	t.Helper()
	u := ParseURL(t, raw)
	proxy := NewProxy(t, u.Host)
	u.Host = proxy.Addr()
	return u.String(), proxy
}
