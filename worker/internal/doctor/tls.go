package doctor

import (
	"crypto/tls"
	"net"
	"net/netip"
	"time"
)

// endingSoon is how long before its end a certificate is called short of it.
const endingSoon = 14 * 24 * time.Hour

// sharedSpace is the one that carriers and platforms use inside.
var sharedSpace = netip.MustParsePrefix("100.64.0.0/10")

// isPrivate reports whether an address is one that is not reached from the internet.
func isPrivate(addr net.Addr) bool {
	tcp, ok := addr.(*net.TCPAddr)
	if !ok {
		return true // a socket of the machine's
	}
	ip := tcp.AddrPort().Addr().Unmap()
	return ip.IsPrivate() || ip.IsLoopback() || ip.IsLinkLocalUnicast() || sharedSpace.Contains(ip)
}

// checkTLS judges how a connection to a server is guarded. verified says that the server
// must prove its name, and switchOn is the way to TLS, or to proof.
func (e *examination) checkTLS(check string, conn net.Conn, remote net.Addr, verified bool, switchOn string) []Finding {
	r := &report{check: check}
	private := isPrivate(remote)
	over, ok := conn.(*tls.Conn)
	if !ok {
		if !private {
			r.warn(switchOn, "the connection to the public address %s is not encrypted: passwords and payloads can be read on the way", remote)
		}
		return r.orOK("none, at the private address %s", remote)
	}
	state := over.ConnectionState()
	if !verified && !private {
		r.warn(switchOn, "the server's certificate is not verified: whoever is on the way can take its place")
	}
	if len(state.PeerCertificates) > 0 {
		switch ends := state.PeerCertificates[0].NotAfter; {
		case ends.Before(e.now()):
			r.warn("renew it", "the server's certificate has expired on %s", ends.UTC().Format(time.DateOnly))
		case ends.Before(e.now().Add(endingSoon)):
			r.warn("renew it", "the server's certificate ends on %s", ends.UTC().Format(time.DateOnly))
		}
	}
	return r.orOK("%s, %s", tls.VersionName(state.Version), map[bool]string{true: "the certificate is verified", false: "the certificate is not verified"}[verified])
}
