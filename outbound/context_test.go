package outbound

import (
	"context"
	"errors"
	"testing"
)

func TestClient_CallsWhatTheGuardOfItsContextAllows(t *testing.T) {
	t.Parallel()
	s := server(t, ok)
	ctx, cancel := context.WithCancel(NewContext(t.Context(), guard(t, "127.0.0.1")))
	defer cancel()
	resp, err := Client(ctx).Get(s.URL)
	if err != nil {
		t.Fatal(err)
	}
	_ = resp.Body.Close()
}

func TestClient_WithoutAGuardCallsPublicAddressesOnly(t *testing.T) {
	t.Parallel()
	s := server(t, nil)
	for name, ctx := range map[string]context.Context{
		"no guard":  t.Context(),
		"a nil one": NewContext(t.Context(), nil),
	} {
		resp, err := Client(ctx).Get(s.URL)
		if err == nil {
			_ = resp.Body.Close()
		}
		if _, blocked := errors.AsType[*BlockedError](err); !blocked {
			t.Errorf("%s: error %v; want a BlockedError", name, err)
		}
	}
}
