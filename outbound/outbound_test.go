package outbound

import (
	"context"
	"encoding/binary"
	"errors"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"testing"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func guard(t testing.TB, allow string) *Guard {
	t.Helper()
	g, err := New(allow)
	if err != nil {
		t.Fatal(err)
	}
	return g
}

func get(g *Guard, url string) (string, error) {
	resp, err := g.Client().Get(url)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, 1<<20))
	return resp.Status + " " + string(body), err
}

// server listens on 127.0.0.1 and fails the test if it is called without being
// allowed to be.
func server(t *testing.T, handler http.HandlerFunc) *httptest.Server {
	t.Helper()
	if handler == nil {
		handler = func(_ http.ResponseWriter, r *http.Request) { t.Errorf("%s was called", r.Host) }
	}
	s := httptest.NewServer(handler)
	t.Cleanup(s.Close)
	return s
}

func ok(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "ok") }

func port(t *testing.T, s *httptest.Server) string {
	t.Helper()
	_, port, err := net.SplitHostPort(s.Listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	return port
}

func TestGuard_CallsPublicAddressesOnly(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct{ addr, kind string }{
		{"0.0.0.0", "an address of this host"},
		{"0.255.255.255", "an address of this host"},
		{"1.1.1.1", ""},
		{"9.255.255.255", ""},
		{"10.0.0.0", "a private address"},
		{"10.255.255.255", "a private address"},
		{"11.0.0.0", ""},
		{"100.63.255.255", ""},
		{"100.64.0.0", "a shared address (carrier-grade NAT)"},
		{"100.100.100.200", "a shared address (carrier-grade NAT)"}, // Alibaba's metadata
		{"100.127.255.255", "a shared address (carrier-grade NAT)"},
		{"100.128.0.0", ""},
		{"126.255.255.255", ""},
		{"127.0.0.1", "a loopback address"},
		{"127.255.255.255", "a loopback address"},
		{"128.0.0.0", ""},
		{"168.63.129.16", "an address of the cloud's own"},
		{"169.253.255.255", ""},
		{"169.254.0.0", "a link-local address"},
		{"169.254.169.254", "a link-local address"}, // metadata at most clouds
		{"169.255.0.0", ""},
		{"172.15.255.255", ""},
		{"172.16.0.0", "a private address"},
		{"172.31.255.255", "a private address"},
		{"172.32.0.0", ""},
		{"192.0.0.192", "a protocol's own address"}, // Oracle's metadata
		{"192.0.1.0", ""},
		{"192.0.2.1", "an address for documentation"},
		{"192.31.196.1", "an address of AS112"},
		{"192.52.193.1", "an address of multicast relays"},
		{"192.88.99.1", "an address of 6to4 relays"},
		{"192.167.255.255", ""},
		{"192.168.0.1", "a private address"},
		{"192.169.0.0", ""},
		{"192.175.48.1", "an address of AS112"},
		{"198.17.255.255", ""},
		{"198.18.0.0", "an address for benchmarks"},
		{"198.19.255.255", "an address for benchmarks"},
		{"198.20.0.0", ""},
		{"198.51.100.7", "an address for documentation"},
		{"203.0.113.7", "an address for documentation"},
		{"223.255.255.255", ""},
		{"224.0.0.1", "a multicast address"},
		{"239.255.255.255", "a multicast address"},
		{"240.0.0.0", "a reserved address"},
		{"255.255.255.254", "a reserved address"},
		{"255.255.255.255", "the broadcast address"},

		{"::", "an address of this host"},
		{"::1", "a loopback address"},
		{"::127.0.0.1", "a reserved address"}, // IPv4-compatible, RFC 4291
		{"::ffff:127.0.0.1", "a loopback address"},
		{"::ffff:7f00:1", "a loopback address"},
		{"::ffff:10.0.0.1", "a private address"},
		{"::ffff:1.1.1.1", ""},
		{"::ffff:0:7f00:1", "a reserved address"}, // IPv4-translated, RFC 2765
		{"64:ff9b::10.0.0.1", "a private address"},
		{"64:ff9b::169.254.169.254", "a link-local address"},
		{"64:ff9b::1.1.1.1", ""},
		{"64:ff9b::1:10.0.0.1", "a reserved address"},
		{"64:ff9b:1::1", "a private address (NAT64)"},
		{"100::1", "a reserved address"},
		{"1fff:ffff::1", "a reserved address"},
		{"2001::7f00:1", "a Teredo address"},
		{"2001:0:5ef5:79fb::1", "a Teredo address"},
		{"2001:2::1", "a protocol's own address"},
		{"2001:1ff:ffff::1", "a protocol's own address"},
		{"2001:200::1", ""},
		{"2001:db8::1", "an address for documentation"},
		{"2001:4860:4860::8888", ""},
		{"2002:7f00:1::1", "a 6to4 address"},
		{"2606:4700:4700::1111", ""},
		{"2620:4f:8000::1", "an address of AS112"},
		{"3ffe::1", ""},
		{"3fff::1", "an address for documentation"},
		{"3fff:1000::1", ""},
		{"4000::1", "a reserved address"},
		{"5f00::1", "a reserved address"},
		{"fc00::1", "a private address"},
		{"fd00:ec2::254", "a private address"}, // EC2's metadata
		{"fe80::1", "a link-local address"},
		{"fe80::1%eth0", "a link-local address"},
		{"febf::1", "a link-local address"},
		{"fec0::1", "a site-local address"},
		{"ff02::1", "a multicast address"},
	} {
		for _, g := range []*Guard{nil, guard(t, ""), guard(t, "hooks.internal, 10.9.8.7")} {
			err := g.check(netip.MustParseAddr(tc.addr))
			blocked, refused := errors.AsType[*BlockedError](err)
			if refused != (tc.kind != "") || refused && blocked.Reason != tc.kind || !refused && err != nil {
				t.Errorf("%s: %v; want %q", tc.addr, err, tc.kind)
			}
		}
	}
}

func TestGuard_AllowsAddressesAndNetworks(t *testing.T) {
	t.Parallel()
	g := guard(t, " 10.1.2.3,192.168.4.0/24 ,, [fd00::5], fd12::/16, ::ffff:172.16.0.9, 100.64.0.0/10,")
	for addr, allowed := range map[string]bool{
		"10.1.2.3": true, "10.1.2.4": false, "::ffff:10.1.2.3": true, "64:ff9b::10.1.2.3": true, "64:ff9b::10.1.2.4": false,
		"192.168.4.0": true, "192.168.4.255": true, "192.168.5.0": false,
		"fd00::5": true, "fd00::6": false, "fd12::1": true, "fd12::1%eth0": true, "fd13::1": false,
		"172.16.0.9": true, "172.16.0.10": false, "100.64.0.1": true, "127.0.0.1": false, "::1": false,
	} {
		if err := g.check(netip.MustParseAddr(addr)); (err == nil) != allowed {
			t.Errorf("%s: %v; allowed should be %t", addr, err, allowed)
		}
	}
	everything := guard(t, "0.0.0.0/0,::/0")
	for _, addr := range []string{"127.0.0.1", "::1", "169.254.169.254", "::ffff:10.0.0.1", "fe80::1%eth0"} {
		if err := everything.check(netip.MustParseAddr(addr)); err != nil {
			t.Errorf("with everything allowed: %v", err)
		}
	}
}

func TestNew_NamesEveryWrongEntry(t *testing.T) {
	t.Parallel()
	for entry, want := range map[string]string{
		"10.0.0.0/99":              `"10.0.0.0/99" is not a CIDR`,
		"10.0.0.0/":                `is not a CIDR`,
		"hooks.internal/16":        `is not a CIDR`,
		"10.1.2.3/16":              `"10.1.2.3/16" has bits beyond the prefix; did you mean 10.1.0.0/16?`,
		"::ffff:10.0.0.0/104":      `is IPv4 written as IPv6`,
		"fe80::1%eth0":             `has a zone`,
		"fe80::%eth0/10":           `is not a CIDR`,
		"http://hooks.internal":    `is not a CIDR`,
		"hooks.internal:8080":      `is not the name of a host`,
		"10.0.0.1:8080":            `is not the name of a host`,
		"*.internal":               `is not the name of a host`,
		"hooks..internal":          `is not the name of a host`,
		".":                        `is not the name of a host`,
		"a b":                      `is not the name of a host`,
		"bücher.example":           `is not ASCII; write it in its xn-- form`,
		"10.0.0":                   `looks like an IPv4 address, but is none`,
		"10.0.0.256":               `looks like an IPv4 address, but is none`,
		"2130706433":               `looks like an IPv4 address, but is none`,
		"0x7f000001":               `looks like an IPv4 address, but is none`,
		strings.Repeat("a", 64):    `is not the name of a host`,
		strings.Repeat("a.", 200):  `is not the name of a host`,
		"10.1.2.3/16, ok, 10.0.0.": `"10.1.2.3/16" has bits beyond the prefix; did you mean 10.1.0.0/16?; "10.0.0." looks`,
	} {
		_, err := New(entry)
		if err == nil || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "\n") {
			t.Errorf("%s: %v; want %q", entry, err, want)
		}
	}
}

func TestGuard_RefusesBeforeAnythingIsSentHoweverTheAddressIsWritten(t *testing.T) {
	t.Parallel()
	p := port(t, server(t, nil))
	urls := []string{
		"http://127.0.0.1:" + p, "http://[::ffff:127.0.0.1]:" + p, "http://[::ffff:7f00:1]:" + p, "http://127.0.0.2:" + p,
		"http://0.0.0.0:" + p, "http://[::]:" + p, "http://[::1]:" + p, "http://[fe80::1%25lo]:" + p, "http://[64:ff9b::7f00:1]:" + p,
		"http://localhost:" + p, "https://127.0.0.1:" + p,
		"http://user:s3cret@127.0.0.1:" + p, "http://169.254.169.254/latest/meta-data", "http://10.0.0.1/",
	}
	for _, url := range urls {
		_, err := get(nil, url)
		blocked, ok := errors.AsType[*BlockedError](err)
		if !ok {
			t.Errorf("%s: %v", url, err)
		} else if strings.Contains(blocked.Error(), "s3cret") {
			t.Errorf("%s: error %q shows the password", url, blocked)
		}
	}
	// Forms that some systems' resolvers read as 127.0.0.1, and Go's as a name that isn't there, or is asked for.
	g := guard(t, "")
	g.resolver = resolver(t, func(string) []netip.Addr { return []netip.Addr{netip.MustParseAddr("127.0.0.1")} })
	for _, host := range []string{"2130706433", "0x7f000001", "017700000001", "127.1"} {
		if got, err := get(g, "http://"+host+":"+p); err == nil {
			t.Errorf("%s answers %s", host, got)
		}
	}
}

func isBlocked(err error) bool {
	_, ok := errors.AsType[*BlockedError](err)
	return ok
}

func TestBlockedError_SaysHowToAllowTheAddress(t *testing.T) {
	t.Parallel()
	_, err := get(guard(t, "hooks.internal"), "http://[::ffff:10.0.0.1]/")
	blocked, ok := errors.AsType[*BlockedError](err)
	if want := "outbound: 10.0.0.1 is a private address; allow it with OUTBOUND_ALLOW=10.0.0.1"; !ok || blocked.Error() != want {
		t.Errorf("error %v, want %s", err, want)
	}
	if blocked.Addr != netip.MustParseAddr("10.0.0.1") || blocked.Reason != "a private address" {
		t.Errorf("%+v", blocked)
	}
}

func TestGuard_ANameThatPointsInsideIsRefused(t *testing.T) {
	t.Parallel()
	p := port(t, server(t, nil))
	g := guard(t, "elsewhere.test")
	g.resolver = resolver(t, func(string) []netip.Addr { return []netip.Addr{netip.MustParseAddr("127.0.0.1")} })
	for _, host := range []string{"rebinding.test", "elsewhere.test.evil.test", "sub.elsewhere.test"} {
		if _, err := get(g, "http://"+host+":"+p); !isBlocked(err) {
			t.Errorf("%s: %v", host, err)
		}
	}
}

func TestGuard_ANameThatPointsElsewhereTheSecondTimeIsRefused(t *testing.T) {
	t.Parallel()
	s := server(t, nil)
	s.Config.Handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/first" {
			t.Error("it was called at the second address")
		}
		http.Redirect(w, r, "/second", http.StatusFound)
	})
	g := guard(t, "127.0.0.1")
	asked := make(chan struct{}, 10)
	g.resolver = resolver(t, func(string) []netip.Addr {
		asked <- struct{}{}
		if len(asked) == 1 {
			return []netip.Addr{netip.MustParseAddr("127.0.0.1")}
		}
		return []netip.Addr{netip.MustParseAddr("127.0.0.2")}
	})
	_, err := get(g, "http://rebinding.test:"+port(t, s)+"/first")
	blocked, ok := errors.AsType[*BlockedError](err)
	if !ok || blocked.Addr != netip.MustParseAddr("127.0.0.2") {
		t.Error(err)
	}
}

func TestGuard_OfSeveralAddressesTheAllowedOneIsCalled(t *testing.T) {
	t.Parallel()
	s := server(t, ok)
	g := guard(t, "127.0.0.1")
	g.resolver = resolver(t, func(string) []netip.Addr {
		return []netip.Addr{netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("127.0.0.1")}
	})
	if got, err := get(g, "http://both.test:"+port(t, s)); err != nil || got != "200 OK ok" {
		t.Error(got, err)
	}
}

func TestGuard_AnAllowedNameMayPointAnywhere(t *testing.T) {
	t.Parallel()
	s := server(t, ok)
	g := guard(t, "Hooks.Internal., my_service, xn--bcher-kva.test")
	g.resolver = resolver(t, func(string) []netip.Addr { return []netip.Addr{netip.MustParseAddr("127.0.0.1")} })
	for _, host := range []string{"hooks.internal", "HOOKS.internal", "hooks.internal.", "my_service", "bücher.test"} {
		if got, err := get(g, "http://"+host+":"+port(t, s)); err != nil || got != "200 OK ok" {
			t.Errorf("%s: %s %v", host, got, err)
		}
	}
}

func TestGuard_FollowsRedirectsButNotInside(t *testing.T) {
	t.Parallel()
	inside := port(t, server(t, nil))
	s := server(t, func(w http.ResponseWriter, r *http.Request) {
		if referer := r.Header.Get("Referer"); referer != "" {
			t.Errorf("the server at %s was told of %s", r.URL, referer)
		}
		switch r.URL.Path {
		case "/inside":
			http.Redirect(w, r, "http://127.0.0.2:"+inside+"/", http.StatusFound)
		case "/name":
			http.Redirect(w, r, "http://localhost.:"+inside+"/", http.StatusMovedPermanently)
		case "/file":
			http.Redirect(w, r, "file:///etc/passwd", http.StatusFound)
		case "/round":
			http.Redirect(w, r, "/round", http.StatusFound)
		case "/5", "/4", "/3", "/2", "/1":
			http.Redirect(w, r, string(r.URL.Path[1]-1)+"?token=s3cret", http.StatusFound)
		case "/6":
			http.Redirect(w, r, "/5", http.StatusFound)
		default:
			ok(w, r)
		}
	})
	g := guard(t, "127.0.0.1")
	g.resolver = resolver(t, func(string) []netip.Addr { return []netip.Addr{netip.MustParseAddr("127.0.0.3")} })
	if got, err := get(g, s.URL+"/5?token=s3cret"); err != nil || got != "200 OK ok" {
		t.Error(got, err)
	}
	for path, want := range map[string]string{
		"/inside": "127.0.0.2 is a loopback address",
		"/name":   "a loopback address",
		"/file":   "a redirect to a URL that is not https or http is not followed",
		"/round":  "there are more than 5 redirects",
		"/6":      "there are more than 5 redirects",
	} {
		if _, err := get(g, s.URL+path); !isBlocked(err) || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", path, err, want)
		}
	}
}

func TestGuard_DoesNotFollowFromHTTPSToHTTP(t *testing.T) {
	t.Parallel()
	plain := server(t, nil)
	secure := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		http.Redirect(w, r, plain.URL, http.StatusFound)
	}))
	t.Cleanup(secure.Close)
	client := guard(t, "127.0.0.1").Client()
	client.Transport.(*http.Transport).TLSClientConfig = secure.Client().Transport.(*http.Transport).TLSClientConfig
	resp, err := client.Get(secure.URL)
	if err == nil {
		resp.Body.Close()
	}
	if !isBlocked(err) || !strings.Contains(err.Error(), "from https to http") {
		t.Error(err)
	}
}

func TestGuard_HTTPAndHTTPSOnly(t *testing.T) {
	t.Parallel()
	for _, url := range []string{"file:///etc/passwd", "ftp://example.com/", "gopher://127.0.0.1/"} {
		if got, err := get(guard(t, "0.0.0.0/0"), url); err == nil || !strings.Contains(err.Error(), "unsupported protocol scheme") {
			t.Error(url, got, err)
		}
	}
}

func TestGuard_ProxiesOfTheEnvironmentAreNotUsed(t *testing.T) {
	proxy := server(t, nil)
	t.Setenv("HTTP_PROXY", proxy.URL)
	t.Setenv("ALL_PROXY", proxy.URL)
	if _, err := get(nil, "http://10.0.0.1/"); !isBlocked(err) {
		t.Error(err)
	}
	if (*Guard)(nil).Client().Transport.(*http.Transport).Proxy != nil {
		t.Error("the client asks for a proxy")
	}
}

// A connection that another job left behind could be dead, or someone else's by now.
func TestGuard_EachRequestHasAConnectionOfItsOwn(t *testing.T) {
	t.Parallel()
	from := make(map[string]bool)
	s := server(t, func(w http.ResponseWriter, r *http.Request) {
		from[r.RemoteAddr] = true
		ok(w, r)
	})
	client := guard(t, "127.0.0.1").Client()
	for range 3 {
		resp, err := client.Get(s.URL)
		if err != nil {
			t.Fatal(err)
		}
		_, _ = io.Copy(io.Discard, resp.Body)
		resp.Body.Close()
	}
	s.Close() // so that the handlers have ended
	if len(from) != 3 {
		t.Errorf("three requests came over %d connections", len(from))
	}
}

// Whatever the list is, it is refused or allows no more than it says.
func FuzzNew(f *testing.F) {
	for _, seed := range []string{
		"", ",", "10.0.0.0/8", "hooks.internal,10.1.0.0/16", "::1", "[::1]", "::/0", "fe80::1%eth0", "a.b-c_d", "0x7f.1",
		"::ffff:0:0/96", "10.0.0.0/08", "LOCALHOST.", "a/b", "1.2.3.4/32/32", "\x00", "[[::1]]",
	} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, list string) {
		g, err := New(list)
		if err != nil {
			if g != nil || strings.ContainsAny(err.Error(), "\n\x00") {
				t.Errorf("%q: guard %v, error %q", list, g, err)
			}
			return
		}
		for host := range g.hosts {
			if _, err := netip.ParseAddr(host); err == nil || host != strings.ToLower(host) || strings.ContainsAny(host, "/:*% ") {
				t.Errorf("%q allows the host %q", list, host)
			}
		}
		entries := 0
		for entry := range strings.SplitSeq(list, ",") {
			if strings.TrimSpace(entry) != "" {
				entries++
			}
		}
		if len(g.networks)+len(g.hosts) > entries {
			t.Errorf("%q: %d entries became %v and %v", list, entries, g.networks, g.hosts)
		}
		for _, addr := range []string{"127.0.0.1", "10.0.0.1", "::1", "fd00::1"} {
			a, listed := netip.MustParseAddr(addr), false
			for _, network := range g.networks {
				listed = listed || network.Contains(a)
			}
			if (g.check(a) == nil) != listed {
				t.Errorf("%q: check(%s) = %v, listed %t", list, a, g.check(a), listed)
			}
		}
	})
}

// resolver asks a small DNS server of the test's own, which knows IPv4
// addresses only.
func resolver(t *testing.T, lookup func(name string) []netip.Addr) *net.Resolver {
	t.Helper()
	conn, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		buf := make([]byte, 512)
		for {
			n, from, err := conn.ReadFrom(buf)
			if err != nil {
				return
			}
			_, _ = conn.WriteTo(answer(buf[:n], lookup), from)
		}
	}()
	t.Cleanup(func() { _ = conn.Close(); <-done })
	return &net.Resolver{PreferGo: true, Dial: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "udp", conn.LocalAddr().String())
	}}
}

// answer answers a DNS query of one question; see RFC 1035, section 4.
func answer(query []byte, lookup func(string) []netip.Addr) []byte {
	const header = 12
	end, labels := header, []string(nil)
	for query[end] != 0 {
		length := int(query[end])
		labels = append(labels, string(query[end+1:end+1+length]))
		end += 1 + length
	}
	end++
	var addrs []netip.Addr
	if binary.BigEndian.Uint16(query[end:]) == 1 { // A
		addrs = lookup(strings.Join(labels, "."))
	}
	reply := append([]byte(nil), query[:end+4]...)
	reply[2], reply[3] = 0x81, 0x80 // an answer, recursion desired and available
	binary.BigEndian.PutUint16(reply[6:], uint16(len(addrs)))
	binary.BigEndian.PutUint32(reply[8:], 0) // no further sections
	for _, a := range addrs {
		reply = append(reply, 0xc0, header) // the name of the question
		reply = append(reply, 0, 1, 0, 1, 0, 0, 0, 0, 0, 4)
		reply = append(reply, a.AsSlice()...)
	}
	return reply
}

func discardLog() *log.Logger { return log.New(io.Discard, "", 0) }
