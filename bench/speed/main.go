// Speed measures carpool beside bare asynq and River, and on request Celery, on a Redis and a
// Postgres of its own: empty jobs, jobs that insert a row, how soon an idle worker picks a
// job up, and what it costs while it is idle. In each round every contestant has its turn,
// in a process of its own with an empty database, and what counts is the median of the
// rounds. It prints tables in Markdown; `-h` lists what is measured, and the flags.
package main

import (
	"cmp"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log"
	"os"
	"os/signal"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/carpool-go/carpool/internal/servers"
)

// options are the flags.
type options struct {
	rounds  int
	jobs    int
	pickups int
	idle    time.Duration
	delay   time.Duration
	queues  map[string]int
	million bool
	durable bool
	verbose bool
	only    *regexp.Regexp
	with    *regexp.Regexp
	builds  []build
}

// build is another build of this program, whose carpool competes too.
type build struct{ name, path string }

func main() {
	if len(os.Args) == 2 && os.Args[1] == asContestant {
		if err := beContestant(context.Background(), os.Stdin, os.Stdout); err != nil {
			log.Fatal(err)
		}
		return
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	o, err := parseFlags(os.Args[1:], os.Stderr)
	if errors.Is(err, flag.ErrHelp) {
		return
	}
	if err == nil {
		err = run(ctx, o, os.Stdout)
	}
	if err != nil {
		stop()
		log.Fatal(err)
	}
}

func parseFlags(args []string, out io.Writer) (options, error) {
	o := options{
		queues: map[string]int{"critical": 6, "default": 3, "low": 1},
		only:   regexp.MustCompile(""), with: regexp.MustCompile("^(carpool|asynq|river)"),
	}
	f := flag.NewFlagSet("speed", flag.ContinueOnError)
	f.SetOutput(out)
	f.IntVar(&o.rounds, "rounds", 5, "rounds, of which the median counts")
	f.IntVar(&o.jobs, "jobs", 20_000, "jobs in the queue where nothing else is said; with Redis far away a fifth of them")
	f.IntVar(&o.pickups, "pickups", 100, "jobs that an idle worker picks up")
	f.DurationVar(&o.idle, "idle", 10*time.Second, "how long an idle worker is looked at")
	f.DurationVar(&o.delay, "delay", 2500*time.Microsecond, "what a round trip to a Redis that is far away takes longer")
	f.BoolVar(&o.million, "million", false, "measure a backlog of a million too (some GB of memory, and a quarter of an hour a round)")
	f.BoolVar(&o.durable, "durable", false, "Postgres with fsync, Redis with appendonly and appendfsync everysec")
	f.BoolVar(&o.verbose, "v", false, "tell each result as it comes, on standard error")
	f.Func("only", "measure what this `regexp` finds in its name", regexpInto(&o.only))
	f.Func("with", "contestants whose names this `regexp` finds: asynq, asynq-plain, river, celery-threads, celery-prefork; carpool is always one (^(carpool|asynq|river))", regexpInto(&o.with))
	f.Func("queues", "the `QUEUE=WEIGHT,…` that carpool and asynq serve; jobs are on default (critical=6,default=3,low=1)", func(s string) (err error) {
		o.queues, err = parseQueues(s)
		return err
	})
	f.Func("carpool", "`[NAME=]PATH` of another build of this program, whose carpool competes as carpool-NAME (carpool-old); may be repeated", func(s string) error {
		name, path, named := strings.Cut(s, "=")
		if !named {
			name, path = "old", s
		}
		if _, err := os.Stat(path); err != nil {
			return err
		}
		o.builds = append(o.builds, build{"carpool-" + name, path})
		return nil
	})
	f.Usage = func() {
		fmt.Fprintln(out, "go run ./speed [flags] measures, side by side:")
		for _, s := range scenarios(o) {
			fmt.Fprintf(out, "  %s\n", s.name)
		}
		fmt.Fprint(out, `All of it takes about half an hour. Celery takes part only where -with finds it, with half
as many jobs and on these lines alone, which then take about twenty minutes longer:
  go run ./speed -only 'slots$' -with 'carpool|celery'
To compare two builds of carpool:
  go build -o /tmp/before ./speed                                     (in the one tree)
  go run ./speed -carpool /tmp/before -with carpool -only '^empty'    (in the other)
`)
		f.PrintDefaults()
	}
	if err := f.Parse(args); err != nil {
		return o, err
	}
	if f.NArg() > 0 {
		return o, fmt.Errorf("%q is no flag; -h lists them", f.Arg(0))
	}
	if o.rounds < 1 || o.jobs < 100 || o.pickups < 10 || o.idle < time.Second || o.delay < 0 {
		return o, errors.New("-rounds is at least 1, -jobs 100, -pickups 10, -idle 1s, -delay 0")
	}
	return o, nil
}

func regexpInto(to **regexp.Regexp) func(string) error {
	return func(s string) (err error) {
		*to, err = regexp.Compile(s)
		return err
	}
}

func parseQueues(s string) (map[string]int, error) {
	queues := make(map[string]int)
	for entry := range strings.SplitSeq(s, ",") {
		name, weight, _ := strings.Cut(entry, "=")
		n, err := strconv.Atoi(weight)
		if err != nil || name == "" {
			return nil, fmt.Errorf("%q is not QUEUE=WEIGHT", entry)
		}
		queues[name] = n
	}
	if queues[queueOfJobs] == 0 {
		return nil, fmt.Errorf("%s is missing, which the jobs are on", queueOfJobs)
	}
	return queues, nil
}

func run(ctx context.Context, o options, out io.Writer) error {
	appendFsync := ""
	if o.durable {
		appendFsync = "everysec"
	}
	redis, err := servers.StartRedis(ctx, servers.RedisConfig{AppendFsync: appendFsync})
	if err != nil {
		return err
	}
	defer redis.Stop()
	postgres, err := servers.StartPostgres(ctx, servers.PostgresConfig{
		Durable:  o.durable,
		Settings: map[string]string{"max_connections": "200"}, // each of Celery's processes has one
	})
	if err != nil {
		return err
	}
	defer postgres.Stop()
	self, err := os.Executable()
	if err != nil {
		return err
	}
	s := stage{options: o, redis: redis, postgres: postgres}
	entrants := []entrant{{"carpool", "carpool", self}}
	for _, b := range o.builds {
		entrants = append(entrants, entrant{b.name, "carpool", b.path})
	}
	for _, name := range []string{"asynq", "asynq-plain", "river", "celery-threads", "celery-prefork"} {
		entrants = append(entrants, entrant{name, name, self})
	}
	entrants = slices.DeleteFunc(entrants, func(e entrant) bool { return e.name != "carpool" && !o.with.MatchString(e.name) })
	if slices.ContainsFunc(entrants, entrant.celery) {
		if err := servers.FindCelery(); err != nil {
			fmt.Fprintln(os.Stderr, "without Celery:", err)
			entrants = slices.DeleteFunc(entrants, entrant.celery)
		}
	}
	some := false
	for _, sc := range scenarios(o) {
		if !o.only.MatchString(sc.name) {
			continue
		}
		some = true
		var taking []entrant
		for _, e := range entrants {
			if sc.takes(e) {
				taking = append(taking, e)
			}
		}
		if err := s.measure(ctx, sc, taking, out); err != nil {
			return fmt.Errorf("%s: %w", sc.name, err)
		}
	}
	if !some {
		return errors.New("-only finds nothing; -h lists the names")
	}
	return nil
}

// farDatabase is what a round trip to a Postgres that is far away takes longer.
const farDatabase = time.Millisecond

// scenarios is everything that is measured.
func scenarios(o options) []scenario {
	var all []scenario
	add := func(s scenario) {
		s.jobs = cmp.Or(s.jobs, o.jobs)
		s.about = cmp.Or(s.about, thousands(float64(s.jobs))+" jobs")
		all = append(all, s)
	}
	for _, slots := range []int{20, 100} {
		add(scenario{name: fmt.Sprintf("empty jobs, %d slots", slots), job: emptyJob, slots: slots, celery: true, measure: (*stage).drain})
	}
	for _, slots := range []int{20, 100} {
		add(scenario{name: fmt.Sprintf("an insert each, at least once, %d slots", slots), job: insertJob, slots: slots, celery: true, measure: (*stage).drain})
	}
	for _, slots := range []int{20, 100} {
		add(scenario{name: fmt.Sprintf("an insert each, exactly once, %d slots", slots), job: onceJob, slots: slots, celery: true, measure: (*stage).drain})
	}
	for _, slots := range []int{20, 100} {
		add(scenario{
			name: fmt.Sprintf("empty jobs, %d slots, Redis %s away", slots, o.delay),
			job:  emptyJob, slots: slots, jobs: max(100, o.jobs/5), far: true, measure: (*stage).drain,
		})
	}
	for _, slots := range []int{20, 100} {
		add(scenario{
			name: fmt.Sprintf("an insert each, exactly once, %d slots, Redis %s and Postgres %s away", slots, o.delay, farDatabase),
			job:  onceJob, slots: slots, jobs: max(100, o.jobs/5), far: true, farDatabase: farDatabase, measure: (*stage).drain,
		})
	}
	backlogs := []int{1000, 100_000}
	if o.million {
		backlogs = append(backlogs, 1_000_000)
	}
	for _, n := range backlogs {
		add(scenario{name: fmt.Sprintf("empty jobs, 20 slots, a backlog of %s", thousands(float64(n))), job: emptyJob, slots: 20, jobs: n, measure: (*stage).drain})
	}
	add(scenario{name: "pick-up by an idle worker", about: fmt.Sprintf("%d jobs, %s apart", o.pickups, pickupPause), job: emptyJob, slots: 20, jobs: o.pickups, measure: (*stage).pickup})
	add(scenario{name: "idle", about: o.idle.String(), job: emptyJob, slots: 20, jobs: 1, measure: (*stage).atRest})
	return all
}
