package csvimport

import (
	"math"
	"regexp"
	"strconv"
	"strings"
	"unicode/utf8"

	"github.com/jackc/pgx/v5/pgtype"
)

// keeper reports whether a type keeps everything that a value, not empty, says, as
// [typesOf] means it. It is asked of types that take values silently which they then round,
// cut, or strip of a part. What Postgres refuses by itself may pass.
type keeper func(value string) bool

// moneyOID is of a type that pgtype has no name for.
const moneyOID = 790

// columnType is a column's type, without its domains and containers.
type columnType struct {
	OID    uint32
	Typmod int32 // -1 if it has none
	// Composite is true for a row type.
	Composite bool
	// Path has what is around it, from the outside in: a for an array, r for a range, m for
	// a multirange.
	Path string
}

// keeperOf returns nil for a type that keeps whatever Postgres takes for it. moneyCents
// says that money has cents, and a point before them.
func keeperOf(t columnType, moneyCents bool) keeper {
	keep := scalarKeeper(t, moneyCents)
	for i := len(t.Path) - 1; keep != nil && i >= 0; i-- {
		keep = containerKeeper(t.Path[i], keep)
	}
	return keep
}

func scalarKeeper(t columnType, moneyCents bool) keeper {
	if t.Composite {
		return func(string) bool { return false } // its fields are not looked at
	}
	precision := 6
	if t.Typmod >= 0 {
		precision = int(t.Typmod)
	}
	n := int(t.Typmod) - 4 // of a text type, and the encoded digits of a numeric
	switch t.OID {
	case pgtype.Int2OID, pgtype.Int4OID, pgtype.Int8OID:
		return func(v string) bool { return typesOf(v)&bigint != 0 }
	case pgtype.OIDOID, pgtype.XIDOID, pgtype.CIDOID: // which take -1 for 4294967295
		return func(v string) bool { return typesOf(v)&bigint != 0 && v[0] != '-' }
	case pgtype.Float8OID:
		return func(v string) bool { return typesOf(v)&double != 0 }
	case pgtype.Float4OID:
		return realTells
	case pgtype.PointOID, pgtype.LsegOID, pgtype.PathOID, pgtype.BoxOID, pgtype.PolygonOID, pgtype.LineOID, pgtype.CircleOID:
		return func(v string) bool {
			for number := range strings.FieldsFuncSeq(v, func(r rune) bool { return strings.ContainsRune("()[]{}<>, ", r) }) {
				if typesOf(number)&double == 0 {
					return false
				}
			}
			return true
		}
	case pgtype.NumericOID:
		if t.Typmod >= 0 {
			scale := n&0x7ff ^ 0x400 - 0x400 // eleven bits with a sign
			return func(v string) bool { return numericKeeps(v, scale) }
		}
	case moneyOID:
		return func(v string) bool { return moneyCents && plainMoney.MatchString(v) }
	case pgtype.DateOID:
		return func(v string) bool { return typesOf(v)&date != 0 }
	case pgtype.TimestamptzOID:
		return func(v string) bool { return typesOf(v)&timestamptz != 0 && precise(v, precision) }
	case pgtype.TimestampOID:
		return func(v string) bool { return plainTimestamp.MatchString(v) && precise(v, precision) }
	case pgtype.TimeOID:
		return func(v string) bool { return plainTime.MatchString(v) && precise(v, precision) }
	case pgtype.TimetzOID:
		return func(v string) bool { return plainTimetz.MatchString(v) && precise(v, precision) }
	case pgtype.IntervalOID:
		return intervalKeeper(t.Typmod)
	case pgtype.VarcharOID:
		if n >= 0 { // Postgres refuses what is too long, unless it is blanks that are
			return func(v string) bool {
				return len(v) <= n || utf8.RuneCountInString(v) <= n || utf8.RuneCountInString(strings.TrimRight(v, " ")) > n
			}
		}
	case pgtype.BPCharOID:
		if n >= 0 { // it is filled up with blanks
			return func(v string) bool { return v[len(v)-1] != ' ' || utf8.RuneCountInString(v) == n }
		}
	case pgtype.NameOID:
		return func(v string) bool { return len(v) < 64 }
	case pgtype.QCharOID:
		return func(v string) bool { return len(v) == 1 }
	}
	return nil
}

// realTells reports whether the real nearest to a number gives its digits again, written as
// short as can be or with as many digits as it has.
func realTells(v string) bool {
	if typesOf(v)&(bigint|double) == 0 {
		return false
	}
	// A number that typesOf calls double can be told from others by its double.
	number, err := strconv.ParseFloat(v, 64)
	if err != nil {
		return false
	}
	f, err := strconv.ParseFloat(v, 32)
	if err != nil {
		return false
	}
	const most = 9 // digits that tell reals apart
	for _, text := range [...]string{
		strconv.FormatFloat(f, 'e', -1, 32),
		strconv.FormatFloat(f, 'e', min(significant(v), most)-1, 64),
	} {
		if told, err := strconv.ParseFloat(text, 64); err == nil && told == number {
			return true
		}
	}
	return false
}

// significant is how many significant digits a number has, 1 or more. Zeros at its end are none.
func significant(v string) int {
	mantissa, _, _ := strings.Cut(strings.ToLower(v), "e")
	digits := strings.Trim(strings.NewReplacer(".", "", "-", "").Replace(mantissa), "0")
	return max(len(digits), 1)
}

var decimal = regexp.MustCompile(`^[-+]?([0-9]*)\.?([0-9]*)(?:[eE]([-+]?[0-9]{1,6}))?$`)

// numericKeeps reports whether a number has no digit beyond so many after the point.
func numericKeeps(v string, scale int) bool {
	v = strings.TrimSpace(v)
	m := decimal.FindStringSubmatch(v)
	if m == nil {
		switch strings.ToLower(strings.TrimLeft(v, "+-")) {
		case "nan", "inf", "infinity":
			return true
		}
		return false
	}
	exp, _ := strconv.Atoi(m[3]) // 0 without one
	digits := strings.TrimRight(m[1]+m[2], "0")
	return strings.Trim(digits, "0") == "" || len(digits)-len(m[1])-exp <= scale
}

const (
	timeOfDay = `([01]\d|2[0-4]):[0-5]\d(:[0-5]\d(\.\d+)?)?`
	zone      = `(Z|[-+]\d\d(:?[0-5]\d)?)`
)

// These are the forms that mean the same whatever the session's settings are, and in which
// nothing stands that the type leaves out.
var (
	plainTime      = regexp.MustCompile(`^` + timeOfDay + `$`)
	plainTimetz    = regexp.MustCompile(`^` + timeOfDay + zone + `$`)
	plainTimestamp = regexp.MustCompile(`^(\d{4}-\d\d-\d\d([T ]` + timeOfDay + `)?|-?infinity)$`)
	plainMoney     = regexp.MustCompile(`^-?[0-9]+(\.[0-9]{1,2}0*)?$`)
)

// precise reports whether what follows the point has no digit beyond so many.
func precise(v string, digits int) bool {
	_, fraction, ok := strings.Cut(v, ".")
	if !ok {
		return true
	}
	n := 0
	for i := 0; i < len(fraction) && isDigit(fraction[i]); i++ {
		if fraction[i] != '0' {
			n = i + 1
		}
	}
	return n <= digits
}

var (
	intervalFraction = regexp.MustCompile(`(\.[0-9]*)[ \t]*([a-z]*)`)
	exponent         = regexp.MustCompile(`[0-9.]e[-+]?[0-9]`)
)

// intervalKeeper is for intervals of all fields. One that is restricted to some of them
// cuts the others, and none is taken for it.
func intervalKeeper(typmod int32) keeper {
	const allFields, anyPrecision = 0x7fff, 0xffff
	precision := 6
	if typmod >= 0 {
		if typmod>>16&allFields != allFields {
			return func(string) bool { return false }
		}
		if p := typmod & anyPrecision; p != anyPrecision {
			precision = int(p)
		}
	}
	return func(v string) bool {
		v = strings.ToLower(v)
		if exponent.MatchString(v) {
			return false
		}
		for _, m := range intervalFraction.FindAllStringSubmatch(v, -1) {
			if strings.Trim(m[1], ".0") == "" {
				continue
			}
			switch m[2] {
			case "", "ago", "s", "sec", "secs", "second", "seconds":
				if !precise(m[1], precision) {
					return false
				}
			case "h", "hr", "hrs", "hour", "hours", "min", "mins", "minute", "minutes", "d", "day", "days", "w", "week", "weeks":
				// A millionth of any of them is whole microseconds.
				if precision < 6 || !precise(m[1], 6) {
					return false
				}
			default: // a part of a month or a year is days of some length
				return false
			}
		}
		return true
	}
}

// containerKeeper asks keep for each element of an array, and for each bound of a range or
// a multirange. What can't be taken apart is not kept.
func containerKeeper(kind byte, keep keeper) keeper {
	types := pgtype.NewMap()
	text := &pgtype.Type{Name: "text", OID: pgtype.TextOID, Codec: pgtype.TextCodec{}}
	ranges := &pgtype.Type{Name: "range", OID: math.MaxUint32, Codec: &pgtype.RangeCodec{ElementType: text}}
	multirange := &pgtype.MultirangeCodec{ElementType: ranges}
	types.RegisterType(ranges)
	types.RegisterType(&pgtype.Type{Name: "multirange", OID: math.MaxUint32 - 1, Codec: multirange})
	keeps := func(v pgtype.Text) bool { return !v.Valid || v.String == "" || keep(v.String) }
	inRange := func(r pgtype.Range[pgtype.Text]) bool { return keeps(r.Lower) && keeps(r.Upper) }
	switch kind {
	case 'a':
		return func(v string) bool {
			var elements pgtype.FlatArray[pgtype.Text]
			if types.Scan(pgtype.TextArrayOID, pgtype.TextFormatCode, []byte(v), &elements) != nil {
				return false
			}
			for _, e := range elements {
				if !keeps(e) {
					return false
				}
			}
			return true
		}
	case 'r':
		return func(v string) bool {
			var r pgtype.Range[pgtype.Text]
			return types.Scan(math.MaxUint32, pgtype.TextFormatCode, []byte(v), &r) == nil && inRange(r)
		}
	default:
		return func(v string) bool {
			var all pgtype.Multirange[pgtype.Range[pgtype.Text]]
			if types.Scan(math.MaxUint32-1, pgtype.TextFormatCode, []byte(v), &all) != nil {
				return false
			}
			for _, r := range all {
				if !inRange(r) {
					return false
				}
			}
			return true
		}
	}
}
