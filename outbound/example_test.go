package outbound_test

import (
	"context"
	"errors"
	"fmt"
	"net/http"

	"github.com/carpool-go/carpool/outbound"
)

// A handler calls a URL from its payload with the client of its context.
func ExampleClient() {
	ping := func(ctx context.Context, url string) error {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, http.NoBody)
		if err != nil {
			return errors.New("url: can't be called") // the error repeats the URL
		}
		resp, err := outbound.Client(ctx).Do(req)
		if err != nil {
			return outbound.Reason(err)
		}
		return resp.Body.Close()
	}
	err := ping(context.Background(), "http://169.254.169.254/latest/meta-data?token=s3cret")
	fmt.Println(err)
	_, blocked := errors.AsType[*outbound.BlockedError](err)
	fmt.Println("another try is of no use:", blocked)
	// Output:
	// outbound: 169.254.169.254 is a link-local address; allow it with OUTBOUND_ALLOW=169.254.169.254
	// another try is of no use: true
}

// An entry that is no address, network or name of a host is a fault, and all are named at
// once.
func ExampleNew() {
	guard, err := outbound.New("10.1.0.0/16, metrics.internal")
	fmt.Println(guard != nil, err)

	_, err = outbound.New("http://metrics.internal, 10.1.2.3/16")
	fmt.Println(err)
	// Output:
	// true <nil>
	// "http://metrics.internal" is not a CIDR such as 10.1.0.0/16 or fd00::/8; "10.1.2.3/16" has bits beyond the prefix; did you mean 10.1.0.0/16?
}
