package scheduler_test

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/carpool-go/carpool/dbpool"
	"github.com/carpool-go/carpool/scheduler"
	"github.com/carpool-go/carpool/tasks"
)

// SendReport is a kind of job of the program's own.
type SendReport struct {
	To string `json:"to"`
}

func (SendReport) Kind() string           { return "report:send" }
func (SendReport) Options() tasks.Options { return tasks.Options{} }

func (r SendReport) Validate() error {
	if r.To == "" {
		return errors.New("to: is missing")
	}
	return nil
}

// A report on each working day at half past six in Berlin. If no worker was there,
// the report of that day is left out; if the last one is still on its way, so is the
// new one.
func ExampleEntry() {
	entry := scheduler.Entry{
		Name:     "morning-report",
		Cron:     "30 6 * * 1-5",
		TimeZone: "Europe/Berlin",
		Payload:  SendReport{To: "ada@example.com"},
		Missed:   scheduler.MissedSkip,
		Overlap:  scheduler.OverlapSkip,
	}
	fmt.Println(entry.Validate())

	entry.Cron = "30 6 * *"
	fmt.Println(entry.Validate() != nil)
	// Output:
	// <nil>
	// true
}

// The night on which the clocks are put forward has no 2:30; the tick comes as soon
// as it would be past.
func ExampleParseSchedule() {
	schedule, err := scheduler.ParseSchedule("30 2 * * *", "Europe/Berlin")
	if err != nil {
		fmt.Println(err)
		return
	}
	berlin, err := time.LoadLocation("Europe/Berlin")
	if err != nil {
		fmt.Println(err)
		return
	}
	tick := time.Date(2026, time.March, 28, 0, 0, 0, 0, berlin)
	for range 3 {
		tick = schedule.Next(tick)
		fmt.Println(tick.In(berlin))
	}
	// Output:
	// 2026-03-28 02:30:00 +0100 CET
	// 2026-03-29 03:00:00 +0200 CEST
	// 2026-03-30 02:30:00 +0200 CEST
}

// The error says what would be right.
func ExampleParseSchedule_error() {
	_, err := scheduler.ParseSchedule("@daily", "Berlin")
	fmt.Println(err)
	// Output:
	// time_zone: "Berlin" is not known; want a name of the IANA database, such as UTC or Europe/Berlin
}

// The ticks of @every are the same for all who reckon, whenever they begin.
func ExampleSchedule_Next() {
	schedule, err := scheduler.ParseSchedule("@every 90s", "")
	if err != nil {
		fmt.Println(err)
		return
	}
	noon := time.Date(2026, time.May, 5, 12, 0, 0, 0, time.UTC)
	fmt.Println(schedule.Next(noon).Format(time.TimeOnly))
	fmt.Println(schedule.Next(noon.Add(10 * time.Second)).Format(time.TimeOnly))
	fmt.Println(schedule.Next(noon.Add(90 * time.Second)).Format(time.TimeOnly))
	// Output:
	// 12:01:30
	// 12:01:30
	// 12:03:00
}

// Entries can be added while workers run, which take them up within a second.
func ExampleAdd() {
	_ = func(ctx context.Context, db *dbpool.Pool) error {
		err := scheduler.Add(ctx, db, scheduler.Entry{
			Name: "hourly-report", Cron: "@hourly", Payload: SendReport{To: "ada@example.com"},
		}, false)
		if errors.Is(err, scheduler.ErrExists) {
			return nil // it has been added before
		}
		return err
	}
}

// What can't be run says why.
func ExampleList() {
	_ = func(ctx context.Context, db *dbpool.Pool) error {
		entries, err := scheduler.List(ctx, db)
		if err != nil {
			return err
		}
		for _, e := range entries {
			if e.Problem != "" {
				fmt.Printf("%s is not run: %s\n", e.Name, e.Problem)
			}
		}
		return nil
	}
}
