package webhook

import (
	"testing"
	"time"
)

func TestRetryAfter_SecondsOrADate(t *testing.T) {
	t.Parallel()
	now := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	for header, want := range map[string]time.Duration{
		"":                                  0,
		"0":                                 0,
		"120":                               2 * time.Minute,
		" 120 ":                             2 * time.Minute,
		"86400":                             24 * time.Hour,
		"86401":                             24 * time.Hour,
		"99999999999999999999999999":        24 * time.Hour,
		"-1":                                0,
		"+1":                                0,
		"1.5":                               0,
		"soon":                              0,
		"Fri, 02 Jan 2026 03:05:05 GMT":     time.Minute,
		"Friday, 02-Jan-26 03:05:05 GMT":    time.Minute, // RFC 850
		"Fri Jan  2 03:05:05 2026":          time.Minute, // ANSI C's asctime
		"Fri, 02 Jan 2026 03:04:05 GMT":     0,
		"Thu, 01 Jan 1970 00:00:00 GMT":     0,
		"Sun, 01 Feb 2026 00:00:00 GMT":     24 * time.Hour,
		"Fri, 31 Dec 9999 23:59:59 GMT":     24 * time.Hour,
		"Fri, 02 Jan 2026 03:05:05 GMT, 17": 0,
	} {
		if got := retryAfter(header, now); got != want {
			t.Errorf("%q: %s, want %s", header, got, want)
		}
	}
}

func FuzzRetryAfter(f *testing.F) {
	for _, seed := range []string{"", "120", "-1", "99999999999999999999", "Fri, 02 Jan 2026 03:05:05 GMT"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, header string) {
		if d := retryAfter(header, time.Now()); d < 0 || d > retryAfterMost {
			t.Errorf("%q: %s", header, d)
		}
	})
}
