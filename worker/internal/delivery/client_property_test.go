package delivery

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/hibiken/asynq"
	"github.com/redis/go-redis/v9"
	"pgregory.net/rapid"

	"github.com/carpool-go/carpool/internal/asynqwire"
	"github.com/carpool-go/carpool/internal/testservers"
	"github.com/carpool-go/carpool/worker/internal/workertest"
)

// wireModel is a plain picture of what two workers and Redis do: where each job is, and who
// may end it.
type wireModel struct {
	rdb    redis.UniversalClient
	client *asynq.Client

	queues  []string
	pending map[string][]string // by queue, the next one first
	paused  map[string]bool
	jobs    map[string]*modelJob // by id
	ids     []string             // of all jobs, also those that are gone
	began   time.Time
	clock   int // counts what is put off, so that no two are due at once
	fetches int

	workers [2]modelWorker
	past    []modelLease // that no worker holds any more
}

// modelJob is a job, and what its hash says.
type modelJob struct {
	queue, kind string
	place       string // a state as asynq has it; "" when nothing is left of it
	due         int    // what it was put off to, of those that are due; 0 for an hour later
	retained    bool
	retried     int
	deliveries  int // as it counts them
	free        int
	unended     string
	result      string
	lease       modelLease // while it is active
}

// modelLease is what a worker remembers of a job that it holds.
type modelLease struct {
	id    string
	token int
	fetch string
	data  string
}

type modelWorker struct {
	holds []modelLease
	// unanswered is a fetch that may have arrived, and what it has taken.
	unanswered *asynqwire.Fetch
	taken      []asynqwire.Fetched
}

func TestWire_KeepsItsPromisesThroughAnyHistory(t *testing.T) {
	t.Parallel()
	rdb := workertest.OpenRedis(t, testservers.Redis(t))
	histories := 0
	rapid.Check(t, func(rt *rapid.T) {
		histories++
		m := &wireModel{
			rdb: rdb, client: asynq.NewClientFromRedisClient(rdb), began: time.Now(),
			pending: make(map[string][]string), paused: make(map[string]bool), jobs: make(map[string]*modelJob),
		}
		for _, queue := range []string{"a", "b", "c"} {
			m.queues = append(m.queues, fmt.Sprintf("%s-%d", queue, histories)) // none has been used
		}
		rt.Repeat(map[string]func(*rapid.T){
			"":                        m.check,
			"enqueue":                 m.enqueue,
			"schedule":                m.schedule,
			"fetch":                   m.fetch,
			"fetch without an answer": m.fetchWithoutAnAnswer,
			"fetch again":             m.fetchAgain,
			"end":                     m.end,
			"end what is over":        m.endWhatIsOver,
			"extend":                  m.extend,
			"move due":                m.moveDue,
			"pause or resume":         m.pauseOrResume,
			"give back":               m.giveBack,
			"kill":                    m.kill,
		})
	})
}

func (m *wireModel) enqueue(t *rapid.T) {
	queue := rapid.SampledFrom(m.queues).Draw(t, "queue")
	for range rapid.IntRange(1, 6).Draw(t, "jobs") {
		id := m.add(t, queue)
		m.jobs[id].place = "pending"
		m.pending[queue] = append(m.pending[queue], id)
	}
}

func (m *wireModel) schedule(t *rapid.T) {
	id := m.add(t, rapid.SampledFrom(m.queues).Draw(t, "queue"), asynq.ProcessIn(time.Hour))
	job := m.jobs[id]
	job.place = "scheduled"
	if rapid.Bool().Draw(t, "due") {
		due := m.later(job)
		must(t, m.rdb.ZAdd(context.Background(), asynqwire.Scheduled(job.queue), redis.Z{Score: float64(due.Unix()), Member: id}).Err())
	}
}

func (m *wireModel) add(t *rapid.T, queue string, opts ...asynq.Option) (id string) {
	job := &modelJob{queue: queue, kind: rapid.SampledFrom([]string{"alpha", "beta"}).Draw(t, "kind"), retained: rapid.Bool().Draw(t, "retained")}
	id = fmt.Sprintf("job-%03d", len(m.ids))
	if job.retained {
		opts = append(opts, asynq.Retention(time.Hour))
	}
	_, err := m.client.Enqueue(asynq.NewTask(job.kind, []byte("{}")), append(opts, asynq.TaskID(id), asynq.Queue(queue))...)
	must(t, err)
	m.jobs[id] = job
	m.ids = append(m.ids, id)
	return id
}

func must(t *rapid.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// later has a job be due at a time that is over, after all that were due before.
func (m *wireModel) later(job *modelJob) time.Time {
	m.clock++
	job.due = m.clock
	return m.began.Add(time.Duration(m.clock-100_000) * time.Second).Truncate(time.Second)
}

// draw draws a fetch of a worker.
func (m *wireModel) draw(t *rapid.T) asynqwire.Fetch {
	m.fetches++
	fetch := asynqwire.Fetch{
		Token: rapid.IntRange(1, 3).Draw(t, "token"), // they collide often
		ID:    fmt.Sprintf("fetch-%d", m.fetches),
	}
	for _, queue := range rapid.Permutation(m.queues).Draw(t, "order") {
		fetch.Shares = append(fetch.Shares, asynqwire.Share{Queue: queue, Jobs: rapid.IntRange(0, 3).Draw(t, "share")})
	}
	if kind := rapid.SampledFrom([]string{"", "alpha", "beta"}).Draw(t, "leave"); kind != "" {
		fetch.Leave = []string{kind}
	}
	return fetch
}

// take is what a fetch takes that has not been made before.
func (m *wireModel) take(fetch asynqwire.Fetch) (jobs []asynqwire.Fetched, passed map[string]bool) {
	most := 0
	for _, share := range fetch.Shares {
		most += share.Jobs
	}
	passed = make(map[string]bool)
	for _, second := range []bool{false, true} {
		for _, share := range fetch.Shares {
			want := most - len(jobs)
			if !second {
				want = min(want, share.Jobs)
			}
			if m.paused[share.Queue] {
				continue
			}
			var aside []string
			for want > 0 && len(m.pending[share.Queue]) > 0 {
				id := m.pending[share.Queue][0]
				m.pending[share.Queue] = m.pending[share.Queue][1:]
				job := m.jobs[id]
				if slices.Contains(fetch.Leave, job.kind) {
					aside = append(aside, id)
					passed[share.Queue] = true
					continue
				}
				want--
				job.place = "active"
				job.deliveries++
				job.lease = modelLease{id: id, token: fetch.Token, fetch: fetch.ID}
				jobs = append(jobs, m.fetched(id))
			}
			m.pending[share.Queue] = append(m.pending[share.Queue], aside...)
		}
	}
	return jobs, passed
}

// fetched is a job as a fetch returns it, but for its message.
func (m *wireModel) fetched(id string) asynqwire.Fetched {
	job := m.jobs[id]
	return asynqwire.Fetched{Queue: job.queue, ID: id, Deliveries: job.deliveries, FreeRedeliveries: job.free, Unended: job.unended}
}

// do makes a fetch, compares what it has taken, and returns that.
func (m *wireModel) do(t *rapid.T, fetch asynqwire.Fetch, want []asynqwire.Fetched, passed map[string]bool, ordered bool) []asynqwire.Fetched {
	t.Helper()
	answer, err := fetch.Do(context.Background(), m.rdb)
	must(t, err)
	got := slices.Clone(answer.Jobs)
	for i := range got {
		if msg, err := asynqwire.ParseMessage([]byte(got[i].Data)); err != nil || msg.ID != got[i].ID || msg.Queue != got[i].Queue {
			t.Errorf("the message of job %s can't be read: %v", got[i].ID, err)
		}
		got[i].Data = ""
	}
	if !ordered {
		byID := func(a, b asynqwire.Fetched) int { return strings.Compare(a.ID, b.ID) }
		slices.SortFunc(got, byID)
		slices.SortFunc(want, byID)
	}
	if len(got)+len(want) > 0 {
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("what is fetched: (-want +got)\n%s", diff)
		}
	}
	if len(answer.Gone) > 0 {
		t.Errorf("jobs are gone: %v", answer.Gone)
	}
	for _, queue := range m.queues {
		if passed != nil && (answer.Passed[queue] != passed[queue] || answer.Paused[queue] != m.paused[queue]) {
			t.Errorf("queue %s is passed: %t, paused: %t; want %t, %t", queue, answer.Passed[queue], answer.Paused[queue], passed[queue], m.paused[queue])
		}
	}
	return answer.Jobs
}

func (m *wireModel) worker(t *rapid.T) *modelWorker {
	return &m.workers[rapid.IntRange(0, 1).Draw(t, "worker")]
}

// hold has a worker know of what it has fetched.
func (w *modelWorker) hold(fetch asynqwire.Fetch, jobs []asynqwire.Fetched) {
	for _, job := range jobs {
		w.holds = append(w.holds, modelLease{job.ID, fetch.Token, fetch.ID, job.Data})
	}
}

func (m *wireModel) fetch(t *rapid.T) {
	w := m.worker(t)
	if w.unanswered != nil {
		t.Skip("it asks for the answer first")
	}
	fetch := m.draw(t)
	want, passed := m.take(fetch)
	w.hold(fetch, m.do(t, fetch, want, passed, true))
}

func (m *wireModel) fetchWithoutAnAnswer(t *rapid.T) {
	w := m.worker(t)
	if w.unanswered != nil {
		t.Skip("it asks for the answer first")
	}
	m.loseAnswer(t, w)
}

func (m *wireModel) loseAnswer(t *rapid.T, w *modelWorker) {
	fetch := m.draw(t)
	if rapid.Bool().Draw(t, "arrives") {
		want, passed := m.take(fetch)
		w.taken = m.do(t, fetch, want, passed, true)
	}
	w.unanswered = &fetch
}

func (m *wireModel) fetchAgain(t *rapid.T) {
	w := m.worker(t)
	if w.unanswered == nil {
		m.loseAnswer(t, w)
		m.enqueue(t)
	}
	fetch := *w.unanswered
	fetch.Again = true
	if rapid.Bool().Draw(t, "for the last time") { // as when the worker stops
		fetch.Shares = slices.Clone(fetch.Shares)
		for i := range fetch.Shares {
			fetch.Shares[i].Jobs = 0
		}
	}
	// What was given back meanwhile is not its any more.
	w.taken = slices.DeleteFunc(w.taken, func(f asynqwire.Fetched) bool { return m.jobs[f.ID].lease.fetch != fetch.ID })
	var want []asynqwire.Fetched
	for _, f := range w.taken {
		want = append(want, m.fetched(f.ID))
	}
	var passed map[string]bool
	if len(want) == 0 {
		want, passed = m.take(fetch)
	}
	answered := rapid.Bool().Draw(t, "answered")
	got := m.do(t, fetch, want, passed, false)
	for _, before := range w.taken {
		if !slices.ContainsFunc(got, func(now asynqwire.Fetched) bool { return now == before }) {
			t.Errorf("job %s was %+v, and is not the same again", before.ID, before)
		}
	}
	if !answered {
		w.taken = got
		return
	}
	w.hold(fetch, got)
	w.unanswered, w.taken = nil, nil
}

// ending draws what becomes of a job, and returns how the model has it.
func (m *wireModel) ending(t *rapid.T, lease modelLease) (end asynqwire.End, apply func()) {
	job := m.jobs[lease.id]
	msg, err := asynqwire.ParseMessage([]byte(lease.data))
	must(t, err)
	settle := func(place string) {
		*job = modelJob{queue: job.queue, kind: job.kind, place: place, retained: job.retained, retried: msg.Retried, result: job.result}
	}
	switch rapid.SampledFrom([]string{"done", "retry", "postpone", "archive", "archive as it is", "push back", "last"}).Draw(t, "end") {
	case "done":
		result := []byte(rapid.SampledFrom([]string{"", `"x"`}).Draw(t, "result"))
		if len(result) == 0 {
			result = nil
		}
		return asynqwire.Done{Message: msg, Result: result}, func() {
			settle("")
			if job.retained {
				job.place, job.result = "completed", string(result)
			}
		}
	case "retry":
		msg.Retried++
		msg.LastErr = "not today"
		return m.retryAt(t, job, asynqwire.RetryAt{Message: msg, Failed: true}, msg.Retried)
	case "postpone":
		return m.retryAt(t, job, asynqwire.RetryAt{Message: msg, Unended: rapid.SampledFrom([]string{"", "why"}).Draw(t, "unended")}, msg.Retried)
	case "archive":
		msg.LastErr = "never"
		return asynqwire.Archive{Message: &msg}, func() { settle("archived") }
	case "archive as it is":
		return asynqwire.Archive{}, func() { settle("archived") }
	case "push back":
		undelivered := rapid.Bool().Draw(t, "undelivered")
		return asynqwire.PushBack{Undelivered: undelivered}, func() {
			m.pending[job.queue] = append([]string{lease.id}, m.pending[job.queue]...)
			job.pushBack(undelivered)
		}
	default:
		undelivered := rapid.Bool().Draw(t, "undelivered")
		return asynqwire.PushBack{Last: true, Undelivered: undelivered}, func() {
			m.pending[job.queue] = append(m.pending[job.queue], lease.id)
			job.pushBack(undelivered)
		}
	}
}

func (j *modelJob) pushBack(undelivered bool) {
	j.place, j.lease = "pending", modelLease{}
	if undelivered {
		j.deliveries--
	}
}

func (m *wireModel) retryAt(t *rapid.T, job *modelJob, end asynqwire.RetryAt, retried int) (asynqwire.End, func()) {
	end.Due = time.Now().Add(time.Hour)
	due := 0
	if rapid.Bool().Draw(t, "due") {
		was := job.due
		end.Due = m.later(job)
		due, job.due = job.due, was
	}
	return end, func() {
		job.place, job.lease, job.due, job.retried, job.unended = "retry", modelLease{}, due, retried, end.Unended
	}
}

// end ends some of what a worker holds, in one exchange, a part of it twice. Some of it may
// be over.
func (m *wireModel) end(t *rapid.T) {
	w := m.worker(t)
	if len(w.holds) == 0 {
		t.Skip("it holds nothing")
	}
	n := rapid.IntRange(1, len(w.holds)).Draw(t, "jobs")
	var ends []asynqwire.Ending
	var holds []bool
	said := make(map[string]bool)
	for _, lease := range w.holds[:n] {
		m.past = append(m.past, lease)
		if said[lease.id] { // it has had the job before
			continue
		}
		said[lease.id] = true
		end, apply := m.ending(t, lease)
		ends = append(ends, asynqwire.Ending{Queue: m.jobs[lease.id].queue, Lease: asynqwire.Lease{ID: lease.id, Token: lease.token}, End: end})
		isHeld := m.isHeld(lease)
		if isHeld {
			apply()
		}
		holds = append(holds, isHeld)
	}
	w.holds = w.holds[n:]
	m.send(t, ends, holds)
	if rapid.Bool().Draw(t, "twice") { // its answer was lost
		m.send(t, ends, make([]bool, len(ends)))
	}
}

// isHeld reports whether a lease is a job's by its token, which is all that Redis knows.
func (m *wireModel) isHeld(lease modelLease) bool {
	job := m.jobs[lease.id]
	return job.place == "active" && job.lease.token == lease.token
}

func (m *wireModel) send(t *rapid.T, ends []asynqwire.Ending, holds []bool) {
	t.Helper()
	for i, answer := range asynqwire.SendEnds(context.Background(), m.rdb, ends) {
		if answer.Err != nil || answer.Held != holds[i] {
			t.Errorf("the answer to %+v is %+v; want held %t", ends[i], answer, holds[i])
		}
	}
}

// endWhatIsOver ends a job whose lease is over; the check sees that nothing has changed.
func (m *wireModel) endWhatIsOver(t *rapid.T) {
	over := slices.DeleteFunc(slices.Clone(m.past), m.isHeld)
	if len(over) == 0 {
		t.Skip("there is none")
	}
	lease := rapid.SampledFrom(over).Draw(t, "lease")
	end, _ := m.ending(t, lease)
	m.send(t, []asynqwire.Ending{{Queue: m.jobs[lease.id].queue, Lease: asynqwire.Lease{ID: lease.id, Token: lease.token}, End: end}}, []bool{false})
}

func (m *wireModel) extend(t *rapid.T) {
	leases, wantExtended, wantLost := make(map[string][]asynqwire.Lease), make(map[string][]asynqwire.Lease), make(map[string][]asynqwire.Lease)
	seen := make(map[string]bool)
	for _, lease := range append(slices.Clone(m.worker(t).holds), m.past[max(0, len(m.past)-3):]...) {
		queue, l := m.jobs[lease.id].queue, asynqwire.Lease{ID: lease.id, Token: lease.token}
		if seen[lease.id] {
			continue
		}
		seen[lease.id] = true
		leases[queue] = append(leases[queue], l)
		if m.isHeld(lease) {
			wantExtended[queue] = append(wantExtended[queue], l)
			// It is about to be over.
			must(t, m.rdb.ZIncrBy(context.Background(), asynqwire.Leases(queue), -20, lease.id).Err())
		} else {
			wantLost[queue] = append(wantLost[queue], l)
		}
	}
	extended, lost, err := asynqwire.ExtendLeases(context.Background(), m.rdb, leases)
	must(t, err)
	if diff := cmp.Diff(wantExtended, extended); diff != "" {
		t.Errorf("extended: (-want +got)\n%s", diff)
	}
	if diff := cmp.Diff(wantLost, lost); diff != "" {
		t.Errorf("lost: (-want +got)\n%s", diff)
	}
	for queue, leases := range extended {
		for _, lease := range leases {
			until, err := m.rdb.ZScore(context.Background(), asynqwire.Leases(queue), lease.ID).Result()
			must(t, err)
			if left := time.Until(time.Unix(int64(until), 0)); left < asynqwire.LeaseTime-10*time.Second || left > asynqwire.LeaseTime+time.Second {
				t.Errorf("the lease of job %s lasts for %s", lease.ID, left)
			}
		}
	}
}

func (m *wireModel) moveDue(t *rapid.T) {
	_, err := asynqwire.MoveDue(context.Background(), m.rdb, m.queues)
	must(t, err)
	for _, place := range []string{"scheduled", "retry"} {
		var due []string
		for id, job := range m.jobs {
			if job.place == place && job.due > 0 {
				due = append(due, id)
			}
		}
		slices.SortFunc(due, func(a, b string) int { return m.jobs[a].due - m.jobs[b].due })
		for _, id := range due {
			job := m.jobs[id]
			job.place, job.due = "pending", 0
			m.pending[job.queue] = append(m.pending[job.queue], id)
		}
	}
}

func (m *wireModel) pauseOrResume(t *rapid.T) {
	queue := rapid.SampledFrom(m.queues).Draw(t, "queue")
	m.paused[queue] = !m.paused[queue]
	if m.paused[queue] {
		must(t, m.rdb.Set(context.Background(), asynqwire.Paused(queue), "1", 0).Err())
	} else {
		must(t, m.rdb.Del(context.Background(), asynqwire.Paused(queue)).Err())
	}
}

// giveBack gives a job back that is active, as the rescue does; or that was, or whose lease
// is another one meanwhile, for which it must not.
func (m *wireModel) giveBack(t *rapid.T) {
	if len(m.ids) == 0 {
		t.Skip("there is no job")
	}
	id := rapid.SampledFrom(m.ids).Draw(t, "id")
	job := m.jobs[id]
	if job.place == "" || rapid.IntRange(0, 3).Draw(t, "otherwise") > 0 {
		var active []string
		for id, job := range m.jobs {
			if job.place == "active" {
				active = append(active, id)
			}
		}
		if len(active) == 0 {
			t.Skip("there is no active job")
		}
		slices.Sort(active)
		id = rapid.SampledFrom(active).Draw(t, "active")
		job = m.jobs[id]
	}
	msg, unended, err := asynqwire.ReadUnended(context.Background(), m.rdb, job.queue, id)
	must(t, err)
	if unended.FreeRedeliveries != job.free || unended.Reason != job.unended || msg.Retried != job.retried {
		t.Errorf("job %s: %+v, retried %d; want %+v", id, unended, msg.Retried, job)
	}
	lease := ""
	if score, err := m.rdb.ZScore(context.Background(), asynqwire.Leases(job.queue), id).Result(); err == nil {
		lease = strconv.FormatFloat(score, 'f', -1, 64)
		if rapid.IntRange(0, 3).Draw(t, "extended meanwhile") == 0 {
			must(t, m.rdb.ZIncrBy(context.Background(), asynqwire.Leases(job.queue), 1, id).Err())
			moved, err := asynqwire.GiveBack(context.Background(), m.rdb, job.queue, id, lease, msg, unended)
			if err != nil || moved {
				t.Errorf("a job whose lease was extended is given back: %t, error %v", moved, err)
			}
			return
		}
	}
	why := ""
	if rapid.Bool().Draw(t, "uses up a try") {
		msg.Retried++
		unended.Reason, why = "died", "died"
	} else {
		unended.FreeRedeliveries++
		why = unended.Reason
	}
	was := job.due
	msg.LastFailedAt = m.later(job).Unix()
	due := job.due
	job.due = was
	moved, err := asynqwire.GiveBack(context.Background(), m.rdb, job.queue, id, lease, msg, unended)
	must(t, err)
	if moved != (job.place == "active") {
		t.Errorf("job %s, which was %s, is given back: %t", id, job.place, moved)
	}
	if job.place == "active" {
		job.place, job.lease, job.due = "retry", modelLease{}, due
		job.retried, job.free, job.unended = msg.Retried, unended.FreeRedeliveries, why
	}
}

// kill has a worker forget all that it knows.
func (m *wireModel) kill(t *rapid.T) {
	w := m.worker(t)
	m.past = append(m.past, w.holds...)
	*w = modelWorker{}
}

// check compares Redis with the model: each job is in one place, and in no other.
func (m *wireModel) check(t *rapid.T) {
	ctx := context.Background()
	pipe := m.rdb.Pipeline()
	hashes := make(map[string]*redis.MapStringStringCmd)
	for id, job := range m.jobs {
		hashes[id] = pipe.HGetAll(ctx, asynqwire.Task(job.queue, id))
	}
	lists, sets := make(map[string]*redis.StringSliceCmd), make(map[string]*redis.ZSliceCmd)
	for _, queue := range m.queues {
		for _, list := range []string{asynqwire.Pending(queue), asynqwire.Active(queue)} {
			lists[list] = pipe.LRange(ctx, list, 0, -1)
		}
		for _, set := range append(asynqwire.Jobs(queue)[2:], asynqwire.Leases(queue)) {
			sets[set] = pipe.ZRangeWithScores(ctx, set, 0, -1)
		}
	}
	_, err := pipe.Exec(ctx)
	must(t, err)
	for _, queue := range m.queues {
		got := slices.Clone(lists[asynqwire.Pending(queue)].Val())
		slices.Reverse(got)
		if !slices.Equal(got, m.pending[queue]) {
			t.Errorf("queue %s has %v, want %v", queue, got, m.pending[queue])
		}
		got = slices.Sorted(slices.Values(lists[asynqwire.Active(queue)].Val()))
		if want := m.at(queue, "active"); !slices.Equal(got, want) {
			t.Errorf("queue %s has active %v, want %v", queue, got, want)
		}
		for place, set := range map[string]string{
			"scheduled": asynqwire.Scheduled(queue), "retry": asynqwire.Retry(queue), "archived": asynqwire.Archived(queue),
			"completed": asynqwire.Completed(queue), "active": asynqwire.Leases(queue),
		} {
			var got []string
			for _, z := range sets[set].Val() {
				id, _ := z.Member.(string)
				got = append(got, id)
				if token := asynqwire.TokenOf(z.Score); place == "active" && token != m.jobs[id].lease.token {
					t.Errorf("job %s has the token %d, want %d", id, token, m.jobs[id].lease.token)
				}
			}
			slices.Sort(got)
			if want := m.at(queue, place); !slices.Equal(got, want) {
				t.Errorf("%s has %v, want %v", set, got, want)
			}
		}
	}
	for id, hash := range hashes {
		m.jobs[id].compare(t, id, hash.Val())
	}
}

// at are the jobs of a queue in a place.
func (m *wireModel) at(queue, place string) []string {
	return slices.DeleteFunc(slices.Sorted(maps.Keys(m.jobs)), func(id string) bool {
		return m.jobs[id].queue != queue || m.jobs[id].place != place
	})
}

// compare compares a job's hash with it.
func (j *modelJob) compare(t *rapid.T, id string, hash map[string]string) {
	t.Helper()
	if j.place == "" {
		if len(hash) > 0 {
			t.Errorf("job %s is gone, and its hash is %v", id, hash)
		}
		return
	}
	msg, err := asynqwire.ParseMessage([]byte(hash["msg"]))
	if err != nil || msg.ID != id || msg.Retried != j.retried {
		t.Errorf("job %s has the message %+v, error %v; want %d tries used", id, msg, err, j.retried)
	}
	count := func(name string) int {
		n, _ := strconv.Atoi(hash[name])
		return n
	}
	type said struct {
		state, fetch, unended, result string
		deliveries, free              int
	}
	want := said{j.place, j.lease.fetch, j.unended, j.result, j.deliveries, j.free}
	got := said{hash["state"], hash["carpool_fetch"], hash["carpool_unended"], hash["result"], count("carpool_deliveries"), count(asynqwire.FreeRedeliveries)}
	if got != want {
		t.Errorf("job %s says %+v, want %+v", id, got, want)
	}
}
