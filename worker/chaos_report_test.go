//go:build unix

package worker_test

import (
	"cmp"
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/hibiken/asynq"
	"github.com/jackc/pgx/v5"

	"github.com/carpool-go/carpool/worker/internal/workertest"
)

// chaosReport is what came of a run.
type chaosReport struct {
	mode                          string
	seed                          uint64
	enqueued, rolledBack, effects int
	lost                          int // enqueued, without an effect, and nowhere to be found
	late                          int // enqueued, without an effect, and still on their way when there was no more waiting
	left                          int // still on their way, or set aside, with an effect or without
	doubled, phantoms             int // effects too many, and effects of what was rolled back
	archived, retries, postponed  int
	stall                         time.Duration // the longest time without any effect while work waited
	slowest                       time.Duration // from a job's enqueueing to its effect
	drain, took                   time.Duration // drain: from the last repair to the end
	faults                        map[string]int
	ended, crashed                int      // workers: that ended by themselves, and those of them that had a panic or a data race
	refusals                      []string // see chaos.refusals
	wrong                         []int
}

// right reports whether the promise was kept.
func (r *chaosReport) right() bool {
	return r.lost+r.late+r.left+r.doubled+r.phantoms+r.archived+r.crashed+len(r.refusals) == 0
}

// chaosEffectRow is a row of effects.
type chaosEffectRow struct {
	N  int
	At time.Time
}

func (c *chaos) report() *chaosReport {
	r := &chaosReport{
		mode: c.mode, seed: c.seed, rolledBack: int(c.rolledBack.Load()),
		faults: c.faults, ended: len(c.endings), crashed: len(c.crashes),
	}
	r.refusals = c.refusals()
	if err := os.WriteFile(filepath.Join(c.logs, c.mode+"-faults.txt"), []byte(strings.Join(c.timeline, "\n")+"\n"), 0o600); err != nil {
		c.t.Error(err)
	}
	var effects []chaosEffectRow
	var held map[string]bool
	workertest.Eventually(c.t, "the effects can be read", func() bool { // over a connection from after the last restart
		rows, _ := c.db.Query(c.t.Context(), "SELECT n, at FROM effects ORDER BY at")
		var err error
		effects, err = pgx.CollectRows(rows, pgx.RowToStructByPos[chaosEffectRow])
		if err != nil {
			return false
		}
		if r.left, err = c.underway(); err != nil {
			return false
		}
		if held, err = c.held(); err != nil {
			return false
		}
		q, err := c.inspect.GetQueueInfo("default")
		if err == nil {
			r.archived = q.Archived
		}
		return err == nil
	})
	times, first := make(map[int]int), make(map[int]time.Time)
	for _, e := range effects {
		r.effects++
		if times[e.N]++; times[e.N] == 1 {
			first[e.N] = e.At
		}
	}
	enqueued := make(map[int]time.Time)
	c.enqueued.Range(func(key, value any) bool {
		n, job := key.(int), value.(chaosJob)
		enqueued[n] = job.at
		if times[n] > 0 {
			r.slowest = max(r.slowest, first[n].Sub(job.at))
			return true
		}
		if held[job.id] {
			r.late++
		} else {
			r.lost++
		}
		r.wrong = append(r.wrong, n)
		return true
	})
	r.enqueued = len(enqueued)
	for n, count := range times {
		_, ok := enqueued[n]
		if !ok {
			r.phantoms++
		}
		r.doubled += count - 1
		if !ok || count > 1 {
			r.wrong = append(r.wrong, n)
		}
	}
	slices.Sort(r.wrong)
	r.stall = longestStall(effects, enqueued, first)
	r.retries, r.postponed = c.tries()
	return r
}

// held are the ids of the jobs that the outbox and Redis hold, the archive
// included.
func (c *chaos) held() (map[string]bool, error) {
	ids := make(map[string]bool)
	rows, _ := c.db.Query(c.t.Context(), "SELECT id::text FROM carpool.outbox")
	waiting, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		return nil, err
	}
	for _, id := range waiting {
		ids[id] = true
	}
	for _, list := range c.lists() {
		const size = 1000
		for page := 1; ; page++ {
			jobs, err := list("default", asynq.PageSize(size), asynq.Page(page))
			if err != nil {
				return nil, err
			}
			for _, job := range jobs {
				ids[job.ID] = true
			}
			if len(jobs) < size {
				break
			}
		}
	}
	return ids, nil
}

// lists are asynq's lists of jobs that have not ended well.
func (c *chaos) lists() []func(string, ...asynq.ListOption) ([]*asynq.TaskInfo, error) {
	return []func(string, ...asynq.ListOption) ([]*asynq.TaskInfo, error){
		c.inspect.ListArchivedTasks, c.inspect.ListActiveTasks, c.inspect.ListPendingTasks, c.inspect.ListRetryTasks, c.inspect.ListScheduledTasks,
	}
}

// longestStall is the longest time without an effect while a job waited for its
// first one.
func longestStall(effects []chaosEffectRow, enqueued, first map[int]time.Time) (longest time.Duration) {
	var waitingSince time.Time // of the jobs with an effect at or after the one looked at, the first that was enqueued
	for i, later := range slices.Backward(effects) {
		if at, ok := enqueued[later.N]; ok && first[later.N].Equal(later.At) && (waitingSince.IsZero() || at.Before(waitingSince)) {
			waitingSince = at
		}
		since := waitingSince
		if i > 0 && effects[i-1].At.After(since) {
			since = effects[i-1].At
		}
		if !waitingSince.IsZero() {
			longest = max(longest, later.At.Sub(since))
		}
	}
	return longest
}

// tries counts, from the workers' logs, the tries that were used up, by a failure
// or by the end of a worker, and the deliveries that used up none.
func (c *chaos) tries() (retries, postponed int) {
	attempts := make(map[string]int)
	for _, line := range c.logLines(`"kind":"chaos:effect"`) {
		var record struct {
			Msg string
			Job struct {
				ID, Outcome string
				Attempt     int
			}
		}
		_, line, _ = strings.Cut(line, ": ")
		if json.Unmarshal([]byte(line), &record) != nil || record.Msg != "job" {
			continue
		}
		attempts[record.Job.ID] = max(attempts[record.Job.ID], record.Job.Attempt)
		if record.Job.Outcome == "postponed" {
			postponed++
		}
	}
	for _, n := range attempts {
		retries += n - 1
	}
	return retries, postponed
}

// chaosTable shows reports side by side, in Markdown.
func chaosTable(reports ...*chaosReport) string {
	var b strings.Builder
	row := func(name string, value func(*chaosReport) any) {
		fmt.Fprintf(&b, "| %-34s |", name)
		for _, r := range reports {
			fmt.Fprintf(&b, " %11v |", value(r))
		}
		b.WriteByte('\n')
	}
	fmt.Fprintf(&b, "\nseed %d, %s\n\n", reports[0].seed, map[bool]string{true: "long form", false: "short form"}[*chaosLong])
	row("", func(r *chaosReport) any { return r.mode })
	b.WriteString("| --- |" + strings.Repeat(" ---: |", len(reports)) + "\n")
	row("enqueued", func(r *chaosReport) any { return r.enqueued })
	row("rolled back", func(r *chaosReport) any { return r.rolledBack })
	row("effects", func(r *chaosReport) any { return r.effects })
	row("lost", func(r *chaosReport) any { return r.lost })
	row("doubled", func(r *chaosReport) any { return r.doubled })
	row("effects of rolled back ones", func(r *chaosReport) any { return r.phantoms })
	row("archived", func(r *chaosReport) any { return r.archived })
	row("late: no effect yet", func(r *chaosReport) any { return r.late })
	row("still on their way", func(r *chaosReport) any { return r.left })
	row("retries used", func(r *chaosReport) any { return r.retries })
	row("postponed, no retry used", func(r *chaosReport) any { return r.postponed })
	row("longest stall", func(r *chaosReport) any { return r.stall.Round(100 * time.Millisecond) })
	row("slowest job", func(r *chaosReport) any { return r.slowest.Round(100 * time.Millisecond) })
	row("done after the last repair", func(r *chaosReport) any { return r.drain.Round(100 * time.Millisecond) })
	row("took", func(r *chaosReport) any { return r.took.Round(time.Second) })
	names := make(map[string]bool)
	for _, r := range reports {
		for name := range r.faults {
			names[name] = true
		}
	}
	for _, name := range slices.Sorted(maps.Keys(names)) {
		row(name, func(r *chaosReport) any { return r.faults[name] })
	}
	row("workers that ended by themselves", func(r *chaosReport) any { return r.ended })
	row("rights that they lack in Redis", func(r *chaosReport) any { return len(r.refusals) })
	return b.String() + "\n"
}

const (
	// explained is how many jobs that went wrong are explained, and explainedLines
	// with how many lines of the logs each.
	explained      = 10
	explainedLines = 40
)

// explain logs what is known of the jobs that went wrong.
func (c *chaos) explain(r *chaosReport) {
	for _, at := range c.timeline {
		c.t.Log("fault: " + at)
	}
	for _, crash := range c.crashes {
		c.t.Log("a worker crashed: " + crash)
	}
	for _, line := range r.refusals[:min(explained, len(r.refusals))] {
		c.t.Log("a right is lacking: " + line)
	}
	told := make(map[string]bool)
	tell := func(id string) {
		if told[id] {
			return
		}
		told[id] = true
		lines := c.logLines(id)
		for _, line := range lines[:min(explainedLines, len(lines))] {
			c.t.Log("  " + line)
		}
	}
	for _, n := range r.wrong[:min(explained, len(r.wrong))] {
		job, _ := c.enqueued.Load(n)
		enqueued, _ := job.(chaosJob)
		rows, _ := c.db.Query(c.t.Context(), "SELECT job_id, at FROM effects WHERE n = $1 ORDER BY at", n)
		type effect struct {
			ID string
			At time.Time
		}
		effects, _ := pgx.CollectRows(rows, pgx.RowToStructByPos[effect])
		c.t.Logf("job %d, id %q, enqueued at %s, has %d effects: %v", n, enqueued.id, enqueued.at.Format(time.RFC3339Nano), len(effects), effects)
		tell(enqueued.id)
		for _, e := range effects {
			tell(e.ID)
		}
	}
	for _, list := range c.lists() {
		jobs, _ := list("default", asynq.PageSize(explained))
		for _, job := range jobs {
			c.t.Logf("%s: %s %s, retried %d, next at %s, last error: %s", job.State, job.Type, job.ID, job.Retried, job.NextProcessAt, job.LastErr)
			tell(job.ID)
		}
	}
	rows, _ := c.db.Query(c.t.Context(), "SELECT id::text, coalesce(problem, 'no problem') FROM carpool.outbox LIMIT $1", explained)
	var id, problem string
	_, _ = pgx.ForEachRow(rows, []any{&id, &problem}, func() error {
		c.t.Logf("in the outbox: %s, %s", id, problem)
		tell(id)
		return nil
	})
}

// refusals tell what the users in Redis lack a right for: lines of the workers' logs, and what
// Redis has refused since it was last started.
func (c *chaos) refusals() []string {
	lines := append(c.logLines("NOPERM"), c.logLines("The user executing the script can't")...)
	if !c.carpools() {
		return lines
	}
	entries, err := workertest.OpenRedis(c.t, c.redis.URL()).ACLLog(c.t.Context(), 100).Result()
	if err != nil {
		c.t.Error(err)
	}
	for _, e := range entries {
		lines = append(lines, fmt.Sprintf("Redis refused %s: %s (%s, %s)", e.Username, e.Object, e.Reason, e.Context))
	}
	return lines
}

// logLines returns the lines of the workers' logs that have the text in them, in
// the order of time.
func (c *chaos) logLines(text string) (lines []string) {
	files, _ := filepath.Glob(filepath.Join(c.logs, c.mode+"-*.log"))
	for _, file := range files {
		data, err := os.ReadFile(file)
		if err != nil {
			continue
		}
		name := strings.TrimSuffix(filepath.Base(file), ".log")
		for line := range strings.Lines(string(data)) {
			if strings.Contains(line, text) {
				lines = append(lines, name+": "+strings.TrimSpace(line))
			}
		}
	}
	slices.SortStableFunc(lines, func(a, b string) int { return cmp.Compare(timeOf(a), timeOf(b)) })
	return lines
}

// timeOf is the time of a line of a log, as far as it can be compared.
func timeOf(line string) string {
	_, rest, _ := strings.Cut(line, `"time":"`)
	at, _, _ := strings.Cut(rest, `"`)
	return at
}
