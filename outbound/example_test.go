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
