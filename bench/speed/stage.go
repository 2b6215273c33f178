package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/redis/go-redis/v9"

	"github.com/carpool-go/carpool/internal/servers"
)

// poolSize is how many connections the jobs of a contestant share: as many as carpool's
// default pool has at most.
const poolSize = 10

// pickupPause is the time between two jobs for an idle worker.
const pickupPause = 60 * time.Millisecond

// settle is how long a worker is left alone after its start before it counts as idle.
const settle = 2 * time.Second

// scenario is what is measured at once.
type scenario struct {
	name  string
	about string // how much there is of it
	job   string // one of emptyJob, insertJob, onceJob
	slots int
	jobs  int
	far   bool // Redis is behind a delay
	// farDatabase is how long a round trip to Postgres takes longer; 0: Postgres is near.
	farDatabase time.Duration
	celery      bool // Celery takes part, where it is chosen
	// measure runs one contestant once.
	measure func(*stage, context.Context, entrant, spec) (figures, error)
}

// takes says whether an entrant takes part.
func (sc scenario) takes(e entrant) bool {
	switch {
	case e.plays == "river":
		return !sc.far
	case e.plays == "asynq-plain":
		return sc.job == onceJob
	case e.celery():
		return sc.celery
	}
	return true
}

// entrant is one of those compared.
type entrant struct {
	name  string // in the table
	plays string // one of contestants
	path  string // of the program
}

func (e entrant) celery() bool { return strings.HasPrefix(e.plays, "celery-") }

// figure is something that was measured, and figures are in the order in which they are
// printed. The first is the one by which contestants are compared.
type figure struct {
	name  string
	value float64
}

type figures []figure

// stage is the servers on which they compete.
type stage struct {
	options
	redis    *servers.Redis
	postgres *servers.Postgres
	made     int // databases
}

// measure has each entrant run once a round, beginning with another one each time, and
// prints the medians.
func (s *stage) measure(ctx context.Context, sc scenario, entrants []entrant, out io.Writer) error {
	far := s.redis.URL()
	note := ""
	if sc.far {
		line, err := newDelayLine(far, s.delay)
		if err != nil {
			return err
		}
		defer line.close()
		direct, err := pingTime(ctx, far)
		if err != nil {
			return err
		}
		far = line.url
		through, err := pingTime(ctx, far)
		if err != nil {
			return err
		}
		note = fmt.Sprintf("; a PING takes %s, through the delay %s", direct, through)
	}
	results := make(map[string][]figures)
	for round := range s.rounds {
		for i := range entrants {
			e := entrants[(round+i)%len(entrants)]
			got, err := s.runOnce(ctx, sc, e, far)
			if err != nil {
				return fmt.Errorf("%s: %w", e.name, err)
			}
			if s.verbose {
				fmt.Fprintf(os.Stderr, "%s, round %d: %s: %s\n", sc.name, round+1, e.name, got)
			}
			results[e.name] = append(results[e.name], got)
		}
	}
	fmt.Fprintf(out, "\n**%s%s** (%s%s; median of %d)\n\n", strings.ToUpper(sc.name[:1]), sc.name[1:], sc.about, note, s.rounds)
	printTable(out, entrants, results)
	return nil
}

// runOnce gives an entrant empty servers, and takes them away again.
func (s *stage) runOnce(ctx context.Context, sc scenario, e entrant, redisURL string) (got figures, err error) {
	s.made++
	name := fmt.Sprintf("speed_%d", s.made)
	databaseURL, err := s.postgres.Database(ctx, name)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, s.clear(context.WithoutCancel(ctx), name)) }()
	job := spec{
		Contestant: e.plays, Job: sc.job, Slots: sc.slots, Jobs: sc.jobs, PoolSize: poolSize,
		RedisURL: s.redis.URL(), WorkerRedisURL: redisURL, DatabaseURL: databaseURL, WorkerDatabaseURL: databaseURL, Queues: s.queues,
	}
	if sc.farDatabase > 0 {
		line, err := newDelayLine(databaseURL, sc.farDatabase)
		if err != nil {
			return nil, err
		}
		defer line.close()
		job.WorkerDatabaseURL = line.url
	}
	if e.celery() {
		job.Jobs = max(100, job.Jobs/2) // or its turns would take most of the time
	}
	if _, err := finish(ctx, e.path, job.to("prepare")); err != nil {
		return nil, err
	}
	return sc.measure(s, ctx, e, job)
}

func (s *stage) clear(ctx context.Context, database string) error {
	rdb, err := openRedis(s.redis.URL())
	if err != nil {
		return err
	}
	defer rdb.Close()
	if err := rdb.FlushAll(ctx).Err(); err != nil {
		return err
	}
	conn, err := pgx.Connect(ctx, s.postgres.URL())
	if err != nil {
		return err
	}
	defer conn.Close(ctx)
	_, err = conn.Exec(ctx, "DROP DATABASE "+pgx.Identifier{database}.Sanitize()+" WITH (FORCE)")
	return err
}

// drain measures how fast a full queue is worked off.
func (s *stage) drain(ctx context.Context, e entrant, job spec) (figures, error) {
	if _, err := finish(ctx, e.path, job.to("produce")); err != nil {
		return nil, err
	}
	rdb, err := openRedis(s.redis.URL())
	if err != nil {
		return nil, err
	}
	defer rdb.Close()
	before, err := statsOf(ctx, rdb)
	if err != nil {
		return nil, err
	}
	w, err := start(ctx, e.path, job.to("work"))
	if err != nil {
		return nil, err
	}
	defer w.kill()
	r, err := w.ask("await")
	if err != nil {
		return nil, err
	}
	after, err := statsOf(ctx, rdb)
	if err != nil {
		return nil, err
	}
	if err := w.end(); err != nil {
		return nil, err
	}
	if err := s.check(ctx, e, job); err != nil {
		return nil, err
	}
	jobs := float64(job.Jobs)
	return figures{
		{"jobs/s", r.Rate},
		{"worker's CPU, µs/job", r.CPUPerJob},
		{"Redis' CPU, µs/job", float64((after.cpu - before.cpu).Microseconds()) / jobs},
		{"Redis commands/job, with those in scripts", float64(after.commands-before.commands) / jobs},
	}, nil
}

// check looks whether the jobs were done: none is left, and the rows are there.
func (s *stage) check(ctx context.Context, e entrant, job spec) error {
	r, err := finish(ctx, e.path, job.to("left"))
	if err != nil {
		return err
	}
	if r.Left > 0 {
		return fmt.Errorf("%d jobs are left", r.Left)
	}
	if job.Job == emptyJob {
		return nil
	}
	conn, err := pgx.Connect(ctx, job.DatabaseURL)
	if err != nil {
		return err
	}
	defer conn.Close(context.WithoutCancel(ctx))
	var rows, jobs int
	if err := conn.QueryRow(ctx, "SELECT count(*), count(DISTINCT job) FROM effects").Scan(&rows, &jobs); err != nil {
		return err
	}
	if jobs != job.Jobs || job.Job == onceJob && rows != jobs {
		return fmt.Errorf("%d rows of %d jobs, instead of %d", rows, jobs, job.Jobs)
	}
	return nil
}

// pickup measures how long a job waits on an idle worker, from the call that enqueues it.
func (s *stage) pickup(ctx context.Context, e entrant, job spec) (figures, error) {
	w, err := s.startIdle(ctx, e, job)
	if err != nil {
		return nil, err
	}
	defer w.kill()
	job.Pause = pickupPause
	if _, err := finish(ctx, e.path, job.to("produce")); err != nil {
		return nil, err
	}
	r, err := w.ask("await")
	if err != nil {
		return nil, err
	}
	return figures{
		{"p50, ms", float64(r.P50) / float64(time.Millisecond)},
		{"p99, ms", float64(r.P99) / float64(time.Millisecond)},
	}, w.end()
}

// atRest measures what a worker costs that has nothing to do.
func (s *stage) atRest(ctx context.Context, e entrant, job spec) (figures, error) {
	w, err := s.startIdle(ctx, e, job)
	if err != nil {
		return nil, err
	}
	defer w.kill()
	listener, err := monitorRedis(ctx, s.redis.URL())
	if err != nil {
		return nil, err
	}
	before, err := w.ask("usage")
	if err != nil {
		listener.close()
		return nil, err
	}
	time.Sleep(s.idle)
	after, err := w.ask("usage")
	sent, inScripts := listener.close()
	if err != nil {
		return nil, err
	}
	seconds := s.idle.Seconds()
	return figures{
		{"CPU, ms/s", float64((after.CPU - before.CPU).Microseconds()) / 1000 / seconds},
		{"Redis commands sent/s", float64(sent) / seconds},
		{"with those in scripts", float64(sent+inScripts) / seconds},
		{"memory, MB", float64(after.RSS) / (1 << 20)},
	}, w.end()
}

func (s *stage) startIdle(ctx context.Context, e entrant, job spec) (*child, error) {
	w, err := start(ctx, e.path, job.to("work"))
	if err != nil {
		return nil, err
	}
	if _, err := w.ask("started"); err != nil {
		w.kill()
		return nil, err
	}
	time.Sleep(settle)
	return w, nil
}

func openRedis(url string) (*redis.Client, error) {
	opts, err := redis.ParseURL(url)
	if err != nil {
		return nil, err
	}
	return redis.NewClient(opts), nil
}

// pingTime is the median of what a PING takes.
func pingTime(ctx context.Context, url string) (time.Duration, error) {
	rdb, err := openRedis(url)
	if err != nil {
		return 0, err
	}
	defer rdb.Close()
	var took []time.Duration
	for range 101 {
		began := time.Now()
		if err := rdb.Ping(ctx).Err(); err != nil {
			return 0, err
		}
		took = append(took, time.Since(began))
	}
	return percentile(took, 50).Round(10 * time.Microsecond), nil
}

func (f figures) String() string {
	var texts []string
	for _, one := range f {
		texts = append(texts, one.name+" "+readable(one.value))
	}
	return strings.Join(texts, "; ")
}

func printTable(out io.Writer, entrants []entrant, results map[string][]figures) {
	fmt.Fprint(out, "| |")
	for i, f := range results[entrants[0].name][0] {
		fmt.Fprintf(out, " %s |", f.name)
		if i == 0 {
			fmt.Fprint(out, " carpool's is |")
		}
	}
	fmt.Fprintf(out, "\n| --- |%s\n", strings.Repeat(" --- |", len(results[entrants[0].name][0])+1))
	for _, e := range entrants {
		fmt.Fprintf(out, "| %s |", e.name)
		for i := range results[e.name][0] {
			fmt.Fprintf(out, " %s |", readable(median(column(results[e.name], i))))
			if i == 0 {
				fmt.Fprintf(out, " %s |", comparison(e, results))
			}
		}
		fmt.Fprintln(out)
	}
}

// comparison says how many times an entrant's first figure carpool's is: the median of the
// rounds' ratios, the smallest and the largest.
func comparison(e entrant, results map[string][]figures) string {
	if e.name == "carpool" {
		return ""
	}
	own, its := column(results["carpool"], 0), column(results[e.name], 0)
	ratios := make([]float64, len(own))
	for i := range own {
		ratios[i] = own[i] / its[i]
	}
	return fmt.Sprintf("%.2f times (%.2f to %.2f)", median(ratios), slices.Min(ratios), slices.Max(ratios))
}

func column(rounds []figures, i int) []float64 {
	var values []float64
	for _, f := range rounds {
		values = append(values, f[i].value)
	}
	return values
}

func median(values []float64) float64 {
	sorted := slices.Sorted(slices.Values(values))
	n := len(sorted)
	return (sorted[(n-1)/2] + sorted[n/2]) / 2
}

// percentile sorts the values.
func percentile(values []time.Duration, percent int) time.Duration {
	slices.Sort(values)
	return values[(len(values)*percent+99)/100-1]
}

func readable(v float64) string {
	switch {
	case v >= 100:
		return thousands(v)
	case v >= 10:
		return fmt.Sprintf("%.1f", v)
	}
	return fmt.Sprintf("%.2f", v)
}

// thousands writes a number as 1,234,567.
func thousands(v float64) string {
	digits := fmt.Sprintf("%.0f", v)
	for i := len(digits) - 3; i > 0; i -= 3 {
		digits = digits[:i] + "," + digits[i:]
	}
	return digits
}
