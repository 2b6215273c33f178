package main

import (
	"net/http"
	"testing"
	"time"
)

// The example of the Standard Webhooks specification, whose signature other implementations give, too.
const (
	exampleSecret    = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
	exampleID        = "msg_p5jXN8AQM9LWM0D4loKWxJek"
	exampleTimestamp = "1614265330"
	exampleBody      = `{"test": 2432232314}`
	exampleSignature = "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="
)

func TestReceiver_TakesOnlyWhatIsSignedRightlyAndNew(t *testing.T) {
	t.Parallel()
	r, err := startReceiver(exampleSecret)
	if err != nil {
		t.Fatal(err)
	}
	defer r.stop()
	now := time.Unix(1614265330, 0)
	for name, tc := range map[string]struct {
		change func(http.Header)
		body   string
		now    time.Time
		takes  bool
	}{
		"as in the specification":  {takes: true},
		"with an older secret too": {change: func(h http.Header) { h.Set("webhook-signature", "v1,AAAA "+exampleSignature) }, takes: true},
		"another body":             {body: `{"test": 2432232315}`},
		"another id":               {change: func(h http.Header) { h.Set("webhook-id", "msg_other") }},
		"another time":             {change: func(h http.Header) { h.Set("webhook-timestamp", "1614265331") }},
		"no id":                    {change: func(h http.Header) { h.Del("webhook-id") }},
		"no time":                  {change: func(h http.Header) { h.Del("webhook-timestamp") }},
		"no signature":             {change: func(h http.Header) { h.Del("webhook-signature") }},
		"a signature of no version": {change: func(h http.Header) {
			h.Set("webhook-signature", exampleSignature[len("v1,"):])
		}},
		"replayed later":      {now: now.Add(tolerance + time.Second)},
		"from the far future": {now: now.Add(-tolerance - time.Second)},
	} {
		header := http.Header{}
		header.Set("webhook-id", exampleID)
		header.Set("webhook-timestamp", exampleTimestamp)
		header.Set("webhook-signature", exampleSignature)
		if tc.change != nil {
			tc.change(header)
		}
		if tc.body == "" {
			tc.body = exampleBody
		}
		if tc.now.IsZero() {
			tc.now = now
		}
		if err := r.verify(header, []byte(tc.body), tc.now); (err == nil) != tc.takes {
			t.Errorf("%s: %v", name, err)
		}
	}
}
