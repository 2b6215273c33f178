package scheduler

import (
	"context"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/hibiken/asynq"

	"github.com/carpool-go/carpool/dbpool"
	"github.com/carpool-go/carpool/internal/testservers"
)

// member is one of several schedulers, with a pool of its own.
type member struct {
	*Scheduler
	pool *dbpool.Pool
}

func (b *bench) member(t *testing.T, databaseURL string, skew time.Duration, locked func(context.Context, string), entries ...Entry) *member {
	t.Helper()
	cfg := b.config(entries...)
	cfg.DB = newPool(t, databaseURL)
	cfg.locked = locked
	cfg.clock = fmt.Sprintf("(SELECT at + interval '%d milliseconds' FROM test_clock)", skew.Milliseconds())
	return &member{start(t, cfg), cfg.DB}
}

func (m *member) stop() {
	m.Stop()
	m.pool.Close()
}

// deliverAtOnce takes each row out of the outbox before it is in, so that a row
// which is there already can't hide that a tick is enqueued again.
func (b *bench) deliverAtOnce(t *testing.T) {
	t.Helper()
	b.exec(t, `DROP TRIGGER test_note ON carpool.outbox;
		CREATE TRIGGER test_note BEFORE INSERT ON carpool.outbox FOR EACH ROW EXECUTE FUNCTION test_note();`)
}

// expect fails the test unless each tick from the entry's beginning to the last
// one decided was enqueued once, and that is at least until.
func (b *bench) expect(t *testing.T, e Entry, until time.Time) {
	t.Helper()
	var from, last time.Time
	err := b.DB.QueryRow(t.Context(), "SELECT changed_at, last_tick FROM carpool.schedules JOIN carpool.schedule_state USING (name) WHERE name = $1",
		e.Name).Scan(&from, &last)
	if err != nil {
		t.Fatal(err)
	}
	s := mustParse(t, e.Cron, e.TimeZone)
	if last.Before(until) && !s.Next(last).After(until) {
		t.Errorf("%s: decided up to %s, want %s", e.Name, last, until)
	}
	times := map[string]int{}
	for _, id := range b.ids(t, e.Payload.(Ping).To) {
		times[id]++
	}
	ticks := 0
	for at := s.Next(from); !at.After(last); at = s.Next(at) {
		ticks++
		id := tickID(e.Name, at).String()
		if times[id] != 1 {
			t.Errorf("%s: the tick of %s was enqueued %d times", e.Name, at, times[id])
		}
		delete(times, id)
	}
	if len(times) > 0 {
		t.Errorf("%s: %d jobs that are no tick's", e.Name, len(times))
	}
	t.Logf("%s: %d ticks", e.Name, ticks)
}

// behind is how far an entry's ticks lag. The clock has to wait for them where
// more would be missed than is made up for.
func (b *bench) behind(t *testing.T, entry string) time.Duration {
	t.Helper()
	var s float64
	err := b.DB.QueryRow(t.Context(), `SELECT extract(epoch FROM at - greatest(last_tick, changed_at))::float8
		FROM test_clock, carpool.schedules LEFT JOIN carpool.schedule_state USING (name) WHERE name = $1`, entry).Scan(&s)
	if err != nil {
		t.Fatal(err)
	}
	return time.Duration(s * float64(time.Second))
}

// pauseOnce makes an instance hang in the middle of a tick, with the entry's row
// locked, until resume is closed.
func pauseOnce(entry string, resume <-chan struct{}) (locked func(context.Context, string), paused <-chan struct{}) {
	var once sync.Once
	p := make(chan struct{})
	return func(ctx context.Context, name string) {
		if name == entry {
			once.Do(func() {
				close(p)
				<-resume
			})
		}
	}, p
}

// Five instances, with clocks that are seconds apart, a thousand ticks of one
// entry and hundreds of others. Meanwhile instances are stopped anywhere and
// replaced, one hangs with a row locked for longer than it may, backends are
// terminated, Postgres goes away for all, and Redis loses everything.
func TestFleet_EachTickIsEnqueuedOnceWhateverHappens(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	entries := []Entry{
		{Name: "second", Cron: "@every 1s", Payload: Ping{To: "second"}, Missed: MissedAll},
		{Name: "minute", Cron: "* * * * *", Payload: Ping{To: "minute"}, Missed: MissedAll, TimeZone: "Europe/Berlin"},
		{Name: "seven", Cron: "@every 7s", Payload: Ping{To: "seven"}, Missed: MissedAll},
	}
	databaseURL, proxy := testservers.ThroughProxy(t, b.DatabaseURL)

	b.deliverAtOnce(t)
	b.exec(t, "UPDATE test_clock SET at = date_trunc('second', now())")
	start := b.now(t)
	skews := []time.Duration{-3 * time.Second, -700 * time.Millisecond, 0, 1500 * time.Millisecond, 3 * time.Second}
	resume := make(chan struct{})
	locked, paused := pauseOnce("second", resume)
	fleet := make([]*member, len(skews))
	for i, skew := range skews {
		hook := locked // the first to get there hangs
		if i > 0 {
			hook = nil
		}
		fleet[i] = b.member(t, databaseURL, skew, hook, entries...)
	}
	var once sync.Once
	goOn := func() { once.Do(func() { close(resume) }) }
	defer func() {
		goOn()
		for _, m := range fleet {
			m.stop()
		}
	}()

	testservers.Eventually(t, "all entries are there", func() bool {
		var n int
		err := b.DB.QueryRow(t.Context(), "SELECT count(*) FROM carpool.schedules").Scan(&n)
		return err == nil && n == len(entries)
	})
	random := rand.New(rand.NewPCG(1, 2))
	for step, passed := 0, time.Duration(0); passed < 1000*time.Second; step++ {
		d := time.Duration(1+random.IntN(3)) * time.Second
		b.pass(t, d)
		passed += d
		testservers.Eventually(t, "the ticks keep up", func() bool { return b.behind(t, "second") < time.Minute })
		switch step % 40 {
		case 5, 15, 25: // an instance is stopped wherever it is, and replaced
			i := 1 + random.IntN(len(fleet)-1)
			fleet[i].stop()
			fleet[i] = b.member(t, databaseURL, skews[i], nil, entries...)
		case 10, 20, 30:
			b.exec(t, `SELECT pg_terminate_backend(pid) FROM pg_stat_activity
				WHERE datname = current_database() AND pid <> pg_backend_pid() AND query LIKE '%carpool.schedule%' AND random() < 0.5`)
		case 35:
			if err := b.rdb.FlushDB(t.Context()).Err(); err != nil {
				t.Fatal(err)
			}
		case 38: // Postgres is away for all of them
			proxy.Refuse()
			proxy.Reset()
			b.pass(t, 20*time.Second)
			passed += 20 * time.Second
			proxy.Heal()
		}
	}
	select {
	case <-paused:
	case <-time.After(time.Minute):
		t.Fatal("no instance hung in the middle of a tick")
	}
	goOn()
	end := b.now(t)
	testservers.Eventually(t, "the ticks are done", func() bool { return b.behind(t, "second") <= 0 })
	for _, m := range fleet { // what is under way is committed or not
		m.stop()
	}
	for _, e := range entries {
		b.expect(t, e, end.Add(-time.Minute))
	}
	t.Logf("%s of the clock", end.Sub(start))
}

// One instance is put to sleep in the middle of a tick. Another takes the tick
// within seconds, and the first one's attempt is void when it wakes up.
func TestFleet_AnInstanceThatHangsNeitherHoldsNorDoublesATick(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	entry := Entry{Name: "a", Cron: "* * * * *", Payload: Ping{To: "a"}}
	resume := make(chan struct{})
	locked, paused := pauseOnce("a", resume)
	sleeper := b.member(t, b.DatabaseURL, 0, locked, entry)
	defer sleeper.stop()
	testservers.Eventually(t, "the entry is there", func() bool {
		list, err := List(t.Context(), b.DB)
		return err == nil && len(list) == 1
	})
	b.pass(t, time.Minute)
	select {
	case <-paused:
	case <-time.After(time.Minute):
		t.Fatal("the tick is not taken")
	}
	other := b.member(t, b.DatabaseURL, 0, nil, entry)
	defer other.stop()
	testservers.Eventually(t, "the other takes the tick", func() bool { return len(b.jobs(t)) == 1 })
	b.exec(t, "DELETE FROM carpool.outbox") // it is delivered, so nothing there can stop the first
	close(resume)
	b.pass(t, time.Minute)
	testservers.Eventually(t, "the next tick is taken", func() bool { return len(b.jobs(t)) == 2 })
	sleeper.stop()
	other.stop()
	want := []string{tickID("a", b.now(t).Add(-time.Minute)).String(), tickID("a", b.now(t)).String()}
	if diff := cmp.Diff(want, b.ids(t, "a")); diff != "" {
		t.Error(diff)
	}
}

// A commit whose answer is lost is not made up for: the row tells what was.
func TestFleet_ALostAnswerToACommitDoublesNothing(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	entry := Entry{Name: "a", Cron: "@every 1s", Payload: Ping{To: "a"}, Missed: MissedAll}
	databaseURL, proxy := testservers.ThroughProxy(t, b.DatabaseURL)
	var cuts atomic.Int32
	cut := func(context.Context, string) { // at some point of the rest of the transaction
		if cuts.Add(1)%3 == 0 {
			time.AfterFunc(time.Duration(rand.IntN(2000))*time.Microsecond, proxy.Reset)
		}
	}
	b.deliverAtOnce(t)
	b.exec(t, "UPDATE test_clock SET at = date_trunc('second', now())")
	members := []*member{b.member(t, databaseURL, 0, cut, entry), b.member(t, b.DatabaseURL, 0, nil, entry)}
	defer func() {
		for _, m := range members {
			m.stop()
		}
	}()
	testservers.Eventually(t, "the entry is there", func() bool {
		list, err := List(t.Context(), b.DB)
		return err == nil && len(list) == 1
	})
	for range 300 {
		b.pass(t, time.Second)
		testservers.Eventually(t, "the ticks keep up", func() bool { return b.behind(t, "a") < 3*time.Second })
	}
	end := b.now(t)
	testservers.Eventually(t, "all ticks are decided", func() bool { return b.behind(t, "a") <= 0 })
	for _, m := range members {
		m.stop()
	}
	if cuts.Load() < 10 {
		t.Errorf("the proxy's member got only %d ticks to decide", cuts.Load())
	}
	b.expect(t, entry, end)
}

func TestFleet_AnOutageOfPostgresIsLoggedOnceAndItsEnd(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	databaseURL, proxy := testservers.ThroughProxy(t, b.DatabaseURL)
	proxy.Refuse() // from the very start
	entry := Entry{Name: "a", Cron: "* * * * *", Payload: Ping{To: "a"}}
	m := b.member(t, databaseURL, 0, nil, entry)
	defer m.stop()
	testservers.Eventually(t, "the outage is logged", func() bool { return strings.Contains(b.log.String(), "the scheduler waits") })
	proxy.Heal()
	testservers.Eventually(t, "its end is logged", func() bool { return strings.Contains(b.log.String(), "the scheduler goes on") })
	if n := strings.Count(b.log.String(), "the scheduler waits"); n != 1 {
		t.Errorf("one outage is logged %d times", n)
	}
	before := len(b.jobs(t)) // the first look may have made up for what was missed
	b.pass(t, time.Minute)
	testservers.Eventually(t, "ticks go on", func() bool { return len(b.jobs(t)) == before+1 })
}

// A change made in the table is taken up by a scheduler that runs as it does in
// production, by the clock on the wall.
func TestFleet_AChangeIsTakenUpWithinSeconds(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	cfg := b.config()
	cfg.clock, cfg.lookEvery = "", 0
	start(t, cfg)
	if err := Add(t.Context(), b.DB, Entry{Name: "a", Cron: "@every 1s", Payload: Ping{To: "a"}}, false); err != nil {
		t.Fatal(err)
	}
	testservers.Eventually(t, "it is run", func() bool { return len(b.jobs(t)) >= 2 })
	b.exec(t, `UPDATE carpool.schedules SET payload = '{"to": "b"}'`)
	testservers.Eventually(t, "the change is taken up", func() bool { return len(b.ids(t, "b")) > 0 })
	if err := SetEnabled(t.Context(), b.DB, "a", false); err != nil {
		t.Fatal(err)
	}
	look(t, b.scheduler(t)) // after which no tick that was under way can be left
	var disabledAt, lastTick time.Time
	if err := b.DB.QueryRow(t.Context(), "SELECT changed_at, last_tick FROM carpool.schedules JOIN carpool.schedule_state USING (name)").
		Scan(&disabledAt, &lastTick); err != nil {
		t.Fatal(err)
	}
	if lastTick.After(disabledAt.Add(time.Second)) {
		t.Errorf("a tick of %s, although disabled at %s", lastTick, disabledAt)
	}
}

// The control: asynq's own schedulers, two of them, enqueue everything twice.
func TestControl_TwoOfAsynqsSchedulersDoubleEachTick(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	var mu sync.Mutex
	perSecond := map[int64]int{}
	for range 2 {
		s := asynq.NewSchedulerFromRedisClient(b.rdb, &asynq.SchedulerOpts{
			LogLevel: asynq.FatalLevel,
			PostEnqueueFunc: func(_ *asynq.TaskInfo, err error) {
				if err == nil {
					mu.Lock()
					defer mu.Unlock()
					perSecond[time.Now().Unix()]++
				}
			},
		})
		if _, err := s.Register("@every 1s", asynq.NewTask("test:ping", []byte(`{"to": "a"}`)), asynq.Queue("pings")); err != nil {
			t.Fatal(err)
		}
		if err := s.Start(); err != nil {
			t.Fatal(err)
		}
		defer s.Shutdown()
	}
	testservers.Eventually(t, "ticks are doubled", func() bool {
		mu.Lock()
		defer mu.Unlock()
		doubled := 0
		for _, n := range perSecond {
			if n == 2 {
				doubled++
			}
		}
		return doubled >= 2
	})
	pending, err := b.inspector.ListPendingTasks("pings")
	if err != nil {
		t.Fatal(err)
	}
	mu.Lock()
	defer mu.Unlock()
	t.Logf("%d jobs in %d seconds", len(pending), len(perSecond))
}
