package outbound

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"net"
	"net/url"
	"strings"
)

// Reason returns why a request of a [Guard]'s client failed, or the reading of its answer,
// without the URL and without what the server sent: net/http quotes both, and both may hold
// secrets. Of what it returns, a [BlockedError] is the one that another try can't mend.
func Reason(err error) error {
	if e, ok := errors.AsType[*url.Error](err); ok {
		err = e.Err
	}
	if blocked, ok := errors.AsType[*BlockedError](err); ok {
		return blocked
	}
	if dns, ok := errors.AsType[*net.DNSError](err); ok { // the name may come from a redirect
		return errors.New("the host's name can't be resolved: " + dns.Err)
	}
	if op, ok := errors.AsType[*net.OpError](err); ok {
		return op
	}
	if bad, ok := errors.AsType[*tls.CertificateVerificationError](err); ok {
		return errors.New("tls: failed to verify certificate: " + badCertificate(bad.Err))
	}
	timeout, ok := errors.AsType[net.Error](err)
	_, noTLS := errors.AsType[tls.RecordHeaderError](err)
	switch text := err.Error(); {
	case strings.HasPrefix(text, "tls: failed to parse certificate"): // it quotes the certificate
		return errors.New("tls: the server's certificate can't be read")
	case errors.Is(err, context.Canceled), ok && timeout.Timeout(), noTLS,
		strings.HasPrefix(text, "tls: "), text == "http: server gave HTTP response to HTTPS client":
		return err
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		return errors.New("the server closed the connection before it had answered")
	case strings.HasPrefix(text, "failed to parse Location header"):
		return &BlockedError{Reason: "a redirect leads to a URL that can't be read"}
	}
	return errors.New("the server's answer is not valid HTTP")
}

// badCertificate says what is wrong with a certificate, without the names in it.
func badCertificate(err error) string {
	if _, ok := errors.AsType[x509.UnknownAuthorityError](err); ok {
		return "it is signed by an unknown authority"
	}
	if _, ok := errors.AsType[x509.HostnameError](err); ok {
		return "it is for another host"
	}
	if e, ok := errors.AsType[x509.CertificateInvalidError](err); ok && e.Reason == x509.Expired {
		return "it has expired or is not yet valid"
	}
	return "it is not valid"
}
