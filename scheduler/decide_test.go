package scheduler

import (
	"testing"
	"time"

	"pgregory.net/rapid"
)

// Over random histories: whatever the policies and the outages, no tick is
// enqueued twice, before its time or out of order, nothing overlaps that must
// not, and what the policies promise to enqueue is enqueued.
func TestDecide_OverRandomHistories(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		s := mustParse(t, rapid.SampledFrom([]string{"@every 1s", "@every 90s", "* * * * *", "*/10 * * * *", "0 3 * * *"}).Draw(t, "cron"), "Europe/Berlin")
		missed := rapid.SampledFrom([]Missed{MissedSkip, MissedOnce, MissedAll}).Draw(t, "missed")
		overlap := rapid.SampledFrom([]Overlap{OverlapAllow, OverlapSkip, OverlapQueue}).Draw(t, "overlap")
		start := time.Unix(1_800_000_000, 0).UTC()
		now := start
		p := position{changedAt: start}
		var last time.Time
		all := map[time.Time]bool{} // enqueued
		changed := false
		late := false // a look was more than onTime after a tick
		for range rapid.IntRange(1, 30).Draw(t, "looks") {
			passed := rapid.SampledFrom([]time.Duration{0, time.Second, 5 * time.Second, time.Minute, time.Hour, 30 * time.Hour}).Draw(t, "passed")
			now = now.Add(passed)
			if rapid.IntRange(0, 9).Draw(t, "change") == 0 {
				p.changedAt, changed = now, true
			}
			running := len(all) > 0 && rapid.Bool().Draw(t, "running")
			first := s.Next(p.since())
			d := decide(s, missed, overlap, p, now, running)
			if now.Sub(first) > onTime {
				late = true
			}
			for _, tick := range d.enqueue {
				if all[tick] || !tick.After(last) || tick.After(now) || !tick.After(p.changedAt) || s.Next(tick.Add(-1)) != tick {
					t.Fatalf("at %s the tick of %s is enqueued after that of %s", now, tick, last)
				}
				all[tick], last = true, tick
			}
			switch {
			case overlap != OverlapAllow && (running && len(d.enqueue) > 0 || len(d.enqueue) > 1):
				t.Fatalf("%d jobs overlap", len(d.enqueue))
			case len(d.enqueue) > missedMost, d.leftOut < 0:
				t.Fatalf("%d enqueued, %d left out", len(d.enqueue), d.leftOut)
			case d.next.since().Before(p.since()):
				t.Fatal("the entry goes back")
			case !s.Next(d.next.since()).After(now):
				t.Fatal("a tick that is due stays undecided")
			case missed == MissedOnce && overlap == OverlapAllow && !first.After(now) && len(d.enqueue) == 0:
				t.Fatal("nothing makes up for what was missed")
			case overlap == OverlapQueue && p.waits() && !running && (len(d.enqueue) == 0 || d.enqueue[0] != p.waitingTick):
				t.Fatal("the tick that waited is not the next")
			}
			p = d.next
		}
		if changed || overlap != OverlapAllow || late && missed != MissedAll {
			return
		}
		if _, earlier := dueTicks(s, start, now); earlier > 0 {
			return // more than is made up for may have been missed at once
		}
		for tick := s.Next(start); !tick.After(now); tick = s.Next(tick) {
			if !all[tick] {
				t.Fatalf("the tick of %s is left out", tick)
			}
		}
	})
}

func TestDueTicks_TheLastHundredOfMillions(t *testing.T) {
	t.Parallel()
	s := mustParse(t, "@every 1s", "")
	now := time.Unix(1_800_000_000, 0)
	due, earlier := dueTicks(s, time.Time{}, now)
	if len(due) != missedMost || earlier == 0 || !due[missedMost-1].Equal(now) || !due[0].Equal(now.Add(-99*time.Second)) {
		t.Errorf("%d ticks from %s to %s, %d earlier", len(due), due[0], due[len(due)-1], earlier)
	}
	s = mustParse(t, "0 0 29 2 *", "")
	if due, _ = dueTicks(s, now.AddDate(-9, 0, 0), now); len(due) != 1 {
		t.Errorf("%d leap days in five years", len(due))
	}
}
