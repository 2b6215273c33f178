package csvimport

import (
	"bytes"
	"math"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/carpool-go/carpool/internal/pgtext"
)

// typeSet is a set of the types a CSV column may be given. Text is not among
// them: every value fits text, so the empty set stands for it.
//
// A column begins with all types and keeps those that every one of its values
// fits. So the order of the rows doesn't matter, a misfit in the last row counts
// as much as one in the first, and no type has to be taken back.
type typeSet uint8

const (
	bigint typeSet = 1 << iota
	double
	boolean
	date
	timestamptz

	anyType = bigint | double | boolean | date | timestamptz
)

// typeNames are in the order of preference: the first that every value fits
// is the column's.
var typeNames = [...]struct {
	typ  typeSet
	name string
}{
	{bigint, "bigint"},
	{double, "double precision"},
	{boolean, "boolean"},
	{date, "date"},
	{timestamptz, "timestamptz"},
}

// inferredColumn is what the first pass over a file learns of one column.
type inferredColumn struct {
	name string
	// fits are the types that every value so far fits. Empty fields fit all.
	fits typeSet
	// used is false while every field was empty.
	used bool
	// misfits has, for each type not in fits, the line of the first value that
	// doesn't fit it.
	misfits [len(typeNames)]int
}

// misfit takes types from the column, for a value in that line.
func (c *inferredColumn) misfit(types typeSet, line int) {
	for i, t := range typeNames {
		if types&t.typ != 0 {
			c.misfits[i] = line
		}
	}
	c.fits &^= types
}

// misfitLine is the line of the first value that doesn't fit typ.
func (c *inferredColumn) misfitLine(typ typeSet) int {
	for i, t := range typeNames {
		if t.typ == typ {
			return c.misfits[i]
		}
	}
	return 0
}

// typeName is the SQL name of the column's type. A column of nothing but empty
// fields is text, which takes whatever is appended later.
func (c *inferredColumn) typeName() string {
	if c.used {
		for _, t := range typeNames {
			if c.fits&t.typ != 0 {
				return t.name
			}
		}
	}
	return "text"
}

// typesOf returns the types that a value, not empty, fits. A value fits a
// type if Postgres takes it for a value of that type and nothing of what it says
// is lost: the number, the day, the instant. What is lost is its spelling: 1e2
// becomes 100, 0.50 becomes 0.5, TRUE becomes true, and an instant's offset
// becomes that of the session that reads it.
//
//   - bigint: digits without leading zeros, and a minus; 00501 is a name.
//   - double precision: decimal numbers that the nearest double still tells
//     digit for digit, exponents included. Integers only up to 2^53, beyond which
//     doubles skip some. NaN and Infinity are words like others.
//   - boolean: true and false, in any case. 0 and 1 are numbers, t and f letters.
//   - date: yyyy-mm-dd, a real day of the years 0001 to 9999.
//   - timestamptz: RFC 3339, also with a space for the T. A time without a zone
//     is no instant, and Postgres keeps microseconds and no leap seconds.
//
// Everything else is text: padded, signed by a plus, hexadecimal, with
// thousands separators.
func typesOf(s string) typeSet {
	switch c := s[0]; {
	case c >= '0' && c <= '9':
		if len(s) >= len("yyyy-mm-dd") && s[4] == '-' {
			return timeType(s)
		}
		return numberTypes(s)
	case c == '-' || c == '.':
		return numberTypes(s)
	case c == 't' || c == 'T':
		if len(s) == len("true") && strings.EqualFold(s, "true") {
			return boolean
		}
	case c == 'f' || c == 'F':
		if len(s) == len("false") && strings.EqualFold(s, "false") {
			return boolean
		}
	}
	return 0
}

// Decimal numbers of up to 15 significant digits always survive the way to a
// double and back (DBL_DIG), and up to 17 are needed to tell doubles apart.
const (
	safeDigits = 15
	mostDigits = 17
	safeExp    = 290 // well within 308, where doubles end, and the 307 where they lose digits
	exactInt   = 1 << 53
)

// numberTypes parses -?(0|[1-9][0-9]*)?(\.[0-9]+)?([eE][+-]?[0-9]+)? with a
// digit before the exponent.
func numberTypes(s string) typeSet {
	i := 0
	if s[0] == '-' {
		i++
	}
	whole := i
	for i < len(s) && isDigit(s[i]) {
		i++
	}
	if i-whole > 1 && s[whole] == '0' {
		return 0 // a leading zero
	}
	if i == len(s) {
		return integerTypes(s, i-whole)
	}
	wholeEnd, fraction := i, i
	if s[i] == '.' {
		i++
		fraction = i
		for i < len(s) && isDigit(s[i]) {
			i++
		}
		if i == fraction {
			return 0
		}
	}
	if wholeEnd == whole && i == fraction {
		return 0 // no digit at all
	}
	mantissaEnd := i
	exp := 0
	if i < len(s) {
		if s[i] != 'e' && s[i] != 'E' {
			return 0
		}
		digits := strings.TrimPrefix(s[i+1:], "-")
		if len(digits) == len(s)-i-1 {
			digits = strings.TrimPrefix(digits, "+")
		}
		if len(digits) == 0 || len(digits) > 4 {
			return 0
		}
		for _, c := range []byte(digits) {
			if !isDigit(c) {
				return 0
			}
			exp = exp*10 + int(c-'0')
		}
		if s[i+1] == '-' {
			exp = -exp
		}
	}

	// The significant digits and the exponent of the first: 0.00120e5 is 12, 2.
	var buf [mostDigits]byte
	n, zeros := 0, 0 // digits so far, and zeros that count only if another digit follows
	for j := whole; j < mantissaEnd; j++ {
		switch {
		case j == wholeEnd: // the point
		case s[j] == '0' && n == 0:
		case s[j] == '0':
			zeros++
		default:
			if n == 0 {
				if exp += wholeEnd - 1 - j; j > wholeEnd {
					exp++
				}
			}
			if n+zeros >= mostDigits {
				return 0
			}
			for ; zeros > 0; zeros-- {
				buf[n] = '0'
				n++
			}
			buf[n] = s[j]
			n++
		}
	}
	if n == 0 || n <= safeDigits && -safeExp <= exp && exp <= safeExp || doubleTells(s, buf[:n], exp) {
		return double
	}
	return 0
}

// integerTypes is for a number without point and exponent.
func integerTypes(s string, digits int) typeSet {
	if digits == 0 || s == "-0" { // bigint has no -0, but double precision does
		if digits == 0 {
			return 0
		}
		return double
	}
	if digits <= safeDigits {
		return bigint | double
	}
	n, err := strconv.ParseInt(s, 10, 64)
	switch {
	case err != nil:
		return 0
	case -exactInt <= n && n <= exactInt:
		return bigint | double
	default:
		return bigint
	}
}

// doubleTells reports whether the double nearest to s gives the digits of s
// again, written as short as can be or with as many digits as s has. digits has
// neither leading nor trailing zeros; exp is the power of ten of the first.
func doubleTells(s string, digits []byte, exp int) bool {
	f, err := strconv.ParseFloat(s, 64)
	if err != nil || f == 0 || math.IsInf(f, 0) {
		return false // beyond the range, or so small that it became 0
	}
	for _, precision := range [...]int{-1, len(digits) - 1} {
		var buf [32]byte
		got := strconv.AppendFloat(buf[:0], math.Abs(f), 'e', precision, 64)
		mantissa, e, _ := bytes.Cut(got, []byte("e"))
		gotExp, err := strconv.Atoi(string(e))
		if err != nil || gotExp != exp {
			continue
		}
		first, rest, _ := bytes.Cut(mantissa, []byte("."))
		if first[0] == digits[0] && bytes.Equal(rest, digits[1:]) {
			return true
		}
	}
	return false
}

// timeType is for what begins like yyyy-.
func timeType(s string) typeSet {
	year, ok1 := parseDigits(s[0:4])
	month, ok2 := parseDigits(s[5:7])
	day, ok3 := parseDigits(s[8:10])
	if !ok1 || !ok2 || !ok3 || s[7] != '-' ||
		year < 1 || month < 1 || month > 12 || day < 1 || day > daysIn(year, time.Month(month)) {
		return 0
	}
	if len(s) == len("yyyy-mm-dd") {
		return date
	}
	if len(s) < len("yyyy-mm-ddThh:mm:ssZ") || (s[10] != 'T' && s[10] != ' ') || s[13] != ':' || s[16] != ':' {
		return 0
	}
	hour, ok1 := parseDigits(s[11:13])
	minute, ok2 := parseDigits(s[14:16])
	second, ok3 := parseDigits(s[17:19])
	if !ok1 || !ok2 || !ok3 || hour > 23 || minute > 59 || second > 59 {
		return 0
	}
	zone := s[19:]
	if zone[0] == '.' {
		i := 1
		for i < len(zone) && isDigit(zone[i]) {
			if i > 6 && zone[i] != '0' {
				return 0 // finer than a microsecond
			}
			i++
		}
		if i == 1 {
			return 0
		}
		zone = zone[i:]
	}
	if isZone(zone) {
		return timestamptz
	}
	return 0
}

// isZone accepts Z, ±hh:mm, ±hhmm and ±hh, up to the 15:59 that Postgres takes.
func isZone(s string) bool {
	if s == "Z" {
		return true
	}
	if len(s) < 3 || (s[0] != '+' && s[0] != '-') {
		return false
	}
	hour, ok := parseDigits(s[1:3])
	if !ok || hour > 15 {
		return false
	}
	if len(s) == 3 {
		return true
	}
	minute, ok := parseDigits(strings.TrimPrefix(s[3:], ":"))
	return ok && minute <= 59 && len(strings.TrimPrefix(s[3:], ":")) == 2
}

func parseDigits(s string) (n int, ok bool) {
	for i := range len(s) {
		if !isDigit(s[i]) {
			return 0, false
		}
		n = n*10 + int(s[i]-'0')
	}
	return n, true
}

func isDigit(c byte) bool { return c >= '0' && c <= '9' }

func daysIn(year int, month time.Month) int {
	return time.Date(year, month+1, 0, 0, 0, 0, 0, time.UTC).Day()
}

// systemColumns are names that every table has already.
var systemColumns = []string{"tableoid", "xmin", "cmin", "xmax", "cmax", "ctid"}

// columnNames makes the names of a header's fields valid and unique, so that
// SQL needs no quotes for them, unless they are words of SQL's own ("user").
//
// Letters are made small; letters, digits and underscores stay; a run of
// anything else becomes one underscore, and none at the ends: "Temp. (°C)" is
// temp_c. A name that would begin with a digit gets an underscore in front, one
// of which nothing stays is column_N, and one longer than 63 bytes is cut. The
// first to bear a name keeps it, the next are name_2, name_3; names that Postgres
// has for itself, such as xmin, count as borne already.
func columnNames(header []string) []string {
	names := make([]string, len(header))
	taken := make(map[string]bool, len(header)+len(systemColumns))
	for _, name := range systemColumns {
		taken[name] = true
	}
	var again []int
	for i, field := range header {
		names[i] = columnName(field, i+1)
		if taken[names[i]] {
			again = append(again, i)
		}
		taken[names[i]] = true
	}
	// Only now, so that a field that is spelt "a_2" keeps its name.
	next := make(map[string]int)
	for _, i := range again {
		base := names[i]
		n := max(next[base], 2)
		for ; taken[names[i]]; n++ {
			suffix := "_" + strconv.Itoa(n)
			names[i] = cutTo(base, pgtext.MaxIdentifier-len(suffix)) + suffix
		}
		next[base] = n
		taken[names[i]] = true
	}
	return names
}

func columnName(field string, n int) string {
	var b strings.Builder
	gap := false
	for _, r := range field {
		if r != '_' && !unicode.In(r, unicode.L, unicode.M, unicode.N) {
			gap = b.Len() > 0
			continue
		}
		if gap {
			b.WriteByte('_')
			gap = false
		}
		if b.Len() == 0 && (r >= '0' && r <= '9') {
			b.WriteByte('_')
		}
		b.WriteRune(unicode.ToLower(r))
		if b.Len() > pgtext.MaxIdentifier {
			break
		}
	}
	if b.Len() == 0 {
		return "column_" + strconv.Itoa(n)
	}
	return cutTo(b.String(), pgtext.MaxIdentifier)
}

// cutTo shortens s to at most n bytes, by whole characters.
func cutTo(s string, n int) string {
	if len(s) <= n {
		return s
	}
	for !utf8.RuneStart(s[n]) {
		n--
	}
	return s[:n]
}
