//go:build unix

package cli

import (
	"encoding/json"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/hibiken/asynq"
	"github.com/jackc/pgx/v5"

	"github.com/carpool-go/carpool/scheduler"
	"github.com/carpool-go/carpool/worker/internal/workertest"
)

// schedule runs `worker schedule` and returns what it printed.
func (b *bundle) schedule(t *testing.T, wantCode int, args ...string) (stdout, stderr string) {
	t.Helper()
	stdout, stderr, code := b.run(t, nil, append([]string{"schedule"}, args...)...)
	if code != wantCode {
		t.Fatalf("worker schedule %q: exit code %d, want %d\n%s%s", args, code, wantCode, stdout, stderr)
	}
	return stdout, stderr
}

const pruneNothing = `{"table": "public.events", "column": "at", "older_than": "3650d"}`

func TestSchedule_RefusesWhatIsWrongWithOneLineThatNamesIt(t *testing.T) {
	t.Parallel()
	b := setup(t)
	for _, c := range []struct {
		want string
		args []string
	}{
		{`cron: "61 * * * *"`, []string{"add", "a", "61 * * * *", "rows:prune", pruneNothing}},
		{"@every 90s", []string{"add", "a", "@every 1ms", "rows:prune", pruneNothing}},
		{`time_zone: "Europe/Atlantis"`, []string{"add", "a", "@daily", "rows:prune", pruneNothing, "--time-zone", "Europe/Atlantis"}},
		{"kind: unknown kind", []string{"add", "a", "@daily", "rows:plume"}},
		{"rows:prune payload: ", []string{"add", "a", "@daily", "rows:prune"}},
		{"unknown field", []string{"add", "a", "@daily", "rows:prune", `{"tabel": "hunter2"}`}},
		{"name: ", []string{"add", "a b", "@daily", "rows:prune", pruneNothing}},
		{"queue: ", []string{"add", "a", "@daily", "rows:prune", pruneNothing, "--queue", "a=1"}},
		{"queue: is a worker's own, which takes pool:validate alone", []string{"add", "a", "@daily", "rows:prune", pruneNothing, "--queue", "instance-host-01234567"}},
		{"--max-retry: ", []string{"add", "a", "@daily", "rows:prune", pruneNothing, "--max-retry=-1"}},
		{"timeout: ", []string{"add", "a", "@daily", "rows:prune", pruneNothing, "--timeout", "1ms"}},
		{"--missed", []string{"add", "a", "@daily", "rows:prune", pruneNothing, "--missed", "never"}},
		{"--overlap", []string{"add", "a", "@daily", "rows:prune", pruneNothing, "--overlap", "never"}},
		{"cron: ", []string{"next", "* * * *"}},
		{"cron: ", []string{"next", "61\t*\t*\t*\t*"}},
		{"cron: ", []string{"next", "*/5"}},
		{"time_zone: ", []string{"next", "@daily", "--time-zone", "Mars"}},
		{"-n: ", []string{"next", "@daily", "-n", "0"}},
	} {
		stdout, stderr := b.schedule(t, exitUsage, c.args...)
		if !strings.Contains(stderr, c.want) || stdout != "" || strings.Contains(stderr, "hunter2") {
			t.Errorf("%q says %q, want %q in it", c.args, stderr, c.want)
		}
	}
	_, stderr := b.schedule(t, exitUsage, "add", "a b", "61 * * * *", "rows:prune", "{}", "--time-zone", "Mars", "--max-retry=-1", "--timeout", "1ms")
	if !strings.HasPrefix(stderr, "worker: 6 things are wrong with the entry:\n") {
		t.Errorf("of six faults it says\n%s", stderr)
	}
	for _, field := range []string{"rows:prune payload", "--max-retry", "name", "timeout", "time_zone", "cron"} {
		if !strings.Contains(stderr, "\n  "+field+": ") {
			t.Errorf("%s is not among what is wrong:\n%s", field, stderr)
		}
	}
	for _, args := range [][]string{{"enable", "a"}, {"disable", "a"}, {"rm", "a"}, {"run-now", "a"}, {"next", "a"}} {
		if _, stderr := b.schedule(t, exitFailed, args...); !strings.Contains(stderr, "worker schedule ls") {
			t.Errorf("%q on an entry that there isn't says %q", args, stderr)
		}
	}
}

func TestSchedule_TheLifeOfAnEntry(t *testing.T) {
	t.Parallel()
	b := setup(t)
	entry := func() (s scheduler.Status) {
		t.Helper()
		stdout, _ := b.schedule(t, 0, "ls", "--json")
		if err := json.Unmarshal([]byte(stdout), &s); err != nil {
			t.Fatalf("%v in %q", err, stdout)
		}
		return s
	}
	add := []string{
		"add", "prune", "30 2 * * *", "rows:prune", pruneNothing, "--time-zone", "Europe/Berlin", "--missed", "all",
		"--overlap", "skip", "--queue", "low", "--max-retry", "0",
	}
	if stdout, _ := b.schedule(t, 0, add...); !strings.Contains(stdout, "T02:30:00+0") {
		t.Errorf("add prints %q", stdout)
	}
	if _, stderr := b.schedule(t, exitFailed, add...); !strings.Contains(stderr, "--replace") {
		t.Errorf("a second one of the name: %q", stderr)
	}
	s := entry()
	if s.Cron != "30 2 * * *" || s.TimeZone != "Europe/Berlin" || s.Kind != "rows:prune" || s.Queue != "low" || s.Missed != "all" ||
		s.Overlap != "skip" || !s.Enabled || s.Source != "table" || !s.NextTick.After(time.Now()) || !s.LastTick.IsZero() || s.Problem != "" {
		t.Errorf("it is listed as %+v", s)
	}
	b.schedule(t, 0, "disable", "prune")
	if s := entry(); s.Enabled || !s.NextTick.IsZero() {
		t.Errorf("disabled, it is listed as %+v", s)
	}
	if stdout, _ := b.schedule(t, 0, "ls"); !strings.Contains(stdout, "Europe/Berlin") || !strings.Contains(stdout, "disabled") {
		t.Errorf("the table: %s", stdout)
	}
	b.schedule(t, 0, "enable", "prune")
	b.schedule(t, 0, append(add, "--replace")...)
	stdout, _ := b.schedule(t, 0, "next", "prune", "-n", "3")
	if ticks := strings.Fields(stdout); len(ticks) != 3 || !strings.Contains(ticks[2], "T02:30:00+0") {
		t.Errorf("the next three ticks: %q", stdout)
	}
	if stdout, _ := b.schedule(t, 0, "next", "@hourly"); len(strings.Fields(stdout)) != 5 || !strings.Contains(stdout, ":00:00Z") {
		t.Errorf("the next ticks of an expression: %q", stdout)
	}
	for _, cron := range []string{"0\t*\t*\t*\t*", " 0  *\t *  *  * "} {
		if stdout, _ := b.schedule(t, 0, "next", cron); len(strings.Fields(stdout)) != 5 || !strings.Contains(stdout, ":00:00Z") {
			t.Errorf("the next ticks of %q: %q", cron, stdout)
		}
	}
	b.Exec(t, "UPDATE carpool.schedules SET cron = E'30\\t2\\t*\\t*\\t*'")
	if stdout, _ := b.schedule(t, 0, "ls"); !strings.Contains(stdout, "30 2 * * *  Europe/Berlin") {
		t.Errorf("the table of an entry with tabs: %q", stdout)
	}
	b.schedule(t, 0, "rm", "prune")
	if stdout, _ := b.schedule(t, 0, "ls", "--json"); stdout != "" {
		t.Errorf("after rm: %q", stdout)
	}
}

// The whole way: two workers, one of which sleeps for longer than it may hold
// anything and then is killed. Each tick becomes one job, and each job is done.
func TestSchedule_EachTickIsOneJobOverWorkersThatSleepAndDie(t *testing.T) {
	t.Parallel()
	b := setup(t)
	db, err := pgx.Connect(t.Context(), b.DatabaseURL)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = db.Close(t.Context()) })
	if _, err := db.Exec(t.Context(), `
		CREATE TABLE events (at timestamptz);
		CREATE TABLE test_jobs (id text NOT NULL);
		CREATE FUNCTION test_note() RETURNS trigger LANGUAGE plpgsql AS $$
		BEGIN
			IF NEW.kind = 'rows:prune' THEN INSERT INTO test_jobs VALUES (NEW.id); END IF;
			RETURN NULL;
		END $$;
		CREATE TRIGGER test_note AFTER INSERT ON carpool.outbox FOR EACH ROW EXECUTE FUNCTION test_note();`); err != nil {
		t.Fatal(err)
	}
	jobs := func() (ids map[string]int) {
		t.Helper()
		rows, err := db.Query(t.Context(), "SELECT id FROM test_jobs")
		if err != nil {
			t.Fatal(err)
		}
		list, err := pgx.CollectRows(rows, pgx.RowTo[string])
		if err != nil {
			t.Fatal(err)
		}
		ids = make(map[string]int)
		for _, id := range list {
			ids[id]++
		}
		return ids
	}
	more := func(n int) {
		t.Helper()
		have := len(jobs())
		workertest.Eventually(t, "the clock goes on", func() bool { return len(jobs()) >= have+n })
	}

	sleeper, other := b.Start(t, "PRUNE_ALLOW=public.events"), b.Start(t, "PRUNE_ALLOW=public.events")
	b.schedule(t, 0, "add", "often", "@every 1s", "rows:prune", pruneNothing, "--missed", "all", "--retention", "1h")
	more(2)
	sleeper.Signal(t, syscall.SIGSTOP)
	more(6) // is more than the seconds that a row may be held
	sleeper.Signal(t, syscall.SIGCONT)
	more(2)
	other.Signal(t, syscall.SIGKILL)
	more(3)

	// One statement sees one moment.
	var enqueued, ticks int
	if err := db.QueryRow(t.Context(), `SELECT (SELECT count(*) FROM test_jobs),
		floor(extract(epoch FROM last_tick)) - floor(extract(epoch FROM changed_at))
		FROM carpool.schedules JOIN carpool.schedule_state USING (name) WHERE name = 'often'`).Scan(&enqueued, &ticks); err != nil {
		t.Fatal(err)
	}
	if enqueued != ticks {
		t.Errorf("%d jobs for %d ticks", enqueued, ticks)
	}
	b.schedule(t, 0, "disable", "often")
	id, _ := b.schedule(t, 0, "run-now", "often")
	ids := jobs()
	if ids[strings.TrimSpace(id)] != 1 {
		t.Errorf("run-now's job %q did not come to the outbox", id)
	}
	for id, times := range ids {
		if times != 1 {
			t.Errorf("job %s came to the outbox %d times", id, times)
		}
		workertest.Eventually(t, "the job is run", func() bool {
			info, err := b.Inspector.GetTaskInfo("default", id)
			return err == nil && info.State == asynq.TaskStateCompleted
		})
	}
}
