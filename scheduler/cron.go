package scheduler

import (
	"errors"
	"fmt"
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/robfig/cron/v3"
)

// Schedule is when an entry runs: a cron expression in a time zone. Each time at
// which it does is a tick. The zero value has none; [ParseSchedule] makes one.
//
// Where the clocks change, an entry whose hours are named, such as "30 2 * * *",
// runs once for each time of day that it names: one that is skipped runs when the
// clocks are put forward, one that comes twice runs the first time. An entry for
// every hour, such as "*/5 * * * *", goes on as time passes: it neither pauses
// nor catches up. These are the rules of Vixie's cron, which counts among the latter
// also what has a * first in its minutes or hours, such as "*/5 2 * * *".
type Schedule struct {
	every time.Duration // of "@every"; 0 for any other
	// spec is read in UTC: the times that it gives are those of a clock on the
	// wall, without a zone.
	spec *cron.SpecSchedule
	zone *time.Location
}

// cronParser takes the five fields of a crontab, and names such as @daily.
var cronParser = cron.NewParser(cron.Minute | cron.Hour | cron.Dom | cron.Month | cron.Dow | cron.Descriptor)

// cronFields are the five fields in their order, each with how many values it has.
var cronFields = [...]struct {
	name   string
	values int
}{{"minute", 60}, {"hour", 24}, {"day of the month", 31}, {"month", 12}, {"day of the week", 7}}

const dayOfMonth, dayOfWeek = 2, 4

const everyName = "@every "

// everyMax keeps what can't be meant, and would overflow, out.
const everyMax = 5 * 366 * 24 * time.Hour

// ParseSchedule reads a cron expression: five fields, @hourly, @daily, @weekly,
// @monthly, @yearly, or @every with a time such as 90s or 1h30m; and an IANA time
// zone, "" being UTC. The time of @every is in whole seconds, from 1s to five years;
// its ticks are its multiples since 1970 in UTC, so that all who reckon get the same.
//
// Where both the day of the month and the day of the week are restricted, a day that
// fits either is one, as in "0 0 1,15 * MON". Where one of the two begins with a *, a day
// must fit both: "0 0 */2 * WED" are the Wednesdays among every second day of the month,
// and "0 0 * * WED" is each Wednesday. This is the rule of Vixie's cron.
//
// The error begins with "cron: " or "time_zone: ", names what is wrong, and says what
// would be right.
func ParseSchedule(expression, zone string) (Schedule, error) {
	location, err := parseZone(zone)
	if err != nil {
		return Schedule{}, err
	}
	s, err := parseCron(expression)
	if err != nil {
		return Schedule{}, fmt.Errorf("cron: %.100q %w", expression, err)
	}
	s.zone = location
	if s.Next(time.Unix(0, 0)).IsZero() {
		return Schedule{}, fmt.Errorf("cron: %.100q names a day that never comes, or not within five years", expression)
	}
	return s, nil
}

// zoneName leaves out what is no name of the time zone database, such as a path.
var zoneName = regexp.MustCompile(`^[A-Za-z0-9_+-]+(/[A-Za-z0-9_+-]+)*$`)

func parseZone(name string) (*time.Location, error) {
	if name == "" {
		return time.UTC, nil
	}
	location, err := time.LoadLocation(name)
	if err != nil || !zoneName.MatchString(name) || isOfMachine(name) {
		return nil, fmt.Errorf("time_zone: %.100q is not known; want a name of the IANA database, such as UTC or Europe/Berlin", name)
	}
	return location, nil
}

// isOfMachine reports whether a name is one that some machines' database has beside those of
// the IANA: the machine's own zone, or a copy of the zones. What it means, and whether it is
// known, differs between the machines of one fleet.
func isOfMachine(zone string) bool {
	zone = strings.ToLower(zone) // file systems may not tell them apart
	switch zone {
	case "local", "localtime", "posixrules", "factory":
		return true
	}
	return strings.HasPrefix(zone, "posix/") || strings.HasPrefix(zone, "right/")
}

func parseCron(expression string) (Schedule, error) {
	expression = strings.Join(strings.Fields(expression), " ")
	if d, ok := strings.CutPrefix(expression, everyName); ok {
		every, err := time.ParseDuration(strings.TrimSpace(d))
		if err != nil || every < time.Second || every%time.Second != 0 || every > everyMax {
			return Schedule{}, errors.New("is not a time in whole seconds, from 1s to five years; for example @every 90s")
		}
		return Schedule{every: every}, nil
	}
	if strings.Contains(expression, "TZ=") {
		return Schedule{}, errors.New("has a time zone in it; the zone has a field of its own, time_zone")
	}
	fields := strings.Split(expression, " ")
	if len(fields) == len(cronFields) {
		for i, field := range fields {
			if err := checkField(field, cronFields[i].values); err != nil {
				return Schedule{}, unreadable(fmt.Errorf("%s: %.40q %w", cronFields[i].name, field, err))
			}
		}
	}
	parsed, err := cronParser.Parse(expression)
	if err != nil {
		return Schedule{}, unreadable(err)
	}
	spec, ok := parsed.(*cron.SpecSchedule)
	if !ok {
		return Schedule{}, errors.New("can't be read; for example 30 2 * * 1-5")
	}
	if len(fields) == len(cronFields) {
		spec.Dom = withStar(spec.Dom, fields[dayOfMonth])
		spec.Dow = withStar(spec.Dow, fields[dayOfWeek])
	}
	spec.Location = time.UTC
	return Schedule{spec: spec}, nil
}

func unreadable(err error) error {
	return fmt.Errorf("can't be read: %w; want minute, hour, day of the month, month and day of the week, "+
		"such as 30 2 * * 1-5, or @hourly, @daily, @weekly, @monthly, @yearly, or @every 90s", err)
}

// cronValue is what stands between the commas of a field; the step is its last group.
var cronValue = regexp.MustCompile(`^(?:[*?]|[A-Za-z0-9]+(?:-[A-Za-z0-9]+)?)(?:/([0-9]+))?$`)

// checkField refuses what can't be meant, and robfig's parser takes: it passes over what is
// missing between two commas, over the end of a range that begins with a *, and over a +.
func checkField(field string, values int) error {
	for value := range strings.SplitSeq(field, ",") {
		if value == "" {
			return errors.New("has a comma with nothing before or behind it")
		}
		parts := cronValue.FindStringSubmatch(value)
		if parts == nil {
			return errors.New("is not made of values, ranges such as 1-5, and steps such as */2")
		}
		if step, err := strconv.Atoi(parts[1]); parts[1] != "" && (err != nil || step > values) {
			return fmt.Errorf("has a step of more than the %d values there are", values)
		}
	}
	return nil
}

// starBit has robfig's parser ask for days that fit both of their fields. It sets the bit
// for a plain * anywhere in one; see [ParseSchedule] for the rule here.
const starBit = 1 << 63

func withStar(days uint64, field string) uint64 {
	if strings.HasPrefix(field, "*") || strings.HasPrefix(field, "?") {
		return days | starBit
	}
	return days &^ starBit
}

// everyHour reports whether no hour is left out.
func (s Schedule) everyHour() bool {
	const all = 1<<24 - 1
	return s.spec.Hour&all == all
}

// Next returns the first tick after t, in UTC, or the zero time if there is none
// within five years.
func (s Schedule) Next(t time.Time) time.Time {
	switch {
	case s.every > 0:
		every := int64(s.every / time.Second)
		n := t.Unix() / every
		if t.Unix() < 0 && t.Unix()%every != 0 {
			n--
		}
		return time.Unix((n+1)*every, 0).UTC()
	case s.spec == nil:
		return time.Time{}
	}
	// The loop goes through the stretches of time during which the zone's offset
	// from UTC does not change. Within one, the clock on the wall is a constant away
	// from UTC, and the cron expression is asked about that clock.
	from := t.UTC().Truncate(time.Second).Add(time.Second)
	for {
		start, end := from.In(s.zone).ZoneBounds()
		offset := offsetAt(from, s.zone)
		wall := from.Add(offset)
		if !start.IsZero() && !s.everyHour() {
			// Up to here the clock has shown these times before, if it was put back.
			if shown := start.UTC().Add(offsetAt(start.Add(-1), s.zone)); wall.Before(shown) {
				wall = shown
			}
		}
		wall = s.spec.Next(wall.Add(-1))
		if wall.IsZero() {
			return time.Time{}
		}
		tick := wall.Add(-offset)
		if end.IsZero() || tick.Before(end) {
			return tick
		}
		// The clocks change first. An hour's jump forward leaves the minutes of an
		// entry for every hour where they are; half an hour's, as on Lord Howe
		// Island, may leave one out.
		end = end.UTC()
		gap := offsetAt(end, s.zone) - offset
		skipped := wall.Before(end.Add(offset + gap))
		if skipped && (!s.everyHour() || gap%time.Hour != 0) {
			return end
		}
		from = end
	}
}

// offsetAt is what a clock on the wall is ahead of UTC.
func offsetAt(t time.Time, zone *time.Location) time.Duration {
	_, seconds := t.In(zone).Zone()
	return time.Duration(seconds) * time.Second
}
