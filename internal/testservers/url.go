package testservers

import (
	"net/url"
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

// WithParam returns a URL with a parameter of its query set to value.
func WithParam(t testing.TB, raw, name, value string) string {
	t.Helper()
	u := ParseURL(t, raw)
	query := u.Query()
	query.Set(name, value)
	u.RawQuery = query.Encode()
	return u.String()
}

// ThroughProxy starts a proxy to the server of a URL, and returns the URL that leads through it. It ends with the test.
func ThroughProxy(t testing.TB, raw string) (string, *Proxy) {
	t.Helper()
	u := ParseURL(t, raw)
	proxy := NewProxy(t, u.Host)
	u.Host = proxy.Addr()
	return u.String(), proxy
}
