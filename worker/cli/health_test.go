package cli

import (
	"context"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"regexp"
	"strings"
	"testing"

	"github.com/carpool-go/carpool/internal/testservers"
	"github.com/carpool-go/carpool/worker/internal/workertest"
)

func TestHealth_AsksAWorkerAndSaysInALineWhyItIsNotWell(t *testing.T) {
	t.Parallel()
	b := setup(t)
	databaseURL, proxy := workertest.ThroughProxy(t, b.DatabaseURL)
	proxy.Refuse()
	ctx, cancel := context.WithCancel(t.Context())
	log, ended := workertest.NewLog(), make(chan int, 1)
	env := map[string]string{"DATABASE_URL": databaseURL, "REDIS_URL": b.RedisURL, "HEALTH_ADDR": "0.0.0.0:0", "LOG_FORMAT": "json"}
	go func() { ended <- shop(env).Run(ctx, []string{"run"}, nil, io.Discard, log) }()
	defer func() {
		cancel()
		if code := <-ended; code != 0 {
			t.Errorf("the worker's exit code is %d\n%s", code, log)
		}
	}()
	log.Wait(t, `"address":"`)
	_, port, _ := net.SplitHostPort(regexp.MustCompile(`"address":"([^"]+)"`).FindStringSubmatch(log.String())[1])
	health := func(args ...string) (stdout, stderr string, code int) {
		return shop(map[string]string{"HEALTH_ADDR": "0.0.0.0:" + port}).run(t, append([]string{"health"}, args...)...)
	}

	testservers.Eventually(t, "the command says what the worker waits for", func() bool {
		stdout, stderr, code := health()
		return code == exitFailed && stdout == "" && stderr == "shop: not ready: it starts, and waits for the database\n"
	})
	if stdout, stderr, code := health("--live"); code != 0 || stdout != "alive\n" || stderr != "" {
		t.Errorf("--live: exit code %d\n%s%s", code, stdout, stderr)
	}
	proxy.Heal()
	testservers.Eventually(t, "the worker is ready", func() bool {
		stdout, stderr, code := health()
		return code == 0 && stdout == "ready\n" && stderr == ""
	})
	proxy.Refuse()
	proxy.Reset()
	testservers.Eventually(t, "the worker is not ready", func() bool {
		_, stderr, code := health()
		return code == exitFailed && strings.HasPrefix(stderr, "shop: not ready: database: it ") && strings.Count(stderr, "\n") == 1
	})
	proxy.Heal()
}

func TestHealth_AsksAMonitorWithoutALogin(t *testing.T) {
	t.Parallel()
	at, stop := startMonitor(t, map[string]string{"REDIS_URL": testservers.Redis(t), "MONITOR_PASSWORD": "open sesame"})
	env := map[string]string{"MONITOR_ADDR": strings.TrimPrefix(at, "http://")}
	if stdout, stderr, code := shop(env).run(t, "health", "--monitor"); code != 0 || stdout != "ok\n" || stderr != "" {
		t.Errorf("exit code %d\n%s%s", code, stdout, stderr)
	}
	stop()
	if _, stderr, code := shop(env).run(t, "health", "--monitor"); code != exitFailed || !strings.Contains(stderr, "nobody answers there") {
		t.Errorf("after its end: exit code %d\n%s", code, stderr)
	}
}

// A container's health check knows 0 and 1 only.
func TestHealth_EveryFaultIsALineAndExitsWithOne(t *testing.T) {
	t.Parallel()
	other := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "<html>\x1b[2J") }))
	t.Cleanup(other.Close)
	otherAddr := strings.TrimPrefix(other.URL, "http://")
	silent, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = silent.Close() })
	for name, c := range map[string]struct {
		env  map[string]string
		args []string
		want string
	}{
		"not set":              {nil, nil, "shop: HEALTH_ADDR is not set, so no worker says whether it is well; set it for the worker and for this command, for example HEALTH_ADDR=127.0.0.1:8081\n"},
		"no address":           {map[string]string{"HEALTH_ADDR": "8081"}, nil, `shop: HEALTH_ADDR is "8081", which is not host:port; for example HEALTH_ADDR=127.0.0.1:8081` + "\n"},
		"nobody":               {map[string]string{"HEALTH_ADDR": "127.0.0.1:1"}, nil, "shop: http://127.0.0.1:1/readyz?format=json: nobody answers there: "},
		"nobody, everywhere":   {map[string]string{"HEALTH_ADDR": ":1"}, []string{"--live"}, "shop: http://127.0.0.1:1/livez?format=json: nobody answers there: "},
		"no answer":            {map[string]string{"HEALTH_ADDR": silent.Addr().String()}, nil, "no answer within 5s\n"},
		"another program":      {map[string]string{"HEALTH_ADDR": otherAddr}, nil, "answers with the status 200, and not as a worker does: is another program there?\n"},
		"no monitor":           {map[string]string{"MONITOR_ADDR": otherAddr}, []string{"--monitor"}, "answers with the status 200, which is no monitor's: is another program there?\n"},
		"no monitor's address": {map[string]string{"MONITOR_ADDR": "h:port"}, []string{"--monitor"}, `shop: MONITOR_ADDR is "h:port", which is not host:port; `},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			stdout, stderr, code := shop(c.env).run(t, append([]string{"health"}, c.args...)...)
			if code != exitFailed || stdout != "" || !strings.Contains(stderr, c.want) || strings.Count(stderr, "\n") != 1 {
				t.Errorf("exit code %d, want %q in\n%s%s", code, c.want, stdout, stderr)
			}
		})
	}
	if _, stderr, code := shop(nil).run(t, "health", "--live", "--monitor"); code != exitUsage || !strings.Contains(stderr, "leave --live out\nTry: shop health --help\n") {
		t.Errorf("--live and --monitor: exit code %d\n%s", code, stderr)
	}
}

func TestRun_AHealthAddressThatIsTakenIsNamedWithTheWayOut(t *testing.T) {
	t.Parallel()
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	env := map[string]string{"DATABASE_URL": "postgres://127.0.0.1:1/x", "REDIS_URL": "redis://127.0.0.1:1", "HEALTH_ADDR": taken.Addr().String(), "LOG_FORMAT": "json"}
	_, stderr, code := shop(env).run(t, "run")
	if code != exitFailed || !strings.Contains(stderr, `"error":"HEALTH_ADDR: listen tcp `) || !strings.Contains(stderr, "for example HEALTH_ADDR=127.0.0.1:8082") {
		t.Errorf("exit code %d\n%s", code, stderr)
	}
}
