// Package doctor examines what a worker stands on: its settings, its Redis, its Postgres,
// and the jobs in them. It changes nothing, and looks at what the worker's own users may see.
package doctor

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/carpool-go/carpool/admin"
	"github.com/carpool-go/carpool/dbpool"
	"github.com/carpool-go/carpool/tasks"
)

// Result is what a check has come to.
type Result string

const (
	// OK is what needs nobody.
	OK Result = "ok"
	// Warning is that a worker runs, and something is not as it should be, or could not be
	// looked at.
	Warning Result = "warning"
	// Failure is that a worker can't start, can't do its work, or may lose jobs.
	Failure Result = "failure"
)

// Finding is what one check has found. No field holds a secret or a payload's content.
type Finding struct {
	// Check names what was looked at.
	Check  string `json:"check"`
	Result Result `json:"result"`
	// Says is what was found, in one line.
	Says string `json:"says"`
	// WayOut is what to do; "" where there is nothing to do.
	WayOut string `json:"way_out,omitempty"`
}

// Config is the worker that is examined. Redis and Postgres are looked at if their URLs are
// set, all else by what the fields say.
type Config struct {
	// RedisURL is the worker's; "" leaves Redis out, and the jobs.
	RedisURL string
	// Pool is the worker's; an empty URL leaves Postgres out.
	Pool dbpool.Config
	// Faults are what is wrong with the settings, a line each. With any, nothing is
	// concluded from the other settings but the URLs.
	Faults []string
	// Doubts are what looks wrong with the settings, a line each.
	Doubts []string
	// Tasks are the kinds that the worker runs; nil leaves out what needs them.
	Tasks *tasks.Set
	// Queues, Concurrency, ShutdownTimeout, ValidateEvery, MaxPayload and OutboundAllow are
	// the worker's own, with their defaults.
	Queues          map[string]int
	Concurrency     int
	ShutdownTimeout time.Duration
	ValidateEvery   time.Duration
	MaxPayload      int
	OutboundAllow   string
	// StopsWithin is how long after SIGTERM the worker has ended.
	StopsWithin time.Duration
	// Platform is where it runs; the zero value is a place that is not known.
	Platform Platform
	// KillAfter is how long after SIGTERM the platform ends it; 0 is not known.
	KillAfter time.Duration

	now func() time.Time // the worker's clock; nil is the machine's
}

const (
	// reachTimeout bounds the first answer of each server.
	reachTimeout = 4 * time.Second
	// serverTimeout bounds all that one server is asked, and jobsTimeout the look at the
	// jobs, for which both are.
	serverTimeout = 8 * time.Second
	jobsTimeout   = 8 * time.Second
)

// examination is one run of the checks.
type examination struct {
	Config
	redis    redisLook
	postgres postgresLook
}

// Examine looks at everything, both servers at once, and returns what it has found in the
// order of the checks. It takes some seconds at most for a server that does not answer, and
// looks at the other one all the same. Findings after the end of ctx say that nothing was
// answered.
func Examine(ctx context.Context, c Config) []Finding {
	if c.now == nil {
		c.now = time.Now
	}
	e := &examination{Config: c}
	findings := e.checkSettings()
	var ofRedis, ofPostgres []Finding
	var both sync.WaitGroup
	both.Go(func() { ofRedis = e.checkRedis(ctx) })
	both.Go(func() { ofPostgres = e.checkPostgres(ctx) })
	both.Wait()
	defer e.redis.close()
	defer e.postgres.close()
	findings = append(findings, ofRedis...)
	findings = append(findings, ofPostgres...)
	findings = append(findings, e.checkClocks()...)
	return append(findings, e.checkJobs(ctx)...)
}

// report collects the findings of one check.
type report struct {
	check    string
	findings []Finding
}

func (r *report) add(result Result, wayOut, format string, args ...any) {
	r.findings = append(r.findings, Finding{r.check, result, fmt.Sprintf(format, args...), wayOut})
}

func (r *report) warn(wayOut, format string, args ...any) { r.add(Warning, wayOut, format, args...) }

func (r *report) fail(wayOut, format string, args ...any) { r.add(Failure, wayOut, format, args...) }

// orOK returns the findings, or that all is well if there is none.
func (r *report) orOK(format string, args ...any) []Finding {
	if len(r.findings) == 0 {
		r.add(OK, "", format, args...)
	}
	return r.findings
}

// notSeen is the finding of a check that its server did not let look.
func notSeen(check, wayOut string, err error) Finding {
	return Finding{check, Warning, "it could not be looked at: " + err.Error(), wayOut}
}

// far is a round trip from which on a server counts as far away, because a job takes several
// to each.
const far = 10 * time.Millisecond

// pings are how many questions a round trip is measured by: the first one connects, and of
// the others the fastest counts, because the rest may have waited for a processor.
const pings = 10

func (r *report) roundTrip(d time.Duration) {
	if d >= far {
		r.warn("run the worker in the same region as the server, and use the internal URL",
			"a round trip takes %s, and each job takes several", shortTime(d))
	}
}

// clock is a server's time against the worker's.
type clock struct {
	server string
	// ahead is how far the server's is ahead, give or take half of the round trip.
	ahead, within time.Duration
}

// compare returns a server's clock against the worker's, of the question that was answered
// the fastest. ask returns the server's time. ok is false if it has not answered.
func (e *examination) compare(ctx context.Context, server string, ask func(context.Context) (time.Time, error)) (best clock, err error) {
	const times = 3
	for i := range times {
		asked, started := e.now(), time.Now()
		theirs, err := ask(ctx)
		if err != nil {
			return clock{}, err
		}
		took := time.Since(started)
		if i == 0 || took/2 < best.within {
			best = clock{server, theirs.Sub(asked.Add(took / 2)), took / 2}
		}
	}
	return best, nil
}

// clocksApart is from how far apart on clocks are called different.
const clocksApart = time.Second

func (e *examination) checkClocks() []Finding {
	r := &report{check: "clocks"}
	says := ""
	for _, c := range []*clock{e.redis.clock, e.postgres.clock} {
		if c == nil {
			continue
		}
		says += fmt.Sprintf(", %s's within %s", c.server, shortTime(max(c.ahead.Abs(), c.within)))
		if off := c.ahead.Abs() - c.within; off >= clocksApart {
			which := "ahead of"
			if c.ahead < 0 {
				which = "behind"
			}
			r.warn("have all machines' clocks set by NTP: jobs that are due at a time, and schedules, go by them",
				"the clock of %s is %s %s this machine's", c.server, shortTime(c.ahead.Abs()), which)
		}
	}
	if says == "" {
		return nil // no server has told its time, which is a finding of its own
	}
	return r.orOK("of this machine's%s", says)
}

// shortTime is a duration with as many digits as people read.
func shortTime(d time.Duration) string {
	switch {
	case d < time.Millisecond:
		return d.Round(10 * time.Microsecond).String()
	case d < time.Second:
		return d.Round(100 * time.Microsecond).String()
	case d < time.Minute:
		return d.Round(100 * time.Millisecond).String()
	}
	return d.Round(time.Second).String()
}

// plural is a number with its noun.
func plural(n int, noun string) string {
	if n == 1 {
		return "1 " + noun
	}
	return fmt.Sprintf("%d %ss", n, noun)
}

// WorkerBudget returns the connections that the server of db allows, and how many an
// instance with this pool may open: the pool's, and the relay's one. The error is that of
// [dbpool.Pool.Budget].
func WorkerBudget(ctx context.Context, db *dbpool.Pool, pool dbpool.Config) (dbpool.Budget, error) {
	budget, err := db.Budget(ctx)
	budget.PerInstance = pool.Size + pool.MaxOverflow + 1
	return budget, err
}

// Platform is what runs the worker, as far as it matters at a shutdown.
type Platform struct {
	// Name is the platform's; "" is one that is not known.
	Name string
	// Setting says how long it waits after SIGTERM, and Default is what that is unless set.
	Setting string
	Default time.Duration
	// Most is the longest it can be told to wait; 0 is no limit.
	Most time.Duration
}

// PlatformOf tells the platform by its variables of the environment.
func PlatformOf(env func(variable string) string) Platform {
	switch {
	case env("RENDER") != "":
		return Platform{"Render", "maxShutdownDelaySeconds", 30 * time.Second, 300 * time.Second}
	case env("KUBERNETES_SERVICE_HOST") != "":
		return Platform{"Kubernetes", "terminationGracePeriodSeconds", 30 * time.Second, 0}
	}
	return Platform{}
}

// knownKinds are the kinds that the worker or an instance that is up knows. ok is false if
// that can't be said.
func (e *examination) knownKinds(up []admin.Instance) (known map[string]bool, ok bool) {
	if e.Tasks == nil {
		return nil, false
	}
	known = make(map[string]bool)
	for _, kind := range e.Tasks.Kinds() {
		known[kind] = true
	}
	for _, i := range up {
		if i.Kinds == nil {
			return nil, false
		}
		for _, kind := range i.Kinds {
			known[kind] = true
		}
	}
	return known, true
}
