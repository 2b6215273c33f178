// Package pgtext makes text of any origin one that Postgres takes in a column of
// type text: valid UTF-8 without a NUL. It knows how long a name may be, too.
package pgtext

import "strings"

// MaxIdentifier is how many bytes of a name Postgres keeps (NAMEDATALEN - 1).
const MaxIdentifier = 63

// Clean returns s with a question mark in the place of each NUL, and of each run
// of bytes that isn't UTF-8.
func Clean(s string) string {
	return strings.ReplaceAll(strings.ToValidUTF8(s, "?"), "\x00", "?")
}

// Cut is for text in which a stranger had a part, and which may be of any length.
// It returns the first most bytes of s, with an ellipsis if there are more; each
// run of bytes that isn't UTF-8 becomes U+FFFD, and NULs are left out. Since the
// ellipsis and U+FFFD have three bytes each, the result may be longer than most.
func Cut(s string, most int) string {
	if len(s) > most {
		s = s[:most] + "…"
	}
	return strings.ToValidUTF8(strings.ReplaceAll(s, "\x00", ""), "\uFFFD")
}
