package outbound

import "net/netip"

// special lists the addresses that are not public, after the IANA IPv4 and IPv6
// Special-Purpose Address Registries (RFC 6890; www.iana.org/assignments/
// iana-ipv4-special-registry and iana-ipv6-special-registry), the multicast
// ranges, and what RFC 3879 took out of use. Of IPv6, what is not listed is
// public only within 2000::/3, beyond which nothing is assigned.
var special = []struct {
	network netip.Prefix
	kind    string
}{
	{netip.MustParsePrefix("0.0.0.0/8"), "an address of this host"},
	{netip.MustParsePrefix("10.0.0.0/8"), "a private address"},
	{netip.MustParsePrefix("100.64.0.0/10"), "a shared address (carrier-grade NAT)"},
	{netip.MustParsePrefix("127.0.0.0/8"), "a loopback address"},
	// Azure's platform answers here, on an address that is public by its form.
	{netip.MustParsePrefix("168.63.129.16/32"), "an address of the cloud's own"},
	{netip.MustParsePrefix("169.254.0.0/16"), "a link-local address"},
	{netip.MustParsePrefix("172.16.0.0/12"), "a private address"},
	{netip.MustParsePrefix("192.0.0.0/24"), "a protocol's own address"},
	{netip.MustParsePrefix("192.0.2.0/24"), "an address for documentation"},
	{netip.MustParsePrefix("192.31.196.0/24"), "an address of AS112"},
	{netip.MustParsePrefix("192.52.193.0/24"), "an address of multicast relays"},
	{netip.MustParsePrefix("192.88.99.0/24"), "an address of 6to4 relays"},
	{netip.MustParsePrefix("192.168.0.0/16"), "a private address"},
	{netip.MustParsePrefix("192.175.48.0/24"), "an address of AS112"},
	{netip.MustParsePrefix("198.18.0.0/15"), "an address for benchmarks"},
	{netip.MustParsePrefix("198.51.100.0/24"), "an address for documentation"},
	{netip.MustParsePrefix("203.0.113.0/24"), "an address for documentation"},
	{netip.MustParsePrefix("224.0.0.0/4"), "a multicast address"},
	{netip.MustParsePrefix("255.255.255.255/32"), "the broadcast address"},
	{netip.MustParsePrefix("240.0.0.0/4"), "a reserved address"},

	{netip.MustParsePrefix("::/128"), "an address of this host"},
	{netip.MustParsePrefix("::1/128"), "a loopback address"},
	{netip.MustParsePrefix("64:ff9b:1::/48"), "a private address (NAT64)"},
	{netip.MustParsePrefix("2001::/32"), "a Teredo address"},
	{netip.MustParsePrefix("2001::/23"), "a protocol's own address"},
	{netip.MustParsePrefix("2001:db8::/32"), "an address for documentation"},
	// 6to4 wraps any IPv4 address, a private one among them.
	{netip.MustParsePrefix("2002::/16"), "a 6to4 address"},
	{netip.MustParsePrefix("2620:4f:8000::/48"), "an address of AS112"},
	{netip.MustParsePrefix("3fff::/20"), "an address for documentation"},
	{netip.MustParsePrefix("fc00::/7"), "a private address"},
	{netip.MustParsePrefix("fe80::/10"), "a link-local address"},
	{netip.MustParsePrefix("fec0::/10"), "a site-local address"},
	{netip.MustParsePrefix("ff00::/8"), "a multicast address"},
}

var (
	global6 = netip.MustParsePrefix("2000::/3")
	// wellKnownNAT64 wraps IPv4 addresses (RFC 6052): an IPv6-only network
	// reaches public ones by it.
	wellKnownNAT64 = netip.MustParsePrefix("64:ff9b::/96")
)

// specialKind says what an address is that is not public, such as
// "a private address"; of a public one it is "".
func specialKind(a netip.Addr) string {
	for _, s := range special {
		if s.network.Contains(a) {
			return s.kind
		}
	}
	if a.Is6() && !global6.Contains(a) {
		return "a reserved address"
	}
	return ""
}
