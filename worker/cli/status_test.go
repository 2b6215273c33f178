package cli

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"os"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/hibiken/asynq"
	"github.com/redis/go-redis/v9"

	"github.com/carpool-go/carpool/admin"
	"github.com/carpool-go/carpool/dbpool"
	"github.com/carpool-go/carpool/internal/instance"
	"github.com/carpool-go/carpool/internal/testservers"
	"github.com/carpool-go/carpool/tasks"
	"github.com/carpool-go/carpool/tasks/rowsprune"
	"github.com/carpool-go/carpool/worker/internal/fleet"
	"github.com/carpool-go/carpool/worker/internal/workertest"
)

// secret is in all payloads of these tests, and must never be shown.
const secret = "s3cr3t"

// busy is a bundle with two instances, and one that has died, and with jobs of
// every sort.
type busy struct {
	*bundle
	rdb   redis.UniversalClient
	admin *admin.Admin
}

func newBusy(t *testing.T) *busy {
	t.Helper()
	b := &busy{bundle: setup(t)}
	b.rdb = b.Redis(t)
	b.admin = admin.New(b.rdb, openTestOne(t, b.DatabaseURL))
	started := time.Unix(1_800_000_000, 0).UTC()
	startInstance(t, b.rdb, "a-00000001", started, false)
	startInstance(t, b.rdb, "b-00000002", started.Add(time.Hour), true)
	b.do(t, b.rdb.ZAdd(t.Context(), instance.Names, redis.Z{Score: float64(time.Now().Unix()) - 40, Member: "dead-00000003"}).Err())

	later := time.Now().Add(time.Hour)
	for range 3 {
		b.enqueue(t, "critical", time.Time{})
	}
	b.enqueue(t, "default", later)
	for range 2 {
		b.enqueue(t, "default", time.Time{})
	}
	_, err := b.Inspector.ArchiveAllPendingTasks("default")
	b.do(t, err)
	b.do(t, b.Inspector.PauseQueue("default"))
	b.Exec(t, `INSERT INTO carpool.outbox (id, kind, payload, created_at, problem) SELECT gen_random_uuid(), 'rows:prune', '{"x": "`+secret+`"}',
		now() - i * interval '1 minute', CASE WHEN i > 2 THEN 'problem ' || i % 7 END FROM generate_series(1, 30) i`)
	return b
}

// startInstance shows an instance, with figures that can be told from each other, until
// the test ends.
func startInstance(t *testing.T, rdb redis.UniversalClient, name string, started time.Time, databaseAway bool) {
	t.Helper()
	f := fleet.New(fleet.Config{
		Redis: rdb,
		Self: admin.Instance{
			Name: name, Version: "1.2.3", Host: "host", PID: os.Getpid(), Started: started,
			Queues: map[string]int{"critical": 6, "default": 3}, OwnQueue: instance.Queue(name),
			Concurrency: 10,
		},
		Running: func() int { return 7 },
		Pool: func() dbpool.Stats {
			return dbpool.Stats{PoolSize: 5, CheckedIn: 1, CheckedOut: 6, Overflow: 2, Invalid: 3, Waiting: 4}
		},
		DatabaseAway: func() bool { return databaseAway },
		Blocked: func() string {
			if databaseAway {
				return "permission denied"
			}
			return ""
		},
		Log: workertest.Discard(),
	})
	t.Cleanup(f.Stop)
	if err := f.Start(); err != nil {
		t.Fatal(err)
	}
}

func (b *busy) do(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func (b *busy) enqueue(t *testing.T, queue string, at time.Time) {
	t.Helper()
	_, err := b.Client.Enqueue(t.Context(), rowsprune.Prune{Table: secret, Column: secret, OlderThan: "1d"},
		&tasks.EnqueueOptions{Queue: queue, RunAt: at})
	b.do(t, err)
}

func openTestOne(t *testing.T, url string) *dbpool.Pool {
	t.Helper()
	db, err := databaseSettings{url}.open(workertest.Discard())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(db.Close)
	return db
}

// shown prints the status as the command does.
func (s *statusCmd) shown(t *testing.T, a *admin.Admin) (text string, err error) {
	t.Helper()
	var out bytes.Buffer
	err = s.show(t.Context(), &invocation{stdout: &out}, a, asItIs)
	return out.String(), err
}

// lines are the text's, each with single spaces between its columns.
func lines(text string) []string {
	all := strings.Split(strings.TrimSuffix(text, "\n"), "\n")
	for i := range all {
		all[i] = strings.Join(strings.Fields(all[i]), " ")
	}
	return all
}

func TestStatus_ShowsTheFleetTheQueuesAndTheOutbox(t *testing.T) {
	t.Parallel()
	b := newBusy(t)
	now, err := b.admin.Status(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	// What goes on with the time.
	if len(now.Missing) != 1 || now.At.Sub(now.Missing[0].Seen) < 40*time.Second {
		t.Fatalf("missing are %+v", now.Missing)
	}
	now.Missing[0].Seen = now.At.Add(-40 * time.Second)
	if len(now.Queues) != 2 || now.Queues[0].LatencyMS <= 0 || now.Queues[1].LatencyMS != 0 {
		t.Fatalf("the queues are %+v", now.Queues)
	}
	now.Queues[0].LatencyMS = 123
	if now.Outbox == nil || now.Outbox.OldestMS < 120_000 || now.Outbox.OldestMS > 180_000 {
		t.Fatalf("the outbox: %+v", now.Outbox)
	}
	now.Outbox.OldestMS = 120_400

	var text bytes.Buffer
	printStatus(&text, now, unpainted)
	want := []string{
		"INSTANCE VERSION UP SINCE SLOTS POOL IN OUT OVERFLOW WAITING DATABASE QUEUES",
		"a-00000001 1.2.3 2027-01-15 08:00:00Z 7/10 1 6 2 4 there critical=6,default=3",
		"b-00000002 1.2.3 2027-01-15 09:00:00Z 7/10 1 6 2 4 AWAY critical=6,default=3",
		"! b-00000002: transactional jobs can't begin: permission denied",
		"! dead-00000003 gives no sign of life since " + now.At.Add(-40*time.Second).Format(time.DateTime) + "Z, 40s ago",
		"",
		"QUEUE PENDING ACTIVE SCHEDULED RETRY ARCHIVED LATENCY",
		"critical 3 0 0 0 0 123ms",
		"default 0 0 1 0 2 0s PAUSED",
		"",
		"outbox: 2 waiting, the oldest for 2m0s; 28 set aside",
		"! 4: problem 0", "! 4: problem 1", "! 4: problem 2", "! 4: problem 3", "! 4: problem 4",
	}
	if diff := cmp.Diff(want, lines(text.String())); diff != "" {
		t.Errorf("status (-want +got):\n%s", diff)
	}
}

func TestStatus_JSONHasAllOfItAndNoPayload(t *testing.T) {
	t.Parallel()
	b := newBusy(t)
	text, err := (&statusCmd{JSON: true}).shown(t, b.admin)
	if err != nil {
		t.Fatal(err)
	}
	if strings.Contains(text, secret) {
		t.Errorf("it shows a payload:\n%s", text)
	}
	var got struct {
		Instances []map[string]any
		Missing   []map[string]any
		Queues    []map[string]any
		Outbox    map[string]any
	}
	if err := json.Unmarshal([]byte(text), &got); err != nil {
		t.Fatal(err)
	}
	if strings.Count(text, "\n") != 1 {
		t.Errorf("it is not one line:\n%s", text)
	}
	if len(got.Instances) != 2 || len(got.Missing) != 1 || len(got.Queues) != 2 {
		t.Fatalf("status:\n%s", text)
	}
	b1 := got.Instances[1]
	for name, want := range map[string]any{
		"name": "b-00000002", "version": "1.2.3", "hands": 10.0, "running": 7.0, "database_away": true,
		"own_queue": "instance-b-00000002", "queues": map[string]any{"critical": 6.0, "default": 3.0},
		"pool": map[string]any{"pool_size": 5.0, "checked_in": 1.0, "checked_out": 6.0, "overflow": 2.0, "invalid": 3.0, "waiting": 4.0},
	} {
		if diff := cmp.Diff(want, b1[name]); diff != "" {
			t.Errorf("%s (-want +got):\n%s", name, diff)
		}
	}
	for name, want := range map[string]any{"name": "default", "scheduled": 1.0, "archived": 2.0, "paused": true, "archive_nearly_full": false} {
		if got.Queues[1][name] != want {
			t.Errorf("the queue's %s is %v, want %v", name, got.Queues[1][name], want)
		}
	}
	for name, want := range map[string]any{"waiting": 2.0, "set_aside": 28.0} {
		if got.Outbox[name] != want {
			t.Errorf("the outbox's %s is %v, want %v", name, got.Outbox[name], want)
		}
	}
}

func TestStatus_OfNothing(t *testing.T) {
	t.Parallel()
	a := admin.New(workertest.OpenRedis(t, testservers.Redis(t)), nil)
	text, err := new(statusCmd).shown(t, a)
	if err != nil {
		t.Fatal(err)
	}
	want := []string{
		"no instance is up", "", "no queue has had a job yet", "",
		"outbox: not read, as DATABASE_URL is not set",
	}
	if diff := cmp.Diff(want, lines(text)); diff != "" {
		t.Errorf("status (-want +got):\n%s", diff)
	}
	if text, err = (&statusCmd{JSON: true}).shown(t, a); err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(text, `,"instances"`)
	if want := `:[],"missing":[],"queues":[],"outbox":null,"outbox_note":"not read, as DATABASE_URL is not set"}` + "\n"; rest != want {
		t.Errorf("JSON: %s", text)
	}
}

// withDatabase is the command where DATABASE_URL is set.
var withDatabase = &statusCmd{databaseSettings: databaseSettings{exampleDatabaseURL}}

func TestStatus_ADatabaseWithoutTheOutboxIsSaid(t *testing.T) {
	t.Parallel()
	a := admin.New(workertest.OpenRedis(t, testservers.Redis(t)), openTestOne(t, testservers.Postgres(t)))
	text, err := withDatabase.shown(t, a)
	if err != nil {
		t.Fatal(err)
	}
	if !strings.HasSuffix(text, "\noutbox: this database has no table carpool.outbox; run the command migrate\n") {
		t.Errorf("status:\n%s", text)
	}
}

func TestStatus_WithoutTheDatabaseItShowsTheRestAndFails(t *testing.T) {
	t.Parallel()
	b := newBusy(t)
	b.admin = admin.New(b.rdb, openTestOne(t, "postgres://user:"+secret+"@127.0.0.1:1/app"))
	text, err := withDatabase.shown(t, b.admin)
	if err == nil || !strings.HasPrefix(err.Error(), "DATABASE_URL: look at the outbox: ") || strings.Contains(err.Error(), secret) {
		t.Errorf("error %v", err)
	}
	if !strings.Contains(text, "\na-00000001 ") || !strings.HasSuffix(text, "\noutbox: it could not be read\n") {
		t.Errorf("status:\n%s", text)
	}
}

func TestStatus_WithoutRedisThereIsOnlyTheError(t *testing.T) {
	t.Parallel()
	a := admin.New(workertest.OpenRedis(t, "redis://:"+secret+"@127.0.0.1:1"), nil)
	text, err := new(statusCmd).shown(t, a)
	if err == nil || !strings.HasPrefix(err.Error(), "REDIS_URL: ") || strings.Contains(err.Error(), secret) || text != "" {
		t.Errorf("error %v, and:\n%s", err, text)
	}
}

func TestStatus_WarnsOfAnArchiveThatIsNearlyFull(t *testing.T) {
	t.Parallel()
	b := &busy{bundle: setup(t)}
	b.rdb = b.Redis(t)
	client := asynq.NewClientFromRedisClient(b.rdb)
	archive := func(n int) string {
		t.Helper()
		for i := range n {
			_, err := client.EnqueueContext(t.Context(), asynq.NewTask("x", []byte(strconv.Itoa(i))))
			b.do(t, err)
		}
		_, err := b.Inspector.ArchiveAllPendingTasks("default")
		b.do(t, err)
		text, err := new(statusCmd).shown(t, admin.New(b.rdb, nil))
		b.do(t, err)
		return text
	}
	if text := archive(admin.ArchiveWarning - 1); strings.Contains(text, "! the archive") {
		t.Errorf("with one job less:\n%s", text)
	}
	if text := archive(1); !strings.Contains(text, "\n! the archive of default holds 9000 jobs; beyond 9999, the oldest are dropped\n") {
		t.Errorf("status:\n%s", text)
	}
}

func TestStatus_WarnsOfAQueueThatNobodyPullsFromWhateverItsJobsAre(t *testing.T) {
	t.Parallel()
	served := []admin.Instance{{Name: "a-00000001", Queues: map[string]int{"default": 1}}}
	for name, c := range map[string]struct {
		queue admin.Queue
		other []string // queues of other servers
		warns bool
	}{
		"pending":                    {admin.Queue{Name: "typo", Pending: 1}, nil, true},
		"active":                     {admin.Queue{Name: "typo", Active: 1}, nil, true},
		"scheduled":                  {admin.Queue{Name: "typo", Scheduled: 1}, nil, true},
		"retry":                      {admin.Queue{Name: "typo", Retry: 1}, nil, true},
		"what has ended":             {admin.Queue{Name: "typo", Archived: 1, Completed: 1}, nil, false},
		"an instance pulls from it":  {admin.Queue{Name: "default", Scheduled: 1}, nil, false},
		"a server of asynq's does":   {admin.Queue{Name: "typo", Scheduled: 1}, []string{"typo"}, false},
		"a server of asynq's, other": {admin.Queue{Name: "typo", Scheduled: 1}, []string{"mail"}, true},
	} {
		var text bytes.Buffer
		printStatus(&text, &admin.Status{Instances: served, Queues: []admin.Queue{c.queue}, ServedQueues: c.other}, unpainted)
		if got := strings.Contains(text.String(), "\n! nobody pulls from typo: no instance has it among its WORKER_QUEUES\n"); got != c.warns {
			t.Errorf("%s: it warns: %t\n%s", name, got, &text)
		}
	}
}

func TestStatus_SaysThatNobodyFetchesTheJobsOfGroups(t *testing.T) {
	t.Parallel()
	b := &busy{bundle: setup(t)}
	b.rdb = b.Redis(t)
	for range 2 {
		_, err := asynq.NewClientFromRedisClient(b.rdb).EnqueueContext(t.Context(), asynq.NewTask("x", nil), asynq.Group("mails"), asynq.Queue("low"))
		b.do(t, err)
	}
	text, err := new(statusCmd).shown(t, admin.New(b.rdb, nil))
	b.do(t, err)
	if !strings.Contains(text, "\n! low: 2 in groups of asynq's (the option Group), which no worker of carpool's fetches; ") {
		t.Errorf("status:\n%s", text)
	}
	text, err = (&statusCmd{JSON: true}).shown(t, admin.New(b.rdb, nil))
	b.do(t, err)
	if !strings.Contains(text, `"aggregating":2`) {
		t.Errorf("as JSON:\n%s", text)
	}
}

func TestStatus_NamesTheKindsOfTheOutboxThatNoWorkerKnows(t *testing.T) {
	t.Parallel()
	b := setup(t)
	b.Start(t)
	b.Exec(t, `INSERT INTO carpool.outbox (id, kind, payload) SELECT gen_random_uuid(), 'shop:order', '{}' FROM generate_series(1, 3)`)
	stdout, stderr, code := b.run(t, nil, "status")
	if code != 0 || stderr != "" || !strings.Contains(stdout, "; 0 set aside\n! 3 waiting: no instance that is up knows the kind shop:order\n") {
		t.Errorf("exit code %d\n%s%s", code, stdout, stderr)
	}
	stdout, _, _ = b.run(t, nil, "status", "--json")
	if !strings.Contains(stdout, `"unknown_kinds":[{"kind":"shop:order","rows":3}]`) {
		t.Errorf("JSON: %s", stdout)
	}
}

// escape matches what sets a colour.
var escape = regexp.MustCompile("\x1b\\[[0-9]+m")

func TestStatus_ColoursChangeNothingElse(t *testing.T) {
	t.Parallel()
	b := newBusy(t)
	now, err := b.admin.Status(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	now.Queues = append(now.Queues, admin.Queue{Name: "typo", Pending: 1, ArchiveNearlyFull: true})
	now.Outbox.UnknownKinds = []admin.OutboxKind{{Kind: "shop:order", Rows: 3}}
	var without, with bytes.Buffer
	printStatus(&without, now, unpainted)
	printStatus(&with, now, painted)
	if diff := cmp.Diff(without.String(), escape.ReplaceAllString(with.String(), "")); diff != "" {
		t.Errorf("without the colours (-want +got):\n%s", diff)
	}
	for c, texts := range map[colour][]string{
		red:    {"AWAY", "! dead-00000003 gives", "! nobody pulls from typo", "! 3 waiting: no instance"},
		yellow: {"PAUSED", "! the archive of typo", "! 4: problem 0"},
	} {
		for _, text := range texts {
			if !strings.Contains(with.String(), string(c)+text) {
				t.Errorf("%s is not in its colour:\n%q", text, &with)
			}
		}
	}
	if strings.Contains(without.String(), "\x1b") {
		t.Error("there are colours without a painter")
	}
}

func TestStatus_HelpExplainsItsWords(t *testing.T) {
	t.Parallel()
	stdout, _, _ := (Program{Name: "worker"}).run(t, "status", "--help")
	for _, word := range []string{
		"SLOTS", "POOL IN", "OUT", "OVERFLOW", "WAITING", "DATABASE", "PENDING", "ACTIVE", "SCHEDULED", "RETRY", "ARCHIVED", "LATENCY", "PAUSED", "waiting", "set aside",
	} {
		if !regexp.MustCompile(`(?m)^ +` + word + ` +[a-zA-Z]`).MatchString(stdout) {
			t.Errorf("%s is not explained:\n%s", word, stdout)
		}
	}
}

func TestStatus_NamesCanNotMoveTheCursor(t *testing.T) {
	t.Parallel()
	for in, want := range map[string]string{
		"a-1":                        "a-1",
		"\x1b[2Ja\tb\r\nc\u009b":     " [2Ja b  c ",
		"größer":                     "größer",
		strings.Repeat("ö", 120):     strings.Repeat("ö", 120),
		strings.Repeat("ö", 121):     strings.Repeat("ö", 119) + "…",
		"bytes \xff of no character": "bytes \uFFFD of no character",
	} {
		if got := printable(in); got != want {
			t.Errorf("%q is printed as %q, want %q", in, got, want)
		}
	}
}

func TestStatusWatch_GoesOnThroughAnOutageUntilItIsEnded(t *testing.T) {
	t.Parallel()
	url := testservers.Redis(t)
	startInstance(t, workertest.OpenRedis(t, url), "a-00000001", time.Now(), false)
	proxied, proxy := testservers.ThroughProxy(t, url)
	options, err := redis.ParseURL(proxied)
	if err != nil {
		t.Fatal(err)
	}
	options.MaxRetries = -1
	rdb := redis.NewClient(options)
	defer rdb.Close()

	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	out, errs := workertest.NewLog(), workertest.NewLog()
	var ended sync.WaitGroup
	ended.Go(func() {
		in := &invocation{Program: Program{Name: "worker"}, stdout: out, stderr: errs}
		if err := (&statusCmd{Watch: true}).watch(ctx, in, admin.New(rdb, nil), asItIs); err != nil {
			t.Errorf("watch: %v", err)
		}
	})
	shows := func() int { return strings.Count(out.String(), "a-00000001 ") }
	workertest.Eventually(t, "it is shown twice", func() bool { return shows() >= 2 })
	proxy.Refuse()
	proxy.Reset()
	errs.Wait(t, "worker: ")
	before := shows()
	proxy.Heal()
	workertest.Eventually(t, "it is shown again", func() bool { return shows() > before })
	cancel()
	ended.Wait()
	if strings.Contains(out.String(), "\x1b") {
		t.Error("it clears a screen that is none")
	}
}

// asItIs explains nothing.
func asItIs(err error) error { return err }

func TestStatusWatch_EndsWhenNobodyReads(t *testing.T) {
	t.Parallel()
	a := admin.New(workertest.OpenRedis(t, testservers.Redis(t)), nil)
	read, write, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	_ = read.Close()
	defer write.Close()
	if err := (&statusCmd{Watch: true, JSON: true}).watch(t.Context(), &invocation{stdout: write, stderr: io.Discard}, a, asItIs); !errors.Is(err, syscall.EPIPE) {
		t.Errorf("error %v", err)
	}
}

func TestStatus_WrongSettingsAreNamedAtOnce(t *testing.T) {
	t.Parallel()
	for want, s := range map[string]statusCmd{
		"REDIS_URL is not set; for example REDIS_URL=redis://localhost:6379/0": {},
		"2 settings are wrong:\n  REDIS_URL is given as a flag with a password in it": {
			redisSettings:    redisSettings{"redis://:" + secret + "@localhost"},
			databaseSettings: databaseSettings{"postgres://user:" + secret + "@localhost/app"},
		},
	} {
		err := s.Run(t.Context(), &invocation{Program: Program{Env: variables(nil)}})
		if _, wrong := errors.AsType[configError](err); !wrong || !strings.HasPrefix(err.Error(), want) || strings.Contains(err.Error(), secret) {
			t.Errorf("error %v, want %s", err, want)
		}
	}
}

func TestStatus_ItsExitCodesAreThoseOfTheOtherCommands(t *testing.T) {
	t.Parallel()
	b := setup(t)
	for _, tc := range []struct {
		env  []string
		code int
		says string
	}{
		{[]string{"REDIS_URL="}, exitUsage, "worker: REDIS_URL is not set; for example "},
		{[]string{"DATABASE_URL=mysql://x"}, exitUsage, "worker: DATABASE_URL is wrong: "},
		{[]string{"REDIS_URL=redis://127.0.0.1:1"}, exitFailed, "worker: REDIS_URL: Redis at 127.0.0.1:1 cannot be reached: "},
		{[]string{"DATABASE_URL=postgres://127.0.0.1:1/app"}, exitFailed, "worker: DATABASE_URL: look at the outbox: "},
		{[]string{"DATABASE_URL="}, 0, ""},
	} {
		_, stderr, code := b.run(t, tc.env, "status")
		if code != tc.code || !strings.HasPrefix(stderr, tc.says) || tc.says == "" && stderr != "" {
			t.Errorf("%s: exit code %d, want %d\n%s", tc.env, code, tc.code, stderr)
		}
	}
}
