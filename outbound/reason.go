package outbound

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"net/url"
	"strings"
)

// Reason returns why a request of a [Guard]'s client failed, without the URL and
// without what the server sent: net/http quotes both, and both may hold secrets.
// Of what it returns, a [BlockedError] is the one that another try can't mend.
func Reason(err error) error {
	if e, ok := errors.AsType[*url.Error](err); ok {
		err = e.Err
	}
	if blocked, ok := errors.AsType[*BlockedError](err); ok {
		return blocked
	}
	if op, ok := errors.AsType[*net.OpError](err); ok {
		return op
	}
	timeout, ok := errors.AsType[net.Error](err)
	_, badCertificate := errors.AsType[*tls.CertificateVerificationError](err)
	_, noTLS := errors.AsType[tls.RecordHeaderError](err)
	switch text := err.Error(); {
	case errors.Is(err, context.Canceled), ok && timeout.Timeout(), badCertificate, noTLS,
		strings.HasPrefix(text, "tls: "), text == "http: server gave HTTP response to HTTPS client":
		return err
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		return errors.New("the server closed the connection before it had answered")
	case strings.HasPrefix(text, "failed to parse Location header"):
		return &BlockedError{Reason: "a redirect leads to a URL that can't be read"}
	}
	return errors.New("the server's answer is not valid HTTP")
}
