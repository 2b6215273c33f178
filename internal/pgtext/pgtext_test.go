package pgtext_test

import (
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/carpool-go/carpool/internal/pgtext"
)

func TestClean_MarksWhatPostgresRefuses(t *testing.T) {
	t.Parallel()
	for s, want := range map[string]string{
		"":                      "",
		"Grüße, 世界":             "Grüße, 世界",
		"a\x00b\x00\x00":        "a?b??",
		"a\xff\xfeb\xc3":        "a?b?",
		"must not be \x00\xff!": "must not be ??!",
	} {
		if got := pgtext.Clean(s); got != want {
			t.Errorf("%q becomes %q, want %q", s, got, want)
		}
	}
}

func TestCut_LeavesOutNULsAndBoundsTheLength(t *testing.T) {
	t.Parallel()
	for s, want := range map[string]string{
		"":              "",
		"12345678":      "12345678",
		"123456789":     "12345678…",
		"1234567ü":      "1234567\uFFFD…", // a rune that is cut in two
		"a\x00b\x00":    "ab",
		"a\xff\xfeb":    "a\uFFFDb",
		"\x00\xff12345": "\uFFFD12345",
	} {
		if got := pgtext.Cut(s, 8); got != want {
			t.Errorf("%q becomes %q, want %q", s, got, want)
		}
	}
}

func FuzzText_IsWhatPostgresTakes(f *testing.F) {
	f.Add("a\x00\xff世", 3)
	f.Fuzz(func(t *testing.T, s string, most int) {
		for _, got := range []string{pgtext.Clean(s), pgtext.Cut(s, max(most, 0))} {
			if !utf8.ValidString(got) || strings.Contains(got, "\x00") {
				t.Errorf("%q becomes %q", s, got)
			}
		}
	})
}
