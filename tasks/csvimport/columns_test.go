package csvimport

import (
	"math"
	"math/big"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"github.com/carpool-go/carpool/internal/pgtext"
)

func TestTypes_AreThoseAValueFitsWithoutLosingAnything(t *testing.T) {
	t.Parallel()
	const (
		text      = typeSet(0)
		number    = bigint | double
		maxInt    = "9223372036854775807"
		beyondInt = "9223372036854775808"
	)
	for value, want := range map[string]typeSet{
		"0": number, "7": number, "-7": number, "1234567890": number,
		maxInt: bigint, "-9223372036854775808": bigint,
		beyondInt: text, "-9223372036854775809": text, "123456789012345678901": text,
		// 2^53 is the last integer up to which doubles have them all.
		"9007199254740992": number, "9007199254740993": bigint, "-9007199254740993": bigint,
		"00501": text, "-01": text, "00": text, "007.5": text, "-0": double,
		"+1": text, "1_000": text, "1,000": text, "0x1F": text, "0b1": text, "1 ": text, " 1": text, "--1": text, "-": text,

		"0.0": double, "12.80": double, "-89.23450472": double, ".5": double, "-.5": double, "-0.0": double,
		"5.": text, ".": text, "-.": text, "1.2.3": text, "1.5f": text,
		"1e5": double, "1E5": double, "1e-05": double, "1.5e+3": double, "0e0": double, ".5e1": double,
		"1e": text, "1e+": text, "e5": text, "1e+-5": text, "1e-+5": text, "1e++5": text, "1e5.0": text, "1e99999": text,
		"1e308": double, "1.8e308": text, "1e400": text, "1e-400": text,
		"2.2250738585072014e-308": double, "5e-324": double, "3e-324": text, "1.2345e-320": text,
		// The double nearest to it says 0.30000000000000004 again.
		"0.30000000000000004": double, "0.1000000000000000055": text, "0.12345678901234567": text, /* reads …68 */
		"1.0000000000000001":    text,   // reads 1
		"5.960464477539063e-08": double, // 2^-24 as it is written, though 062 is as near
		"1.0000000000000002":    double, "0.99999999999999999": text, "9999999999999999.5": text,
		"100.00000000000000000000": double, "123456789.123456789": text, "123456789012345678.5": text,
		"NaN": text, "nan": text, "Infinity": text, "-inf": text, "inf": text,

		"true": boolean, "FALSE": boolean, "True": boolean,
		"t": text, "f": text, "yes": text, "on": text, "truе": text /* a Cyrillic e */, "truth": text,

		"2012-01-01": date, "2024-02-29": date, "0001-01-01": date, "9999-12-31": date, "2000-02-29": date,
		"2023-02-29": text, "1900-02-29": text, "2012-13-01": text, "2012-00-10": text, "2012-04-31": text, "0000-01-01": text,
		"2012-1-1": text, "12012-01-01": text, "01/02/2003": text, "2012-01-01 ": text, "20120101": number, "2012-01": text, "2012-W01-1": text,

		"2012-01-01T10:00:00Z": timestamptz, "2012-01-01 10:00:00+01": timestamptz, "2012-01-01T10:00:00+05:30": timestamptz,
		"2012-01-01T10:00:00-0800": timestamptz, "2012-01-01T10:00:00.123456Z": timestamptz, "2012-01-01T10:00:00.1234560Z": timestamptz,
		"2012-01-01T10:00:00.1234567Z": text, "2012-01-01T10:00:00.Z": text, "2012-01-01T10:00:00": text, "2012-01-01 10:00:00.5": text,
		"2012-01-01T24:00:00Z": text, "2016-12-31T23:59:60Z": text, "2012-01-01T10:60:00Z": text, "2012-02-30T10:00:00Z": text,
		"2012-01-01T10:00:00+16:00": text, "2012-01-01T10:00:00+05:60": text, "2012-01-01T10:00:00+5": text, "2012-01-01T10:00:00+05:": text,
		"2012-01-01T10:00:00 Z": text, "2012-01-01T10:00:00Zulu": text, "2012-01-01X10:00:00Z": text, "2012-01-01T10:00Z": text,
		"2012-01-01T10-00-00Z": text, "2012-01-01T": text, "2012-01-01T10:00:00 Europe/Berlin": text,

		"drizzle": text, "é": text, "\\N": text, "-infinity": text, "now": text, "today": text,
	} {
		if got := typesOf(value); got != want {
			t.Errorf("%q fits %s, want %s", value, typeList(got), typeList(want))
		}
	}
}

func typeList(types typeSet) string {
	var names []string
	for _, t := range typeNames {
		if types&t.typ != 0 {
			names = append(names, t.name)
		}
	}
	return "{" + strings.Join(append(names, "text"), ", ") + "}"
}

func TestInferredColumn_TypeIsWhatEveryValueFitsInAnyOrder(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		want   string
		values []string
	}{
		{"text", nil},
		{"text", []string{""}},
		{"bigint", []string{"1", "", "9223372036854775807"}},
		{"double precision", []string{"1", "1.5", "9007199254740992"}},
		{"text", []string{"1.5", "9007199254740993"}}, // the integer would lose its last digit
		{"text", []string{"1", "9223372036854775808"}},
		{"text", []string{"1", "00501"}},
		{"text", []string{"1", "x"}},
		{"boolean", []string{"true", "", "FALSE"}},
		{"text", []string{"true", "0"}},
		{"date", []string{"2012-01-01", "2012-12-31"}},
		{"text", []string{"2012-01-01", "2012-01-01T10:00:00Z"}},
		{"timestamptz", []string{"2012-01-01T10:00:00Z", "2012-01-01 10:00:00+01"}},
		{"double precision", []string{"-0", "1"}},
	} {
		for _, values := range permutations(tc.values) {
			c := inferredColumn{fits: anyType}
			for i, v := range values {
				if v != "" {
					c.used = true
					c.misfit(c.fits&^typesOf(v), i+2)
				}
			}
			if got := c.typeName(); got != tc.want {
				t.Errorf("%q gave %s, want %s", values, got, tc.want)
			}
		}
	}
}

func permutations(s []string) [][]string {
	if len(s) < 2 {
		return [][]string{s}
	}
	var all [][]string
	for i := range s {
		for _, rest := range permutations(slices.Delete(slices.Clone(s), i, i+1)) {
			all = append(all, append([]string{s[i]}, rest...))
		}
	}
	return all
}

func TestInferredColumn_RemembersTheFirstLineThatDoesNotFit(t *testing.T) {
	t.Parallel()
	c := inferredColumn{fits: anyType}
	for line, v := range []string{2: "1", 3: "1.5", 4: "x", 5: "y"} {
		if v != "" {
			c.misfit(c.fits&^typesOf(v), line)
		}
	}
	if got := [...]int{c.misfitLine(bigint), c.misfitLine(double), c.misfitLine(date)}; got != [...]int{3, 4, 2} {
		t.Errorf("bigint, double and date end in lines %v, want 3, 4, 2", got)
	}
}

// What Go's own parsers say of a value must agree with the types it was given.
func FuzzTypes(f *testing.F) {
	for _, s := range []string{
		"0", "-12", "00501", "9007199254740993", "1.5", ".5", "1e-05", "0.30000000000000004", "1.0000000000000001", "5e-324",
		"true", "2024-02-29", "2012-01-01T10:00:00.1234560+05:30", "2012-01-01 10:00:00-08", "-0", "1e308", "17976931348623157e292",
	} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		if s == "" {
			return
		}
		types := typesOf(s)
		if types != 0 {
			for _, c := range []byte(s) {
				if c >= utf8.RuneSelf || c == 0 {
					t.Fatalf("%q fits %s, but isn't ASCII", s, typeList(types))
				}
			}
		}
		n, err := strconv.ParseInt(s, 10, 64)
		if isInt := err == nil && strconv.FormatInt(n, 10) == s; isInt != (types&bigint != 0) {
			t.Errorf("%q fits %s; is it an integer? %t", s, typeList(types), isInt)
		}
		if types&double != 0 {
			checkDouble(t, s)
		}
		_, err = time.Parse("2006-01-02", s)
		if isDate := err == nil && s >= "0001"; isDate != (types&date != 0) {
			t.Errorf("%q fits %s; is it a date? %t", s, typeList(types), isDate)
		}
		if types&timestamptz != 0 {
			at, err := parseInstant(s)
			if err != nil || !at.Equal(at.Truncate(time.Microsecond)) {
				t.Errorf("%q is no instant: %v, %v", s, at, err)
			}
		}
		if types&boolean != 0 && strings.ToLower(s) != "true" && strings.ToLower(s) != "false" {
			t.Errorf("%q fits boolean", s)
		}
	})
}

// checkDouble checks that the double is written like the text, or that they differ
// by no more than half of the text's last digit.
func checkDouble(t *testing.T, s string) {
	t.Helper()
	f, err := strconv.ParseFloat(s, 64)
	if err != nil || math.IsInf(f, 0) || math.IsNaN(f) {
		t.Fatalf("%q fits double precision, but: %v, %v", s, f, err)
	}
	want, ok := new(big.Rat).SetString(s)
	if !ok {
		t.Fatalf("%q fits double precision, but isn't decimal", s)
	}
	if written, _ := new(big.Rat).SetString(strconv.FormatFloat(f, 'e', -1, 64)); written.Cmp(want) == 0 {
		return
	}
	mantissa, e, _ := strings.Cut(strings.ToLower(s), "e")
	exp, _ := strconv.Atoi(e)
	whole, fraction, _ := strings.Cut(mantissa, ".")
	fraction = strings.TrimRight(fraction, "0")
	last := exp - len(fraction)
	if fraction == "" {
		last += len(whole) - len(strings.TrimRight(whole, "0"))
	}
	half, _ := new(big.Rat).SetString("0.5e" + strconv.Itoa(last))
	diff := new(big.Rat).Sub(want, new(big.Rat).SetFloat64(f))
	if want.Sign() != 0 && diff.Abs(diff).Cmp(half) > 0 {
		t.Errorf("%q fits double precision, but reads %v", s, f)
	}
}

func parseInstant(s string) (time.Time, error) {
	s = s[:10] + "T" + s[11:]
	var err error
	for _, layout := range []string{time.RFC3339Nano, "2006-01-02T15:04:05.999999999Z0700", "2006-01-02T15:04:05.999999999Z07"} {
		var at time.Time
		if at, err = time.Parse(layout, s); err == nil {
			return at, nil
		}
	}
	return time.Time{}, err
}

func TestTypes_NumbersThatProgramsWriteAreNumbers(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		n := rapid.Int64().Draw(t, "n")
		if s := strconv.FormatInt(n, 10); typesOf(s)&bigint == 0 {
			t.Errorf("%s is not bigint", s)
		}
		f := rapid.Float64().Draw(t, "f")
		for _, s := range []string{strconv.FormatFloat(f, 'e', -1, 64), strconv.FormatFloat(f, 'e', 16, 64)} {
			if typesOf(s)&double == 0 {
				t.Errorf("%s is not double precision", s)
			}
		}
		at := time.Unix(rapid.Int64Range(0, 4e9).Draw(t, "at"), 0).UTC()
		if s := at.Format(time.DateOnly); typesOf(s) != date {
			t.Errorf("%s is not a date", s)
		}
		if s := at.Format(time.RFC3339); typesOf(s) != timestamptz {
			t.Errorf("%s is not an instant", s)
		}
	})
}

func TestColumnNames_AreValidAndUnique(t *testing.T) {
	t.Parallel()
	long := strings.Repeat("x", 70)
	euros := strings.Repeat("é", 40) // 80 bytes
	for _, tc := range []struct{ header, want []string }{
		{[]string{"date", "temp_max", "Wind"}, []string{"date", "temp_max", "wind"}},
		{[]string{" Temp. (°C) ", "a - b", "A/B"}, []string{"temp_c", "a_b", "a_b_2"}},
		{[]string{"", "  ", "%"}, []string{"column_1", "column_2", "column_3"}},
		{[]string{"2020", "1st"}, []string{"_2020", "_1st"}},
		{[]string{"_id", "__x__"}, []string{"_id", "__x__"}},
		{[]string{"größe", "ÜBER", "温度", "é́"}, []string{"größe", "über", "温度", "é́"}},
		{[]string{"a", "a", "A"}, []string{"a", "a_2", "a_3"}},
		{[]string{"a", "a", "a_2"}, []string{"a", "a_3", "a_2"}},
		{[]string{"a_2", "a", "a"}, []string{"a_2", "a", "a_3"}},
		{[]string{"column_2", ""}, []string{"column_2", "column_2_2"}},
		{[]string{"xmin", "ymin", "CTID"}, []string{"xmin_2", "ymin", "ctid_2"}},
		{[]string{"user", "select", `"; DROP TABLE x`}, []string{"user", "select", "drop_table_x"}},
		{[]string{long, long}, []string{long[:63], long[:61] + "_2"}},
		{[]string{euros, euros}, []string{euros[:62], euros[:60] + "_2"}},
	} {
		if diff := cmp.Diff(tc.want, columnNames(tc.header)); diff != "" {
			t.Errorf("names of %q (-want +got):\n%s", tc.header, diff)
		}
	}
}

var plainName = regexp.MustCompile(`^[_\pL\pM\pN][_\pL\pM\pN]*$`)

func FuzzColumnNames(f *testing.F) {
	f.Add("a,a,a_2,A,,xmin,2020, Temp. (°C) ,größe")
	f.Add(strings.Repeat("é", 40) + "," + strings.Repeat("é", 40))
	f.Fuzz(func(t *testing.T, s string) {
		header := strings.Split(strings.ToValidUTF8(s, ""), ",")
		seen := map[string]bool{}
		for i, name := range columnNames(header) {
			if !plainName.MatchString(name) || !utf8.ValidString(name) || len(name) > pgtext.MaxIdentifier || isDigit(name[0]) {
				t.Errorf("%q became %q, which isn't a name", header[i], name)
			}
			if seen[name] || slices.Contains(systemColumns, name) {
				t.Errorf("%q became %q, which is taken", header[i], name)
			}
			seen[name] = true
		}
	})
}
