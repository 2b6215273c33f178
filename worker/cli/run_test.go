package cli

import (
	"context"
	"encoding/json"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/hibiken/asynq"
	"github.com/jackc/pgx/v5"

	"github.com/carpool-go/carpool/internal/asynqwire"
	"github.com/carpool-go/carpool/internal/testservers"
	"github.com/carpool-go/carpool/tasks"
	"github.com/carpool-go/carpool/tasks/builtin"
	"github.com/carpool-go/carpool/tasks/maintenance"
	"github.com/carpool-go/carpool/tasks/webhook"
	"github.com/carpool-go/carpool/worker"
	"github.com/carpool-go/carpool/worker/internal/workertest"
)

// webhooks is what the tests of the binary use for jobs that take as long as a
// test wants.
type webhooks struct {
	*httptest.Server
	arrived chan string // the ids of jobs, as their webhooks arrive
	gate    chan struct{}
	served  sync.Map // id → *atomic.Int64, answered with 200
}

const webhookSecret = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"

// receive starts a receiver of webhooks that answers none until open is called.
func receive(t *testing.T) *webhooks {
	t.Helper()
	w := &webhooks{arrived: make(chan string, 1000), gate: make(chan struct{})}
	w.Server = httptest.NewServer(http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		id := r.Header.Get("webhook-id")
		_, _ = io.Copy(io.Discard, r.Body) // or the server doesn't notice when the sender goes
		w.arrived <- id
		select {
		case <-w.gate:
			n, _ := w.served.LoadOrStore(id, new(atomic.Int64))
			n.(*atomic.Int64).Add(1)
			rw.WriteHeader(http.StatusNoContent)
		case <-r.Context().Done():
		}
	}))
	t.Cleanup(func() { w.open(); w.Close() })
	return w
}

func (w *webhooks) open() {
	select {
	case <-w.gate:
	default:
		close(w.gate)
	}
}

func (w *webhooks) env() []string {
	return []string{"OUTBOUND_ALLOW=127.0.0.1", "WEBHOOK_SECRET=" + webhookSecret}
}

func (w *webhooks) enqueue(t *testing.T, b *bundle, n int) []*tasks.Info {
	t.Helper()
	var jobs []*tasks.Info
	for range n {
		info, err := b.Client.Enqueue(t.Context(), webhook.Deliver{
			URL: w.URL, Event: "test.happened", Body: json.RawMessage(`{"n":1}`),
		}, nil)
		if err != nil {
			t.Fatal(err)
		}
		jobs = append(jobs, info)
	}
	return jobs
}

// delivered returns how often the job's webhook was answered with 200.
func (w *webhooks) delivered(id string) int64 {
	n, ok := w.served.Load(id)
	if !ok {
		return 0
	}
	return n.(*atomic.Int64).Load()
}

func TestRun_EveryWrongSettingIsNamedInOneMessageBeforeAnythingIsTouched(t *testing.T) {
	t.Parallel()
	b := &bundle{new(workertest.Bundle)}
	_, stderr, code := b.run(t, []string{
		"REDIS_URL=redis//localhost", "DATABASE_URL=", "DB_POOL_SIZE=many", "DB_MAX_OVERFLOW=-1", "DB_POOL_TIMEOUT=30",
		"DB_POOL_RECYCLE=-1s", "DB_POOL_PRE_PING=maybe", "DB_POOL_VALIDATE_EVERY=1ms", "DB_POOL_LEAK_AFTER=x",
		"DB_POOLER=perhaps", "DB_ECHO=2", "WORKER_CONCURRENCY=0", "WORKER_QUEUES=a=0,b c", "WORKER_SHUTDOWN_TIMEOUT=soon",
		"WORKER_STARTUP_TIMEOUT=1", "LOG_LEVEL=loud", "LOG_FORMAT=xml", "IMPORT_DIR=/no/such/folder", "PRUNE_ALLOW=carpool.jobs_done",
		"WEBHOOK_SECRET=whsec_hush!", "OUTBOUND_ALLOW=10.0.0.0/99", "MAX_PAYLOAD=1048576", "HEALTH_ADDR=8081",
	})
	if code != exitUsage {
		t.Errorf("exit code %d, want %d", code, exitUsage)
	}
	for _, name := range []string{
		"REDIS_URL", "DATABASE_URL", "DB_POOL_SIZE", "DB_MAX_OVERFLOW", "DB_POOL_TIMEOUT", "DB_POOL_RECYCLE",
		"DB_POOL_PRE_PING", "DB_POOL_VALIDATE_EVERY", "DB_POOL_LEAK_AFTER", "DB_POOLER", "DB_ECHO", "WORKER_CONCURRENCY", "WORKER_QUEUES",
		"WORKER_SHUTDOWN_TIMEOUT", "WORKER_STARTUP_TIMEOUT", "LOG_LEVEL", "LOG_FORMAT", "IMPORT_DIR", "PRUNE_ALLOW",
		"WEBHOOK_SECRET", "OUTBOUND_ALLOW", "MAX_PAYLOAD", "HEALTH_ADDR",
	} {
		if !strings.Contains(stderr, "\n  "+name+" ") || !strings.Contains(stderr, "for example "+name+"=") {
			t.Errorf("%s is not named with an example", name)
		}
	}
	if strings.Contains(stderr, "hush") {
		t.Error("the message shows a secret")
	}
	if t.Failed() {
		t.Log(stderr)
	}
}

func TestRun_SecretsAreRefusedAsFlagsAndNeverShown(t *testing.T) {
	t.Parallel()
	b := &bundle{&workertest.Bundle{Env: []string{"DATABASE_URL=postgres://u:hush@localhost/app?sslpassword=hush", "REDIS_URL=redis://:hush@localhost", "WEBHOOK_SECRET=" + webhookSecret}}}
	stdout, stderr, code := b.run(t, nil, "config")
	if code != 0 || strings.Contains(stdout+stderr, "hush") || strings.Contains(stdout, webhookSecret) {
		t.Errorf("worker config: exit code %d\n%s%s", code, stdout, stderr)
	}
	for _, line := range []string{"DATABASE_URL", "postgres://u:***@localhost/app?sslpassword=***", "redis://:***@localhost", "WEBHOOK_SECRET", "DB_POOL_SIZE"} {
		if !strings.Contains(stdout, line) {
			t.Errorf("worker config does not show %s:\n%s", line, stdout)
		}
	}
	_, stderr, code = b.run(t, nil, "--database-url=postgres://u:hash@h/d", "--redis-url=redis://:hash@h", "--webhook-secret=hash")
	if code != exitUsage || strings.Count(stderr, "set the variable instead") != 3 || strings.Contains(stderr, "hash") {
		t.Errorf("passwords as flags: exit code %d\n%s", code, stderr)
	}
}

func TestConfig_ShowsNoPasswordOfAnOddURL(t *testing.T) {
	t.Parallel()
	for given, shown := range map[string]string{
		"host=localhost password=hush dbname=app":          "***",
		"redis:user:hush@localhost":                        "***",
		"postgres:app:hush@localhost/app":                  "***",
		"hush":                                             "***",
		"postgres://u:hu/sh@localhost/app":                 "***",
		"postgres://u:12/34hush@localhost/app":             "***",
		"postgres://u:1?hush@localhost/app":                "***",
		"postgres://u:1#hush@localhost/app":                "***",
		"postgres://u:hush":                                "***",
		"postgres://localhost/app#hush":                    "***",
		"redis://a:1,b:2?x=y@hush":                         "***",
		"redis:///u:hush@localhost":                        "***",
		"postgres://u:h@hush@localhost/app":                "postgres://u:***@localhost/app",
		"postgres://u:%zzhush@localhost/app":               "postgres://u:***@localhost/app",
		"redis-sentinel://u:hush@a:1,[::1]:2/0?master=m":   "redis-sentinel://u:***@a:1,[::1]:2/0?master=m",
		"postgres://localhost/app?pasword=hush":            "postgres://localhost/app?pasword=***",
		"postgres://localhost/app?hush":                    "postgres://localhost/app?***",
		"postgres://localhost/app?p%zz=hush":               "postgres://localhost/app?p%zz=***",
		"postgres://localhost/app?sslmode=a;password=hush": "postgres://localhost/app?sslmode=***",
		"postgres://localhost/app?sslmode=require&sslkey=/hush&application_name=shop": "postgres://localhost/app?sslmode=require&sslkey=***&application_name=shop",
		"postgres://app@/app?host=/run/postgresql&pool_max_conns=3":                   "postgres://app@/app?host=/run/postgresql&pool_max_conns=3",
		"redis://localhost:6379/0": "redis://localhost:6379/0",
	} {
		for _, variable := range []string{"REDIS_URL", "DATABASE_URL"} {
			for _, args := range [][]string{{"config"}, {"config", "--json"}} {
				stdout, stderr, _ := (&bundle{new(workertest.Bundle)}).run(t, []string{variable + "=" + given}, args...)
				escaped, _ := json.Marshal(shown)
				if strings.Contains(stdout+stderr, "hush") || !strings.Contains(stdout, variable) ||
					!strings.Contains(stdout, " "+shown+"\n") && !strings.Contains(stdout, `"value":`+string(escaped)) {
					t.Errorf("%s=%s: %q shows\n%s%s", variable, given, args, stdout, stderr)
				}
			}
		}
	}
}

func TestRun_AnOddURLWithAPasswordIsRefusedAsAFlag(t *testing.T) {
	t.Parallel()
	for _, flag := range []string{
		"--database-url=host=localhost password=hush dbname=app", "--database-url=postgres:app:hush@localhost/app",
		"--database-url=postgres://localhost/app?pasword=hush", "--redis-url=redis:user:hush@localhost",
	} {
		_, stderr, code := (&bundle{new(workertest.Bundle)}).run(t, nil, flag)
		if code != exitUsage || !strings.Contains(stderr, "set the variable instead") || strings.Contains(stderr, "hush") {
			t.Errorf("%s: exit code %d\n%s", flag, code, stderr)
		}
	}
	_, stderr, _ := (&bundle{new(workertest.Bundle)}).run(t, nil, "--redis-url=localhost:6379", "--database-url=postgres:///app?host=/run&sslmode=disable&connect_timeout=3")
	if strings.Contains(stderr, "set the variable instead") || !strings.Contains(stderr, "REDIS_URL is wrong: it has no scheme") {
		t.Errorf("of URLs without a password it says\n%s", stderr)
	}
}

func TestRun_WaitsForServersThatAreDownAndSaysSo(t *testing.T) {
	t.Parallel()
	b := setup(t)
	redisURL, proxy := testservers.ThroughProxy(t, b.RedisURL)
	proxy.Refuse()
	p := b.Launch(t, []string{"REDIS_URL=" + redisURL})
	p.Log.Wait(t, "waiting for the server of REDIS_URL")
	proxy.Heal()
	p.Log.Wait(t, "worker started")
	p.Signal(t, syscall.SIGTERM)
	if code := p.Exit(t); code != 0 {
		t.Errorf("exit code %d", code)
	}
}

func TestRun_GivesUpWhenTheStartupTimeoutIsOver(t *testing.T) {
	t.Parallel()
	b := setup(t)
	proxy := testservers.NewProxy(t, testservers.ParseURL(t, b.DatabaseURL).Host)
	proxy.Refuse()
	env := []string{"DATABASE_URL=postgres://u:hush@" + proxy.Addr() + "/db", "WORKER_STARTUP_TIMEOUT=1s"}
	_, stderr, code := b.run(t, env)
	if code != exitFailed || !strings.Contains(stderr, "DATABASE_URL: not ready after 1s") || strings.Contains(stderr, "hush") {
		t.Errorf("exit code %d\n%s", code, stderr)
	}
}

func TestRun_DoesNotWaitForAServerThatRefusesItsPassword(t *testing.T) {
	t.Parallel()
	b := setup(t)
	for _, variable := range []string{"DATABASE_URL", "REDIS_URL"} {
		right := map[string]string{"DATABASE_URL": b.DatabaseURL, "REDIS_URL": b.RedisURL}[variable]
		wrong := testservers.ParseURL(t, right)
		user := wrong.User.Username()
		if user == "" {
			user = "default"
		}
		wrong.User = url.UserPassword(user, "hush")
		_, stderr, code := b.run(t, []string{variable + "=" + wrong.String()})
		want := variable + ": the server refuses this user or password: "
		if code != exitFailed || !strings.Contains(stderr, want) || strings.Contains(stderr, "waiting for") || strings.Contains(stderr, "hush") {
			t.Errorf("exit code %d, want %d and %q at once\n%s", code, exitFailed, want, stderr)
		}
	}
}

func TestRun_SaysThatMigrationsAreMissing(t *testing.T) {
	t.Parallel()
	b := setup(t)
	conn, err := pgx.Connect(t.Context(), b.DatabaseURL)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(context.Background())
	if _, err := conn.Exec(t.Context(), "DROP SCHEMA carpool CASCADE"); err != nil {
		t.Fatal(err)
	}
	p := b.Launch(t, nil)
	p.Log.Wait(t, "run the command migrate")
	if _, stderr, code := b.run(t, nil, "migrate"); code != 0 {
		t.Fatal(stderr)
	}
	p.Log.Wait(t, "worker started")
}

func TestRun_AtSIGTERMJobsMayFinish(t *testing.T) {
	t.Parallel()
	b, w := setup(t), receive(t)
	p := b.Start(t, w.env()...)
	jobs := w.enqueue(t, b, 3)
	for range jobs {
		<-w.arrived
	}
	p.Signal(t, syscall.SIGTERM)
	p.Log.Wait(t, `"msg":"no more jobs are fetched"`)
	late := w.enqueue(t, b, 1)[0]
	w.open()
	if code := p.Exit(t); code != 0 {
		t.Errorf("exit code %d", code)
	}
	for _, job := range jobs {
		if n := w.delivered(job.ID); n != 1 {
			t.Errorf("job %s was delivered %d times", job.ID, n)
		}
	}
	if info, err := b.Inspector.GetTaskInfo(late.Queue, late.ID); err != nil || info.State != asynq.TaskStatePending {
		t.Errorf("the job that came after the signal is %+v, %v; want it pending", info, err)
	}
}

func TestRun_JobsUnfinishedAtTheShutdownTimeoutGoBackWithoutUsingUpARetry(t *testing.T) {
	t.Parallel()
	b, w := setup(t), receive(t)
	p := b.Start(t, append(w.env(), "WORKER_SHUTDOWN_TIMEOUT=500ms", "WORKER_CONCURRENCY=4")...)
	jobs := w.enqueue(t, b, 7)
	for range 4 {
		<-w.arrived
	}
	p.Signal(t, syscall.SIGTERM)
	if code := p.Exit(t); code != 0 {
		t.Errorf("exit code %d", code)
	}
	for _, job := range jobs {
		info, err := b.Inspector.GetTaskInfo(job.Queue, job.ID)
		if err != nil {
			t.Fatal(err)
		}
		if info.State != asynq.TaskStatePending || info.Retried != 0 || info.LastErr != "" {
			t.Errorf("job %s is %s after %d retries, %q; want it pending and untouched", job.ID, info.State, info.Retried, info.LastErr)
		}
	}
	interrupted := 0
	for line := range strings.Lines(p.Log.String()) {
		if strings.Contains(line, `"kind":"webhook:deliver"`) && strings.Contains(line, `"outcome":"interrupted"`) {
			interrupted++
		}
	}
	if interrupted != 4 {
		t.Errorf("%d records of interrupted jobs, want 4", interrupted)
	}
	w.open()
	b.Start(t, w.env()...)
	for _, job := range jobs {
		if _, err := b.Wait(t, job); err != nil {
			t.Error(err)
		}
		if n := w.delivered(job.ID); n != 1 {
			t.Errorf("job %s was delivered %d times", job.ID, n)
		}
	}
}

func TestRun_SecondSignalExitsAtOnce(t *testing.T) {
	t.Parallel()
	b, w := setup(t), receive(t)
	p := b.Start(t, append(w.env(), "WORKER_SHUTDOWN_TIMEOUT=10m")...)
	w.enqueue(t, b, 1)
	<-w.arrived
	p.Signal(t, syscall.SIGINT)
	p.Log.Wait(t, "stopping: no more jobs are fetched")
	workertest.Eventually(t, "a signal that is not the first one again stops it", func() bool {
		return p.Cmd.Process.Signal(syscall.SIGINT) != nil || strings.Contains(p.Log.String(), `"because_of":"a second signal"`)
	})
	if code := p.Exit(t); code != exitFailed {
		t.Errorf("exit code %d, want %d", code, exitFailed)
	}
	p.Log.Wait(t, `"because_of":"a second signal"`)
}

func TestRun_ImportsThatAreCancelledOrCutOffLeaveNothingAtWorkInPostgres(t *testing.T) {
	t.Parallel()
	b := setup(t)
	for _, sql := range []string{
		"CREATE TABLE imports.t (a text)",
		"CREATE FUNCTION dawdle() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN PERFORM pg_sleep(0.2); RETURN NEW; END'",
		"CREATE TRIGGER dawdle BEFORE INSERT ON imports.t FOR EACH ROW EXECUTE FUNCTION dawdle()",
	} {
		b.Exec(t, sql)
	}
	conn, err := pgx.Connect(t.Context(), b.DatabaseURL)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(context.Background())
	connections := func(where string) (n int) {
		t.Helper()
		if err := conn.QueryRow(t.Context(), `SELECT count(*) FROM pg_stat_activity
			WHERE datname = current_database() AND application_name LIKE 'carpool%' AND `+where).Scan(&n); err != nil {
			t.Fatal(err)
		}
		return n
	}
	const importing = "query LIKE 'COPY %' AND state = 'active'"
	dir := t.TempDir()
	// More than the network holds, so that pgx is amid sending it; what that holds is work
	// for minutes.
	if err := os.WriteFile(filepath.Join(dir, "t.csv"), []byte("a\n"+strings.Repeat(strings.Repeat("x", 8000)+"\n", 2000)), 0o600); err != nil {
		t.Fatal(err)
	}

	p := b.Start(t, "IMPORT_DIR="+dir, "DB_POOL_SIZE=2", "DB_MAX_OVERFLOW=1", "WORKER_SHUTDOWN_TIMEOUT=100ms")
	for range 2 {
		var ids []string
		for range 2 {
			stdout, stderr, code := b.run(t, nil, "enqueue", "csv:import", `{"source":"file:///t.csv","table":"t","mode":"append"}`)
			if code != 0 {
				t.Fatal(stderr)
			}
			ids = append(ids, strings.TrimSpace(stdout))
		}
		workertest.Eventually(t, "the imports are at work", func() bool { return connections(importing) == 2 })
		for _, id := range ids {
			if _, stderr, code := b.run(t, nil, "cancel", id); code != 0 {
				t.Error(stderr)
			}
		}
		workertest.Eventually(t, "no import is at work", func() bool { return connections(importing) == 0 })
		if n := connections("true"); n > 2+1+1 {
			t.Errorf("the server has %d connections of a worker that has 4", n)
		}
	}
	if _, stderr, code := b.run(t, nil, "enqueue", "csv:import", `{"source":"file:///t.csv","table":"t","mode":"append"}`); code != 0 {
		t.Fatal(stderr)
	}
	workertest.Eventually(t, "the import is at work", func() bool { return connections(importing) == 1 })
	p.Signal(t, syscall.SIGTERM)
	if code := p.Exit(t); code != 0 {
		t.Errorf("exit code %d", code)
	}
	if n := connections("state <> 'idle'"); n != 0 {
		t.Errorf("the worker has ended, and %d of its connections are at work", n)
	}
}

// As timeout(1) does it, which signals the process and its group.
func TestRun_TwoSignalsAtOnceAreOne(t *testing.T) {
	t.Parallel()
	b, w := setup(t), receive(t)
	p := b.Start(t, w.env()...)
	job := w.enqueue(t, b, 1)[0]
	<-w.arrived
	p.Signal(t, syscall.SIGTERM)
	p.Signal(t, syscall.SIGINT) // another one, because two of a kind may arrive as one
	p.Log.Wait(t, `"msg":"no more jobs are fetched"`)
	w.open()
	if code := p.Exit(t); code != 0 || w.delivered(job.ID) != 1 {
		t.Errorf("exit code %d; the job was delivered %d times", code, w.delivered(job.ID))
	}
}

func TestRun_SIGTERMEndsAWorkerWhoseRedisDoesNotAnswer(t *testing.T) {
	t.Parallel()
	b := setup(t)
	redisURL, proxy := testservers.ThroughProxy(t, b.RedisURL)
	p := b.Start(t, "REDIS_URL="+redisURL, "WORKER_SHUTDOWN_TIMEOUT=1s")
	proxy.Blackhole()
	p.Signal(t, syscall.SIGTERM)
	p.Exit(t) // within the time that jobs are given, and a little more
}

func TestRun_BurstWorksOffWhatIsDueAndLeavesTheRest(t *testing.T) {
	t.Parallel()
	b, w := setup(t), receive(t)
	w.open()
	jobs := w.enqueue(t, b, 30)
	later, err := b.Client.Enqueue(t.Context(), maintenance.PoolValidate{}, &tasks.EnqueueOptions{RunAt: time.Now().Add(time.Hour)})
	if err != nil {
		t.Fatal(err)
	}
	_, stderr, code := b.run(t, w.env(), "run", "--burst")
	if code != 0 {
		t.Errorf("exit code %d\n%s", code, stderr)
	}
	for _, job := range jobs {
		if n := w.delivered(job.ID); n != 1 {
			t.Errorf("job %s was delivered %d times", job.ID, n)
		}
	}
	if info, err := b.Inspector.GetTaskInfo(later.Queue, later.ID); err != nil || info.State != asynq.TaskStateScheduled {
		t.Errorf("the job for later is %+v, %v", info, err)
	}
}

func TestRun_TwoWorkersShareTheQueues(t *testing.T) {
	t.Parallel()
	b, w := setup(t), receive(t)
	first, second := b.Start(t, append(w.env(), "WORKER_CONCURRENCY=2")...), b.Start(t, append(w.env(), "WORKER_CONCURRENCY=2")...)
	jobs := w.enqueue(t, b, 20)
	for range 4 {
		<-w.arrived // each worker holds two
	}
	w.open()
	for _, job := range jobs {
		if _, err := b.Wait(t, job); err != nil {
			t.Error(err)
		}
		if n := w.delivered(job.ID); n != 1 {
			t.Errorf("job %s was delivered %d times", job.ID, n)
		}
	}
	for _, p := range []*workertest.Process{first, second} {
		p.Log.Wait(t, `"kind":"webhook:deliver"`)
	}
}

func TestRun_EachInstanceValidatesItsOwnPoolOnItsOwnQueueWhileItLives(t *testing.T) {
	t.Parallel()
	b, w := setup(t), receive(t)
	env := append(w.env(), "DB_POOL_VALIDATE_EVERY=1s", "WORKER_CONCURRENCY=1", "RENDER_INSTANCE_ID=srv-abc")
	p := b.Start(t, env...)
	w.enqueue(t, b, 1)
	<-w.arrived // all hands are busy

	var queue string
	workertest.Eventually(t, "the instance's queue has results of two validations", func() bool {
		queues, err := b.Inspector.Queues()
		if err != nil {
			t.Fatal(err)
		}
		for _, q := range queues {
			if strings.HasPrefix(q, "instance-srv-abc-") {
				queue = q
				done, err := b.Inspector.ListCompletedTasks(q)
				return err == nil && len(done) >= 2
			}
		}
		return false
	})
	done, err := b.Inspector.ListCompletedTasks(queue)
	if err != nil {
		t.Fatal(err)
	}
	var result map[string]int
	if err := json.Unmarshal(done[0].Result, &result); err != nil {
		t.Fatalf("%s: %v", done[0].Result, err)
	}
	for _, key := range []string{"checked", "replaced", "errors", "took_ms"} {
		if _, ok := result[key]; !ok {
			t.Errorf("the result has no %s: %s", key, done[0].Result)
		}
	}
	w.open()
	p.Signal(t, syscall.SIGTERM)
	p.Exit(t)
	if queues, err := b.Inspector.Queues(); err != nil || strings.Contains(strings.Join(queues, " "), "instance-") {
		t.Errorf("the instance's queue outlives it: %v, %v", queues, err)
	}
}

func TestEnqueue_EveryBuiltInKindRunsEndToEnd(t *testing.T) {
	t.Parallel()
	b, w := setup(t), receive(t)
	w.open()
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "cities.csv"), []byte("city,zip\nHoltsville,00501\nBoston,02108\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	b.Exec(t, "CREATE TABLE events AS SELECT '2000-01-01'::date AS at")
	b.Start(t, append(w.env(), "IMPORT_DIR="+dir, "PRUNE_ALLOW=public.events")...)
	for _, c := range []struct{ kind, payload, want string }{
		{"csv:import", `{"source":"file:///cities.csv","table":"cities","mode":"replace"}`, `"rows":2`},
		{"webhook:deliver", `{"url":"` + w.URL + `","event":"city.added","body":{"zip":"00501"}}`, `"status":204`},
		{"rows:prune", `{"table":"events","column":"at","older_than":"1h"}`, `"deleted":1`},
		{"pool:validate", `{}`, `"checked":`},
		{"carpool:prune", `{}`, `"jobs":0`},
	} {
		stdout, stderr, code := b.run(t, nil, "enqueue", c.kind, c.payload, "--wait")
		id, result, _ := strings.Cut(stdout, "\n")
		if code != 0 || len(id) != 36 || !strings.Contains(result, c.want) {
			t.Errorf("%s: exit code %d, id %q, result %q, want %s in it\n%s", c.kind, code, id, result, c.want, stderr)
		}
	}
	conn, err := pgx.Connect(t.Context(), b.DatabaseURL)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(context.Background())
	var zips []string
	if err := conn.QueryRow(t.Context(), "SELECT array_agg(zip ORDER BY zip) FROM imports.cities").Scan(&zips); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]string{"00501", "02108"}, zips); diff != "" {
		t.Errorf("(-want +got)\n%s", diff)
	}
}

// docs/security.md says what a log shows of payloads: this, and nothing else.
func TestRun_OfPayloadsNothingIsShownButHostsAndNamesOfTables(t *testing.T) {
	t.Parallel()
	b := setup(t)
	// Whatever is asked for, a secret is the answer.
	rude := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		conn, _, err := http.NewResponseController(w).Hijack()
		if err != nil {
			t.Error(err)
			return
		}
		_, _ = io.WriteString(conn, "HTTP/1.1 s3cret\r\n\r\n")
		_ = conn.Close()
	}))
	t.Cleanup(rude.Close)
	host := strings.TrimPrefix(rude.URL, "http://")
	b.Exec(t, "CREATE TABLE events (at date)")
	p := b.Start(t, "OUTBOUND_ALLOW=127.0.0.1", "WEBHOOK_SECRET="+webhookSecret, "IMPORT_DIR="+t.TempDir(), "PRUNE_ALLOW=public.events", "DB_ECHO=true")
	url := "http://user:s3cret@" + host + "/s3cret?token=s3cret#s3cret"
	for _, c := range []struct{ kind, payload, shown string }{
		{"csv:import", `{"source": "` + url + `", "table": "cities", "mode": "replace"}`, "http://" + host + ": the server's answer is not valid HTTP"},
		{"csv:import", `{"source": "file:///sub/x.csv", "table": "cities", "mode": "replace"}`, "file:///sub/x.csv: there is no such file"},
		{"webhook:deliver", `{"url": "` + url + `", "event": "city.added", "body": {"s3cret": "s3cret"}}`, "webhook to " + host + ": the server's answer is not valid HTTP"},
		{"rows:prune", `{"table": "secrets", "column": "s3cret", "older_than": "1d"}`, `\"public.secrets\" is not in PRUNE_ALLOW`},
		{"rows:prune", `{"table": "events", "column": "created", "older_than": "1d"}`, `prune public.events: there is no column \"created\"`},
	} {
		if _, stderr, code := b.run(t, nil, "enqueue", c.kind, c.payload); code != 0 {
			t.Fatalf("%s: exit code %d\n%s", c.payload, code, stderr)
		}
		p.Log.Wait(t, c.shown)
	}
	p.Signal(t, syscall.SIGTERM)
	p.Exit(t)
	shown := p.Log.String()
	for _, args := range [][]string{{"archive", "ls"}, {"archive", "ls", "--json"}, {"status"}, {"status", "--json"}} {
		stdout, stderr, _ := b.run(t, nil, args...)
		shown += stdout + stderr
	}
	for line := range strings.Lines(shown) {
		if strings.Contains(line, "s3cret") {
			t.Errorf("a payload's content, or what a server sent, is shown: %s", line)
		}
	}
}

func TestEnqueue_FlagsDoWhatTheySay(t *testing.T) {
	t.Parallel()
	b := setup(t)
	enqueue := func(args ...string) *asynq.TaskInfo {
		t.Helper()
		stdout, stderr, code := b.run(t, nil, append([]string{"enqueue", "pool:validate", "{}"}, args...)...)
		if code != 0 {
			t.Fatalf("%v: exit code %d\n%s", args, code, stderr)
		}
		queue := "default"
		if len(args) > 1 && args[0] == "--queue" {
			queue = args[1]
		}
		info, err := b.Inspector.GetTaskInfo(queue, strings.TrimSpace(stdout))
		if err != nil {
			t.Fatal(err)
		}
		return info
	}
	if info := enqueue("--queue", "low"); info.Queue != "low" || info.State != asynq.TaskStatePending {
		t.Errorf("--queue low: %+v", info)
	}
	if info := enqueue("--timeout", "90s", "--retention", "1h"); info.Timeout != 90*time.Second+asynqwire.TimeoutGrace || info.Retention != time.Hour {
		t.Errorf("--timeout 90s --retention 1h: %+v", info)
	}
	if info := enqueue("--in", "1h"); info.State != asynq.TaskStateScheduled || time.Until(info.NextProcessAt) > time.Hour {
		t.Errorf("--in 1h: %+v", info)
	}
	if info := enqueue("--at", "2099-01-02T03:04:05Z"); !info.NextProcessAt.Equal(time.Date(2099, 1, 2, 3, 4, 5, 0, time.UTC)) {
		t.Errorf("--at: %+v", info)
	}
	info := enqueue("--max-retry", "7")
	if n, ok := asynqwire.MaxRetry(info.Headers); n != 7 || !ok {
		t.Errorf("--max-retry 7: %+v", info)
	}
	first := enqueue("--unique", "nightly")
	if second := enqueue("--unique", "nightly"); second.ID != first.ID {
		t.Errorf("--unique: the second job is %s, want the first one's id %s", second.ID, first.ID)
	}
	if stdout, stderr, code := b.runReading(t, strings.NewReader("{}"), nil, "enqueue", "pool:validate", "-"); code != 0 || len(strings.TrimSpace(stdout)) != 36 {
		t.Errorf("from standard input: exit code %d\n%s%s", code, stdout, stderr)
	}
}

func TestEnqueue_WrongUseIsOneClearMessageAndExitCode2(t *testing.T) {
	t.Parallel()
	b := setup(t)
	for _, c := range []struct {
		args []string
		want string
	}{
		{[]string{"csv:imprt", "{}"}, `unknown kind "csv:imprt": this program knows carpool:prune, csv:import, pool:validate`},
		{[]string{"csv:import", `{"source":"https://example.com/x.csv"`}, "csv:import payload: it is cut off"},
		{[]string{"csv:import", `{"tabel":"x"}`}, `unknown field "tabel": the fields are source, table, mode, delimiter, allow_empty, allow_loss; for example: worker enqueue csv:import '{"source"`},
		{[]string{"pool:validate"}, "json"},
		{[]string{"pool:validate", "{}", "--in", "soon"}, "--in"},
		{[]string{"pool:validate", "{}", "--in=-1s"}, "has passed"},
		{[]string{"pool:validate", "{}", "--at", "tomorrow"}, "--at"},
		{[]string{"pool:validate", "{}", "--in", "1h", "--at", "2099-01-02T03:04:05Z"}, "--in and --at can't be used together"},
		{[]string{"pool:validate", "{}", "--max-retry", "-1"}, "--max-retry"},
		{[]string{"pool:validate", "{}", "--queue", "a b"}, "--queue"},
		{[]string{"carpool:prune", "{}", "--queue", "instance-host-01234567"}, "--queue: is a worker's own, which takes pool:validate alone"},
		{[]string{"pool:validate", "{}", "--timeout", "1ms"}, "--timeout: 1ms is not from 1s to 30 days"},
		{[]string{"pool:validate", "{}", "--timeout", "721h"}, "--timeout: 721h0m0s is not from 1s to 30 days"},
		{[]string{"pool:validate", "{}", "--retention=-1s"}, "--retention: -1s is not from 1s to 366 days"},
		{[]string{"pool:validate", "{}", "--frobnicate"}, "unknown flag --frobnicate"},
	} {
		stdout, stderr, code := b.run(t, nil, append([]string{"enqueue"}, c.args...)...)
		if code != exitUsage || !strings.Contains(stderr, c.want) || stdout != "" {
			t.Errorf("%v: exit code %d, want %q in\n%s%s", c.args, code, c.want, stdout, stderr)
		}
	}
}

func TestEnqueue_WaitExitsWith1WhenTheJobFailed(t *testing.T) {
	t.Parallel()
	b := setup(t)
	b.Start(t)
	stdout, stderr, code := b.run(t, nil, "enqueue", "csv:import", `{"source":"file:///x.csv","table":"x","mode":"replace"}`, "--wait")
	if code != exitFailed || !strings.Contains(stderr, "IMPORT_DIR") || strings.Count(stdout, "\n") != 1 {
		t.Errorf("exit code %d\n%s%s", code, stdout, stderr)
	}
}

func TestEnqueue_WaitSaysThatTheJobWasCancelled(t *testing.T) {
	t.Parallel()
	b, w := setup(t), receive(t)
	wait := func(args ...string) (stdout, stderr *workertest.Log, ended chan int) {
		stdout, stderr, ended = workertest.NewLog(), workertest.NewLog(), make(chan int)
		go func() {
			p := Program{Name: "worker", Groups: []tasks.Group{new(builtin.Tasks)}, Env: environment(b.Env)}
			ended <- p.Run(t.Context(), append(append([]string{"enqueue"}, args...), "--wait"), nil, stdout, stderr)
		}()
		stdout.Wait(t, "\n")
		return stdout, stderr, ended
	}
	cancel := func(id string) {
		t.Helper()
		if _, stderr, code := b.run(t, nil, "cancel", id); code != 0 {
			t.Fatal(stderr)
		}
	}

	out, errs, ended := wait("pool:validate", "{}") // nobody runs it
	errs.Wait(t, "pending\n")
	cancel(strings.TrimSpace(out.String()))
	if code := <-ended; code != exitFailed || !strings.Contains(errs.String(), "worker: job cancelled: it was removed from its queue\n") {
		t.Errorf("one that waits: exit code %d\n%s", code, errs)
	}

	p := b.Start(t, w.env()...)
	_, errs, ended = wait("webhook:deliver", `{"url":"`+w.URL+`","event":"x","body":{}}`)
	id := <-w.arrived
	cancel(id)
	if code := <-ended; code != exitFailed || !strings.HasSuffix(errs.String(), "\nworker: job cancelled\n") {
		t.Errorf("one that runs: exit code %d\n%s", code, errs)
	}
	if stdout, stderr, _ := b.run(t, nil, "archive", "show", id); !strings.Contains(stdout, "reason    cancelled\n") {
		t.Errorf("archive show:\n%s%s", stdout, stderr)
	}
	p.Log.Wait(t, `"outcome":"cancelled"`)
	if log := p.Log.String(); strings.Contains(log, "context canceled") {
		t.Errorf("the log has asynq's word for it:\n%s", log)
	}
}

func TestEnqueue_RedisThatIsDownIsAnErrorWithoutItsPassword(t *testing.T) {
	t.Parallel()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	env := "REDIS_URL=redis://:hush@" + l.Addr().String()
	_ = l.Close()
	_, stderr, code := (&bundle{new(workertest.Bundle)}).run(t, []string{env}, "enqueue", "pool:validate", "{}")
	if code != exitFailed || !strings.Contains(stderr, "connection refused") || strings.Contains(stderr, "hush") {
		t.Errorf("exit code %d\n%s", code, stderr)
	}
}

func TestKinds_EveryExampleCanBePasted(t *testing.T) {
	t.Parallel()
	b := setup(t)
	stdout, stderr, code := b.run(t, nil, "kinds")
	if code != 0 {
		t.Fatal(stderr)
	}
	n := 0
	for line := range strings.Lines(stdout) {
		args, ok := strings.CutPrefix(strings.TrimSpace(line), "worker enqueue ")
		if !ok {
			continue
		}
		n++
		kind, payload, _ := strings.Cut(args, " ")
		if _, stderr, code := b.run(t, nil, "enqueue", kind, strings.Trim(payload, "'")); code != 0 {
			t.Errorf("%s: exit code %d\n%s", line, code, stderr)
		}
	}
	all, err := worker.Kinds(new(builtin.Tasks))
	if err != nil {
		t.Fatal(err)
	}
	if want := len(all.Kinds()); n != want {
		t.Errorf("%d examples for %d kinds:\n%s", n, want, stdout)
	}
}
