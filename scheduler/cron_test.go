package scheduler

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/robfig/cron/v3"
	"pgregory.net/rapid"
)

func mustParse(t interface {
	Helper()
	Fatal(...any)
}, expression, zone string,
) Schedule {
	t.Helper()
	s, err := ParseSchedule(expression, zone)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// Each case lists the ticks of a day or so on which the clocks change, by the
// clock on the wall with its offset from UTC.
func TestSchedule_WhereTheClocksChange(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name, zone, cron, from string
		want                   []string
	}{
		{
			"a skipped time runs once, when the clocks are put forward", "Europe/Berlin", "30 2 * * *", "2026-03-28T00:00",
			[]string{"28 02:30 +01:00", "29 03:00 +02:00", "30 02:30 +02:00"},
		},
		{
			"several skipped times run once", "Europe/Berlin", "*/10 2 * * 0", "2026-03-29T00:00",
			[]string{"29 03:00 +02:00", "05 02:00 +02:00"},
		},
		{
			"a tick that is due at the end of the gap anyway isn't doubled", "Europe/Berlin", "*/30 1-3 * * *", "2026-03-29T00:00",
			[]string{"29 01:00 +01:00", "29 01:30 +01:00", "29 03:00 +02:00", "29 03:30 +02:00", "30 01:00 +02:00"},
		},
		{
			"a doubled time runs the first time", "Europe/Berlin", "30 2 * * *", "2026-10-25T00:00",
			[]string{"25 02:30 +02:00", "26 02:30 +01:00"},
		},
		{
			"of a doubled hour with several ticks the first runs", "Europe/Berlin", "*/30 1-3 * * *", "2026-10-25T00:00",
			[]string{"25 01:00 +02:00", "25 01:30 +02:00", "25 02:00 +02:00", "25 02:30 +02:00", "25 03:00 +01:00", "25 03:30 +01:00"},
		},
		{
			"every hour: no pause and no doubling in spring", "Europe/Berlin", "15 * * * *", "2026-03-29T01:00",
			[]string{"29 01:15 +01:00", "29 03:15 +02:00", "29 04:15 +02:00"},
		},
		{
			"every hour: no pause in autumn", "Europe/Berlin", "15 * * * *", "2026-10-25T01:00",
			[]string{"25 01:15 +02:00", "25 02:15 +02:00", "25 02:15 +01:00", "25 03:15 +01:00"},
		},
		{
			"New York, spring", "America/New_York", "15 2 * * *", "2026-03-08T00:00",
			[]string{"08 03:00 -04:00", "09 02:15 -04:00"},
		},
		{
			"New York, autumn", "America/New_York", "15 1 * * *", "2026-11-01T00:00",
			[]string{"01 01:15 -04:00", "02 01:15 -05:00"},
		},
		{
			"Lord Howe, half an hour forward", "Australia/Lord_Howe", "15 2 * * *", "2026-10-04T00:00",
			[]string{"04 02:30 +11:00", "05 02:15 +11:00"},
		},
		{
			"Lord Howe, half an hour forward, every hour: none is left out", "Australia/Lord_Howe", "15 * * * *", "2026-10-04T01:00",
			[]string{"04 01:15 +10:30", "04 02:30 +11:00", "04 03:15 +11:00"},
		},
		{
			"Lord Howe, half an hour back", "Australia/Lord_Howe", "45 1 * * *", "2026-04-05T00:00",
			[]string{"05 01:45 +11:00", "06 01:45 +10:30"},
		},
		{
			"Beirut has no midnight in spring", "Asia/Beirut", "0 0 * * *", "2026-03-28T00:00",
			[]string{"28 00:00 +02:00", "29 01:00 +03:00", "30 00:00 +03:00"},
		},
		{
			"Beirut, 23:30 twice in autumn", "Asia/Beirut", "30 23 * * *", "2026-10-24T12:00",
			[]string{"24 23:30 +03:00", "25 23:30 +02:00"},
		},
		{
			"São Paulo had no midnight on a Sunday", "America/Sao_Paulo", "@weekly", "2018-10-28T00:00",
			[]string{"28 00:00 -03:00", "04 01:00 -02:00", "11 00:00 -02:00"},
		},
		{
			"Apia had no 30 December", "Pacific/Apia", "0 9 * * *", "2011-12-29T00:00",
			[]string{"29 09:00 -10:00", "31 00:00 +14:00", "31 09:00 +14:00"},
		},
		{"UTC knows none of this", "", "30 2 * * *", "2026-03-29T00:00", []string{"29 02:30 Z", "30 02:30 Z"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			s := mustParse(t, c.cron, c.zone)
			at, err := time.ParseInLocation("2006-01-02T15:04", c.from, s.zone)
			if err != nil {
				t.Fatal(err)
			}
			at = at.Add(-1)
			var got []string
			for range c.want {
				at = s.Next(at)
				got = append(got, at.In(s.zone).Format("02 15:04 Z07:00"))
			}
			if diff := cmp.Diff(c.want, got); diff != "" {
				t.Error(diff)
			}
		})
	}
}

var zones = []string{"UTC", "Europe/Berlin", "America/New_York", "Australia/Lord_Howe", "Asia/Beirut"}

// expressions are cron expressions of every form.
func expressions() *rapid.Generator[string] {
	return rapid.Custom(func(t *rapid.T) string {
		if rapid.IntRange(0, 9).Draw(t, "name") == 0 {
			return rapid.SampledFrom([]string{"@hourly", "@daily", "@weekly", "@monthly", "@yearly"}).Draw(t, "named")
		}
		field := func(name string, low, high int) string {
			a := rapid.IntRange(low, high).Draw(t, name)
			switch rapid.IntRange(0, 4).Draw(t, name+" form") {
			case 0:
				return fmt.Sprint(a)
			case 1:
				return fmt.Sprintf("%d-%d", a, rapid.IntRange(a, high).Draw(t, name+" to"))
			case 2:
				return fmt.Sprintf("%d,%d", a, rapid.IntRange(low, high).Draw(t, name+" too"))
			case 3:
				return fmt.Sprintf("*/%d", rapid.IntRange(1, high).Draw(t, name+" step"))
			default:
				return "*"
			}
		}
		return strings.Join([]string{
			field("minute", 0, 59), field("hour", 0, 23), field("day", 1, 28), field("month", 1, 12), field("weekday", 0, 6),
		}, " ")
	})
}

// A year of ticks in five zones is that of robfig's parser, but for the days on
// which the clocks change.
func TestSchedule_AgreesWithRobfigsWhereNoClockChanges(t *testing.T) {
	t.Parallel()
	compare := func(t interface {
		Helper()
		Fatal(...any)
		Fatalf(string, ...any)
	}, expression, zone string, leap time.Duration, // passed over after each hundred ticks
	) {
		t.Helper()
		mine := mustParse(t, expression, zone)
		robfigs, err := cron.ParseStandard("CRON_TZ=" + zone + " " + expression)
		if err != nil {
			t.Fatal(err)
		}
		from := time.Date(2026, 1, 1, 0, 0, 0, 0, mine.zone)
		end := from.AddDate(1, 0, 0)
		for from.Before(end) {
			// One stretch without a change, less what is near to one.
			_, change := from.ZoneBounds()
			until := end
			if !change.IsZero() && change.Before(end) {
				until = change.Add(-24 * time.Hour)
			}
			for at, n := from, 1; ; n++ {
				want, got := robfigs.Next(at), mine.Next(at)
				if !want.Before(until) {
					break
				}
				if !got.Equal(want) {
					t.Fatalf("%q in %s, after %s: %s, robfig's says %s", expression, zone, at, got.In(mine.zone), want)
				}
				at = want
				if n%100 == 0 {
					at = at.Add(leap)
				}
			}
			if !until.Before(end) {
				break
			}
			from = change.Add(24 * time.Hour).In(mine.zone)
		}
	}
	for _, zone := range zones {
		for _, expression := range []string{"*/7 * * * *", "0 0 * * *", "30 2 * * *", "15 3 13 * 5", "@monthly", "0 12 * * 1-5"} {
			compare(t, expression, zone, 0)
		}
	}
	rapid.Check(t, func(t *rapid.T) {
		expression := expressions().Draw(t, "cron")
		if f := strings.Fields(expression); len(f) == 5 && (strings.HasPrefix(f[2], "*/") || strings.HasPrefix(f[4], "*/")) {
			return // robfig's has another rule for the days
		}
		compare(t, expression, rapid.SampledFrom(zones).Draw(t, "zone"), 5*24*time.Hour)
	})
}

// days is a field of days in any form, and the days that it has.
func days(low, high int) *rapid.Generator[struct {
	text string
	has  map[int]bool
}] {
	return rapid.Custom(func(t *rapid.T) (field struct {
		text string
		has  map[int]bool
	},
	) {
		field.has = make(map[int]bool)
		var values []string
		for range rapid.IntRange(1, 3).Draw(t, "values") {
			from, to, text := low, high, rapid.SampledFrom([]string{"*", "?", "value", "range"}).Draw(t, "form")
			switch text {
			case "value":
				from = rapid.IntRange(low, high).Draw(t, "value")
				to, text = from, fmt.Sprint(from)
			case "range":
				from = rapid.IntRange(low, high).Draw(t, "from")
				to = rapid.IntRange(from, high).Draw(t, "to")
				text = fmt.Sprintf("%d-%d", from, to)
			}
			step := 1
			if from < to && rapid.Bool().Draw(t, "with a step") {
				step = rapid.IntRange(1, high-low+1).Draw(t, "step")
				text += fmt.Sprintf("/%d", step)
			}
			for n := from; n <= to; n += step {
				field.has[n] = true
			}
			values = append(values, text)
		}
		field.text = strings.Join(values, ",")
		return field
	})
}

func TestSchedule_ItsDaysAreThoseOfVixiesCron(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		month, week := days(1, 31).Draw(t, "day of the month"), days(0, 6).Draw(t, "day of the week")
		blanks := rapid.SampledFrom([]string{" ", "\t", " \t "}).Draw(t, "blanks")
		expression := strings.Join([]string{"0", "0", month.text, "*", week.text}, blanks)
		both := strings.ContainsAny(month.text[:1], "*?") || strings.ContainsAny(week.text[:1], "*?")
		s, err := ParseSchedule(expression, "")
		if err != nil {
			t.Fatal(err)
		}
		next := s.Next(time.Date(2027, 12, 31, 0, 0, 0, 0, time.UTC))
		for day := time.Date(2028, 1, 1, 0, 0, 0, 0, time.UTC); day.Year() == 2028; day = day.AddDate(0, 0, 1) {
			inMonth, inWeek := month.has[day.Day()], week.has[int(day.Weekday())]
			if want := inMonth && inWeek || !both && (inMonth || inWeek); want != next.Equal(day) {
				t.Fatalf("%q: it is %t that %s is a day of it, and the next one is %s", expression, want, day.Format("Mon 2006-01-02"), next)
			}
			if next.Equal(day) {
				next = s.Next(next)
			}
		}
	})
}

// The rule, told in another way than it is computed: by going through every
// minute of the days around a change.
func TestSchedule_EachTimeOfDayRunsOncePerDayHoweverTheClocksChange(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		zone := rapid.SampledFrom([]string{"Europe/Berlin", "America/New_York", "Australia/Lord_Howe", "Asia/Beirut", "UTC"}).Draw(t, "zone")
		expression := expressions().Draw(t, "cron")
		s := mustParse(t, expression, zone)
		if s.everyHour() {
			return // it has a rule of its own, see the cases
		}
		day := rapid.IntRange(0, 364).Draw(t, "day")
		_, change := time.Date(2026, 1, 1, 0, 0, 0, 0, s.zone).AddDate(0, 0, day).ZoneBounds()
		if change.IsZero() {
			change = time.Date(2026, 5, 5, 2, 0, 0, 0, s.zone)
		}
		from, to := change.Add(-26*time.Hour), change.Add(26*time.Hour)

		names := *s.spec // tells whether the entry names a time of day
		named := func(wall time.Time) bool { return names.Next(wall.Add(-1)).Equal(wall) }
		want := map[int64]bool{}
		shown := map[time.Time]bool{} // by the clock on the wall
		for at := from.Add(-2 * time.Hour); at.Before(to); at = at.Add(time.Minute) {
			wall := at.UTC().Add(offsetAt(at, s.zone))
			for skipped := at.Add(-1).UTC().Add(offsetAt(at.Add(-1), s.zone)).Add(1); skipped.Before(wall); skipped = skipped.Add(time.Minute) {
				if named(skipped) && !at.Before(from) {
					want[at.Unix()] = true
				}
			}
			if !shown[wall] && named(wall) && !at.Before(from) {
				want[at.Unix()] = true
			}
			shown[wall] = true
		}
		got := map[int64]bool{}
		for at := s.Next(from.Add(-1)); !at.IsZero() && at.Before(to); at = s.Next(at) {
			got[at.Unix()] = true
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Fatalf("%q in %s around %s: %s", expression, zone, change, diff)
		}
	})
}

func TestSchedule_EveryIsCountedFrom1970ForAll(t *testing.T) {
	t.Parallel()
	s := mustParse(t, "@every 7m", "Asia/Tokyo")
	for at, i := time.Unix(1_800_000_001, 5), 0; i < 1000; i++ {
		next := s.Next(at)
		if next.Unix()%420 != 0 || !next.After(at) || next.Sub(at) > 7*time.Minute {
			t.Fatalf("after %s comes %s", at, next)
		}
		at = next.Add(time.Duration(i) * time.Millisecond)
	}
	if next := s.Next(time.Unix(-1, 0)); next.Unix() != 0 {
		t.Errorf("after -1 comes %d", next.Unix())
	}
}

func TestParseSchedule_NamesTheFieldAndTheWayOut(t *testing.T) {
	t.Parallel()
	for _, c := range []struct{ cron, zone, want string }{
		{"", "", "cron: "},
		{"* * * *", "", "cron: "},
		{"* * * * * *", "", "cron: "},
		{"61 * * * *", "", "@every 90s"},
		{"TZ=UTC", "", "time_zone"},
		{"CRON_TZ=Europe/Berlin * * * * *", "", "time_zone"},
		{"@every", "", "cron: "},
		{"@every 0s", "", "@every 90s"},
		{"@every -1h", "", "@every 90s"},
		{"@every 1500ms", "", "whole seconds"},
		{"@every 99999999h", "", "five years"},
		{"@fortnightly", "", "@weekly"},
		{"0 0 30 2 *", "", "never comes"},
		{"@daily", "Europe/Atlantis", "Europe/Berlin"},
		{"1,2,,3 * * * *", "", `minute: "1,2,,3" has a comma`},
		{"0 ,5 * * *", "", `hour: ",5" has a comma`},
		{"0 5, * * *", "", `hour: "5," has a comma`},
		{", * * * *", "", `minute: "," has a comma`},
		{"*/99 * * * *", "", `minute: "*/99" has a step of more than the 60`},
		{"0 */25 * * *", "", `hour: "*/25" has a step of more than the 24`},
		{"0 0 1-9/32 * *", "", `day of the month: "1-9/32" has a step`},
		{"0 0 * */13 *", "", `month: "*/13" has a step`},
		{"0 0 * * 1,*/8", "", `day of the week: "1,*/8" has a step`},
		{"*/99999999999999999999 * * * *", "", "has a step"},
		{"*-5 * * * *", "", `minute: "*-5" is not made of`},
		{"+5 * * * *", "", `minute: "+5" is not made of`},
		{"5- * * * *", "", `minute: "5-" is not made of`},
		{"5/ * * * *", "", `minute: "5/" is not made of`},
		{"0 0 31 2 */2", "", "never comes"}, // which must be both
		{"@daily", "Local", "IANA"},
		{"@daily", "localtime", "IANA"},
		{"@daily", "Localtime", "IANA"},
		{"@daily", "Factory", "IANA"},
		{"@daily", "posixrules", "IANA"},
		{"@daily", "posix/Europe/Berlin", "IANA"},
		{"@daily", "right/UTC", "IANA"},
		{"@daily", "../../etc/passwd", "IANA"},
		{"@daily", "/etc/localtime", "IANA"},
	} {
		_, err := ParseSchedule(c.cron, c.zone)
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%q in %q: %v, want %q in it", c.cron, c.zone, err, c.want)
		} else if !strings.HasPrefix(err.Error(), "cron: ") && !strings.HasPrefix(err.Error(), "time_zone: ") {
			t.Errorf("%q in %q: the field isn't named: %v", c.cron, c.zone, err)
		}
	}
}

func TestParseSchedule_TakesAnyBlanksAndStepsAsLargeAsTheField(t *testing.T) {
	t.Parallel()
	from := time.Date(2027, 5, 31, 23, 30, 0, 0, time.UTC)
	for expression, want := range map[string]string{
		"\t30  2\t* * \t*\n": "2027-06-01 02:30", " @daily\t": "2027-06-01 00:00", "@every\t  1h ": "2027-06-01 00:00",
		"*/60 * * * *": "2027-06-01 00:00", "0 */24 * * *": "2027-06-01 00:00", "0 0 */31 * *": "2027-06-01 00:00",
		"0 0 1 */12 *": "2028-01-01 00:00", "0 0 * * */7": "2027-06-06 00:00", "0 0 ? jul-AUG/2 mon,Wed": "2027-07-05 00:00",
	} {
		if got := mustParse(t, expression, "").Next(from).Format("2006-01-02 15:04"); got != want {
			t.Errorf("%q comes at %s, want %s", expression, got, want)
		}
	}
}

func FuzzParseSchedule(f *testing.F) {
	for _, s := range []string{"*/5 * * * *", "@every 1s", "@daily", "TZ=", "CRON_TZ=x", "0 0 29 2 *", "1-2/3,4 * ? jan sun"} {
		f.Add(s, "Europe/Berlin")
	}
	f.Fuzz(func(t *testing.T, expression, zone string) {
		s, err := ParseSchedule(expression, zone)
		if err != nil {
			return
		}
		at := time.Unix(1_800_000_000, 0)
		for range 3 {
			next := s.Next(at)
			if next.IsZero() {
				return
			}
			if !next.After(at) || next.Nanosecond() != 0 {
				t.Fatalf("%q in %q: after %s comes %s", expression, zone, at, next)
			}
			at = next
		}
	})
}
