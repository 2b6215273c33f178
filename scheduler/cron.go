package scheduler

import (
	"errors"
	"fmt"
	"regexp"
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
// nor catches up. These are the rules of Vixie's cron.
type Schedule struct {
	every time.Duration // of "@every"; 0 for any other
	// spec is read in UTC: the times that it gives are those of a clock on the
	// wall, without a zone.
	spec *cron.SpecSchedule
	zone *time.Location
}

// cronFields are the five fields of a crontab, and names such as @daily.
var cronFields = cron.NewParser(cron.Minute | cron.Hour | cron.Dom | cron.Month | cron.Dow | cron.Descriptor)

const everyName = "@every "

// everyMax keeps what can't be meant, and would overflow, out.
const everyMax = 5 * 366 * 24 * time.Hour

// ParseSchedule reads a cron expression: five fields, @hourly, @daily, @weekly,
// @monthly, @yearly, or @every with a time such as 90s or 1h30m; and an IANA time
// zone, "" being UTC. The time of @every is in whole seconds, from 1s to five years;
// its ticks are its multiples since 1970 in UTC, so that all who reckon get the same.
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
		return Schedule{}, fmt.Errorf("cron: %.100q names a day that never comes", expression)
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
	if err != nil || name == "Local" || !zoneName.MatchString(name) {
		return nil, fmt.Errorf("time_zone: %.100q is not known; want a name of the IANA database, such as UTC or Europe/Berlin", name)
	}
	return location, nil
}

func parseCron(expression string) (Schedule, error) {
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
	parsed, err := cronFields.Parse(expression)
	if err != nil {
		return Schedule{}, fmt.Errorf("can't be read: %w; want minute, hour, day of the month, month and day of the week, "+
			"such as 30 2 * * 1-5, or @hourly, @daily, @weekly, @monthly, @yearly, or @every 90s", err)
	}
	spec, ok := parsed.(*cron.SpecSchedule)
	if !ok {
		return Schedule{}, errors.New("can't be read; for example 30 2 * * 1-5")
	}
	spec.Location = time.UTC
	return Schedule{spec: spec}, nil
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
