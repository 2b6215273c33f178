package worker_test

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/carpool-go/carpool/dbpool"
	"github.com/carpool-go/carpool/tasks"
	"github.com/carpool-go/carpool/worker"
	"github.com/carpool-go/carpool/worker/internal/workertest"
)

// holder is a group whose jobs hold a connection until released.
type holder struct{ holds, release chan struct{} }

type hold struct{}

func (hold) Kind() string           { return "hold" }
func (hold) Options() tasks.Options { return tasks.Options{} }
func (hold) Validate() error        { return nil }

func newHolder() *holder { return &holder{make(chan struct{}, 1), make(chan struct{})} }

func (h *holder) Register(s *tasks.Set) {
	tasks.Register(s, func(ctx context.Context, job *tasks.Job, _ hold) (any, error) {
		conn, err := job.DB.Acquire(ctx)
		if err != nil {
			return nil, err
		}
		defer conn.Release()
		h.holds <- struct{}{}
		<-h.release
		return nil, nil
	})
}

// healthy runs a worker that serves its health, until the test ends.
type healthy struct {
	url   string
	stop  context.CancelFunc
	ended chan error
	log   *workertest.Log
}

func runHealthy(t *testing.T, cfg worker.Config) *healthy {
	t.Helper()
	w := &healthy{ended: make(chan error, 1), log: workertest.NewLog()}
	cfg.HealthAddr, cfg.Logger = "127.0.0.1:0", slog.New(slog.NewJSONHandler(w.log, nil))
	ctx, cancel := context.WithCancel(t.Context())
	w.stop = cancel
	over := make(chan struct{})
	go func() {
		defer close(over)
		w.ended <- worker.Run(ctx, cfg)
	}()
	t.Cleanup(func() {
		cancel()
		<-over
		if t.Failed() {
			t.Logf("the worker's log:\n%s", w.log)
		}
	})
	w.log.Wait(t, `"address":"`)
	w.url = "http://" + regexp.MustCompile(`"address":"([^"]+)"`).FindStringSubmatch(w.log.String())[1]
	return w
}

// ask asks for a path; a code of 0 is no answer.
func (w *healthy) ask(t *testing.T, path string) (code int, body string) {
	t.Helper()
	transport := &http.Transport{DisableKeepAlives: true}
	resp, err := (&http.Client{Transport: transport, Timeout: time.Minute}).Get(w.url + path)
	if err != nil {
		return 0, err.Error()
	}
	defer resp.Body.Close()
	data, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, string(data)
}

// becomes waits until the worker answers /readyz so. All the while it is alive.
func (w *healthy) becomes(t *testing.T, code int, text string) {
	t.Helper()
	var got int
	var body string
	defer func() {
		if t.Failed() {
			t.Logf("/readyz: %d, %s", got, body)
		}
	}()
	workertest.Eventually(t, "/readyz answers "+http.StatusText(code)+" with "+text, func() bool {
		if live, said := w.ask(t, "/livez"); live != 200 || said != "alive\n" {
			t.Fatalf("/livez: %d, %s", live, said)
		}
		got, body = w.ask(t, "/readyz")
		return got == code && strings.Contains(body, text)
	})
	if strings.Contains(body, "127.0.0.1") || strings.Contains(body, "postgres:") {
		t.Errorf("it tells strangers where the servers are: %s", body)
	}
}

func TestHealth_FollowsTheWorkerFromItsStartToItsEnd(t *testing.T) {
	t.Parallel()
	b := workertest.Setup(t)
	redisURL, redisProxy := workertest.ThroughProxy(t, b.RedisURL)
	databaseURL, databaseProxy := workertest.ThroughProxy(t, b.DatabaseURL)
	redisProxy.Refuse()
	databaseProxy.Refuse()
	group := newHolder()
	w := runHealthy(t, worker.Config{RedisURL: redisURL, Pool: dbpool.DefaultConfig(databaseURL), Groups: []tasks.Group{group}})
	w.becomes(t, 503, "not ready: it starts, and waits for Redis\n")
	redisProxy.Heal()
	w.becomes(t, 503, "not ready: it starts, and waits for the database\n")
	databaseProxy.Heal()
	w.becomes(t, 200, "ready\nredis: ok\ndatabase: ok\nfetching: ok\n")

	databaseProxy.Refuse()
	databaseProxy.Reset()
	w.becomes(t, 503, "not ready\nredis: ok\ndatabase: it ")
	databaseProxy.Heal()
	w.becomes(t, 200, "ready\n")
	redisProxy.Refuse()
	redisProxy.Reset()
	w.becomes(t, 503, "redis: it does not answer; the log says why\ndatabase: ok\nfetching: Redis does not answer fetches; the log says more\n")
	redisProxy.Heal()
	w.becomes(t, 200, "ready\n")
	for _, want := range []string{`"msg":"the worker is not ready"`, `"msg":"the worker is ready again"`} {
		w.log.Wait(t, want)
	}

	if _, err := b.Client.Enqueue(t.Context(), hold{}, nil); err != nil {
		t.Fatal(err)
	}
	<-group.holds
	w.becomes(t, 200, "ready\n")
	w.stop()
	w.becomes(t, 503, "not ready: it stops\n")
	close(group.release)
	if err := <-w.ended; err != nil {
		t.Error(err)
	}
	if code, _ := w.ask(t, "/livez"); code != 0 {
		t.Errorf("it is served after the worker's end: %d", code)
	}
}

func TestHealth_ADatabaseThatTakesNoWritesIsNotReady(t *testing.T) {
	t.Parallel()
	b := workertest.Setup(t)
	w := runHealthy(t, worker.Config{RedisURL: b.RedisURL, Pool: dbpool.DefaultConfig(b.DatabaseURL)})
	w.becomes(t, 200, "ready\n")
	b.Exec(t, `DO $$ BEGIN EXECUTE format('ALTER DATABASE %I SET default_transaction_read_only = on', current_database()); END $$`)
	b.Exec(t, `SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()`)
	w.becomes(t, 503, "database: it answers, but it takes no writes\n")
}

// A worker whose jobs have all connections is at work, and a check keeps none from them.
func TestHealth_AFullPoolIsWell(t *testing.T) {
	t.Parallel()
	b := workertest.Setup(t)
	group := newHolder()
	cfg := worker.Config{RedisURL: b.RedisURL, Pool: dbpool.DefaultConfig(b.DatabaseURL), Groups: []tasks.Group{group}}
	cfg.Pool.Size, cfg.Pool.MaxOverflow = 1, 0
	w := runHealthy(t, cfg)
	w.becomes(t, 200, "ready\n")
	if _, err := b.Client.Enqueue(t.Context(), hold{}, nil); err != nil {
		t.Fatal(err)
	}
	<-group.holds
	time.Sleep(1100 * time.Millisecond) // a report is kept for a second
	for range 2 {
		if code, body := w.ask(t, "/readyz"); code != 200 {
			t.Errorf("%d, %s", code, body)
		}
	}
	close(group.release)
}

func TestHealth_IsJSONForWhoWantsIt(t *testing.T) {
	t.Parallel()
	b := workertest.Setup(t)
	w := runHealthy(t, worker.Config{RedisURL: b.RedisURL, Pool: dbpool.DefaultConfig(b.DatabaseURL)})
	w.becomes(t, 200, "ready\n")
	_, body := w.ask(t, "/readyz?format=json")
	var report struct {
		OK      bool
		Message string
		Checks  []struct {
			Name, Message string
			OK            bool
		}
	}
	if err := json.Unmarshal([]byte(body), &report); err != nil || !report.OK || len(report.Checks) != 3 || report.Checks[1].Name != "database" || !report.Checks[1].OK {
		t.Errorf("%s: %v", body, err)
	}
}

func TestRun_AHealthAddressThatIsTakenIsAnErrorOfItsOwn(t *testing.T) {
	t.Parallel()
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	err = worker.Run(t.Context(), worker.Config{
		RedisURL: "redis://127.0.0.1:1", Pool: dbpool.DefaultConfig("postgres://127.0.0.1:1/x"), Logger: workertest.Discard(),
		HealthAddr: taken.Addr().String(),
	})
	if _, ok := errors.AsType[*worker.ListenError](err); !ok || !strings.Contains(err.Error(), "HealthAddr: listen tcp") {
		t.Errorf("error %v", err)
	}
}
