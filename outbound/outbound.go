// Package outbound guards the requests that jobs send: they may call public
// addresses, and those that the operator allows with the worker's setting
// OUTBOUND_ALLOW.
//
// It is for the handler of a task that calls a URL it was told: [Client] is the
// HTTP client to do it with. Whoever can enqueue a job can make the worker send
// requests, from inside the network where databases and metadata services trust
// their callers. The check is on each address that is dialled, after names are
// resolved, so it covers a name that points inside, a name that points elsewhere the
// second time it is asked for, and a redirect.
//
// A test that calls a server on this machine allows its address with
// taskstest.Kit.OutboundAllow.
package outbound

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"syscall"
	"time"
)

// Guard decides which addresses may be called. The zero Guard, and a nil one, allow public
// addresses only. It is safe for concurrent use.
type Guard struct {
	hosts    map[string]bool // lower case, without a final dot
	networks []netip.Prefix
	resolver *net.Resolver // nil: the system's
}

// New returns a Guard that allows, beside public addresses, those in allow: a
// comma-separated list of IP addresses, CIDRs, and names of hosts; "" is none. A name
// stands for itself alone, without the names below it, and may resolve to any address.
// The error names every entry that is none of these.
//
// A worker makes its guard with it; a handler has that one from [Client].
func New(allow string) (*Guard, error) {
	g := &Guard{hosts: make(map[string]bool)}
	var faults []error
	for entry := range strings.SplitSeq(allow, ",") {
		entry = strings.TrimSpace(entry)
		if entry == "" {
			continue
		}
		if err := g.allow(entry); err != nil {
			faults = append(faults, fmt.Errorf("%.100q %w", entry, err))
		}
	}
	if err := errors.Join(faults...); err != nil {
		return nil, errors.New(strings.ReplaceAll(err.Error(), "\n", "; "))
	}
	return g, nil
}

func (g *Guard) allow(entry string) error {
	if strings.Contains(entry, "/") {
		p, err := netip.ParsePrefix(entry)
		switch {
		case err != nil:
			return errors.New("is not a CIDR such as 10.1.0.0/16 or fd00::/8")
		case p.Addr().Is4In6():
			return errors.New("is IPv4 written as IPv6; write it as 10.1.0.0/16")
		case p != p.Masked():
			return fmt.Errorf("has bits beyond the prefix; did you mean %s?", p.Masked())
		}
		g.networks = append(g.networks, p)
		return nil
	}
	if a, err := netip.ParseAddr(strings.Trim(entry, "[]")); err == nil {
		if a.Zone() != "" {
			return errors.New("has a zone; leave out what follows the %")
		}
		a = a.Unmap()
		g.networks = append(g.networks, netip.PrefixFrom(a, a.BitLen()))
		return nil
	}
	host := normalHost(entry)
	if err := checkHost(host); err != nil {
		return err
	}
	g.hosts[host] = true
	return nil
}

func normalHost(host string) string { return strings.ToLower(strings.TrimSuffix(host, ".")) }

func checkHost(host string) error {
	bad := errors.New("is not the name of a host, an IP address or a CIDR; it has no scheme, port, path or wildcard")
	if len(host) > 253 { // RFC 1035, without the length bytes
		return bad
	}
	last := ""
	for label := range strings.SplitSeq(host, ".") {
		if label == "" || len(label) > 63 {
			return bad
		}
		for _, c := range label {
			switch {
			case 'a' <= c && c <= 'z', '0' <= c && c <= '9', c == '-', c == '_':
			case c > 127:
				return errors.New("is not ASCII; write it in its xn-- form")
			default:
				return bad
			}
		}
		last = label
	}
	// Nothing but an IPv4 address ends in a number: https://url.spec.whatwg.org/#ends-in-a-number-checker
	if strings.Trim(last, "0123456789") == "" || strings.HasPrefix(last, "0x") {
		return errors.New("looks like an IPv4 address, but is none; write it as 10.1.2.3")
	}
	return nil
}

// BlockedError is the error for a call that a [Guard] refused, and will refuse again.
type BlockedError struct {
	// Addr is the address that would have been called. It is invalid if a
	// redirect was refused for another reason.
	Addr netip.Addr
	// Reason completes the sentence: the kind of the address, such as
	// "a private address"; or what is wrong with the redirect.
	Reason string
}

// Error returns the address and the reason, without the URL.
func (e *BlockedError) Error() string {
	if !e.Addr.IsValid() {
		return "outbound: " + e.Reason
	}
	return fmt.Sprintf("outbound: %s is %s; allow it with OUTBOUND_ALLOW=%[1]s", e.Addr, e.Reason)
}

const (
	connectTimeout = 10 * time.Second
	// headerTimeout is long enough for a server that makes a report first.
	headerTimeout = time.Minute
	maxRedirects  = 5
)

// Client returns an HTTP client, of the caller's own, that calls what the guard allows; for
// other addresses its error wraps a [BlockedError]. Each request gets a connection of its
// own, closed with the response, so that no job meets one that another left
// behind. Connecting and the TLS handshake are bounded by 10 s each, the wait for the
// response's header by a minute, the whole by the request's context, and the size of
// the body by its reader. Proxies in the environment are left out, because behind one
// the address that is called is unknown.
//
// Up to five redirects are followed, but not from https to http. To follow none,
// set the client's CheckRedirect.
func (g *Guard) Client() *http.Client {
	return &http.Client{
		Transport: &http.Transport{
			DialContext:            g.dial,
			TLSHandshakeTimeout:    connectTimeout,
			ResponseHeaderTimeout:  headerTimeout,
			MaxResponseHeaderBytes: 64 << 10,
			DisableKeepAlives:      true,
		},
		CheckRedirect: checkRedirect,
	}
}

func checkRedirect(req *http.Request, via []*http.Request) error {
	from := via[len(via)-1].URL.Scheme
	switch to := req.URL.Scheme; {
	case len(via) > maxRedirects:
		return &BlockedError{Reason: fmt.Sprintf("there are more than %d redirects", maxRedirects)}
	case to != "https" && to != "http":
		return &BlockedError{Reason: "a redirect to a URL that is not https or http is not followed"}
	case from == "https" && to == "http":
		return &BlockedError{Reason: "a redirect from https to http is not followed"}
	}
	// net/http would tell the next server the whole URL, with a token in its query.
	req.Header.Del("Referer")
	return nil
}

func (g *Guard) dial(ctx context.Context, network, address string) (net.Conn, error) {
	host, _, err := net.SplitHostPort(address)
	if err != nil {
		return nil, fmt.Errorf("outbound: %w", err)
	}
	dialer := &net.Dialer{Timeout: connectTimeout}
	if g != nil {
		dialer.Resolver = g.resolver
	}
	if g == nil || !g.hosts[normalHost(host)] {
		dialer.Control = g.control
	}
	conn, err := dialer.DialContext(ctx, network, address)
	if blocked, ok := errors.AsType[*BlockedError](err); ok {
		return nil, blocked
	}
	return conn, err
}

// control is called with each address before it is connected to.
func (g *Guard) control(_, address string, _ syscall.RawConn) error {
	ap, err := netip.ParseAddrPort(address)
	if err != nil {
		return fmt.Errorf("outbound: %w", err)
	}
	return g.check(ap.Addr())
}

// check returns a [BlockedError] if the address must not be called.
func (g *Guard) check(a netip.Addr) error {
	// An address with a zone is in no prefix.
	a = a.WithZone("").Unmap()
	if g.allows(a) {
		return nil
	}
	target := a
	if wellKnownNAT64.Contains(a) {
		b := a.As16()
		if target = netip.AddrFrom4([4]byte(b[12:])); g.allows(target) {
			return nil
		}
	}
	if kind := specialKind(target); kind != "" {
		return &BlockedError{Addr: a, Reason: kind}
	}
	return nil
}

func (g *Guard) allows(a netip.Addr) bool {
	if g == nil {
		return false
	}
	for _, network := range g.networks {
		if network.Contains(a) {
			return true
		}
	}
	return false
}
