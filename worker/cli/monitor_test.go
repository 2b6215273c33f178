package cli

import (
	"context"
	"encoding/json"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"

	"github.com/carpool-go/carpool/internal/testservers"
	"github.com/carpool-go/carpool/worker/internal/workertest"
)

// startMonitor runs the command monitor on a free port until stop is called, or the test
// ends, and returns its address. stop returns the exit code and the log.
func startMonitor(t *testing.T, env map[string]string, args ...string) (url string, stop func() (code int, log string)) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	log, ended := workertest.NewLog(), make(chan int, 1)
	go func() {
		ended <- shop(env).Run(ctx, append([]string{"monitor", "--addr=127.0.0.1:0"}, args...), nil, io.Discard, log)
	}()
	t.Cleanup(cancel)
	log.Wait(t, `"url":"`)
	line, _, _ := strings.Cut(log.String(), "\n")
	var started struct{ Msg, Version, URL string }
	if err := json.Unmarshal([]byte(line), &started); err != nil || started.Msg != "monitor started" || started.Version != "1.2.3" {
		t.Fatalf("it starts with %s: %v", line, err)
	}
	return started.URL, func() (int, string) {
		http.DefaultClient.CloseIdleConnections()
		cancel()
		return <-ended, log.String()
	}
}

func ask(t *testing.T, url string, change func(*http.Request)) (int, string) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, url, nil)
	if err != nil {
		t.Fatal(err)
	}
	if change != nil {
		change(req)
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, string(body)
}

func TestMonitor_AnswersUntilItIsToStop(t *testing.T) {
	t.Parallel()
	at, stop := startMonitor(t, map[string]string{"REDIS_URL": testservers.Redis(t), "MONITOR_PASSWORD": "open sesame"})
	login := func(r *http.Request) { r.SetBasicAuth("carpool", "open sesame") }
	if code, page := ask(t, at, login); code != 200 || !strings.Contains(page, "<html") {
		t.Errorf("the first page: %d\n%.300s", code, page)
	}
	if code, _ := ask(t, at+"/api/queues", login); code != 200 {
		t.Errorf("the queues: %d", code)
	}
	if code, _ := ask(t, at, nil); code != http.StatusUnauthorized {
		t.Errorf("without the login: %d", code)
	}
	if code, log := stop(); code != 0 || !strings.Contains(log, `"msg":"monitor stopped"`) || strings.Contains(log, "sesame") {
		t.Errorf("exit code %d\n%s", code, log)
	}
}

func TestMonitor_StartsAndStopsWithoutRedis(t *testing.T) {
	t.Parallel()
	at, stop := startMonitor(t, map[string]string{"REDIS_URL": "redis://127.0.0.1:1"})
	if code, _ := ask(t, at, nil); code != 200 {
		t.Errorf("the first page: %d", code)
	}
	if code, _ := ask(t, at+"/api/queues", nil); code != 500 {
		t.Errorf("the queues: %d", code)
	}
	if code, log := stop(); code != 0 {
		t.Errorf("exit code %d\n%s", code, log)
	}
}

func TestMonitor_EveryFaultIsNamedAndAnOpenAddressNeedsAPassword(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		env  map[string]string
		args []string
		want []string
	}{
		"an open address": {
			map[string]string{"MONITOR_ADDR": "0.0.0.0:80"},
			nil,
			[]string{"REDIS_URL is not set", "MONITOR_PASSWORD is not set"},
		},
		"secrets as flags": {
			nil,
			[]string{"--redis-url=redis://:hush@h", "--addr=8080", "--password=hush"},
			[]string{
				"REDIS_URL is given as a flag with a password in it", "MONITOR_PASSWORD is given as a flag", "set the variable instead",
				`MONITOR_ADDR is "8080", which is not host:port; for example MONITOR_ADDR=`,
			},
		},
		"neither true nor false": {
			map[string]string{"REDIS_URL": "redis//h", "MONITOR_READ_ONLY": "perhaps", "MONITOR_SHOW_PAYLOADS": "2"},
			nil,
			[]string{"REDIS_URL is wrong", `MONITOR_READ_ONLY is "perhaps", which is neither true nor false; for example MONITOR_READ_ONLY=true`, "MONITOR_SHOW_PAYLOADS is "},
		},
	} {
		_, stderr, code := shop(c.env).run(t, append([]string{"monitor"}, c.args...)...)
		if code != exitUsage || strings.Contains(stderr, "hush") {
			t.Errorf("%s: exit code %d\n%s", name, code, stderr)
		}
		for _, want := range c.want {
			if !strings.Contains(stderr, want) {
				t.Errorf("%s: no %q in\n%s", name, want, stderr)
			}
		}
	}
}

func TestMonitor_ReadsItsSettings(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		env                    map[string]string
		args                   []string
		readOnly, showPayloads bool
	}{
		"neither":    {map[string]string{"MONITOR_READ_ONLY": "false", "MONITOR_SHOW_PAYLOADS": ""}, nil, false, false},
		"variables":  {map[string]string{"MONITOR_READ_ONLY": "yes", "MONITOR_SHOW_PAYLOADS": "1"}, nil, true, true},
		"flags":      {nil, []string{"--read-only", "--show-payloads"}, true, true},
		"flags over": {map[string]string{"MONITOR_READ_ONLY": "true", "MONITOR_SHOW_PAYLOADS": "no"}, []string{"--read-only=false", "--show-payloads=yes"}, false, true},
	} {
		for _, addr := range []string{"127.0.0.1:0", "localhost:0", "[::1]:0"} {
			var m monitorCmd
			env := map[string]string{"REDIS_URL": exampleRedisURL, "MONITOR_ADDR": addr}
			for variable, value := range c.env {
				env[variable] = value
			}
			parser, err := newParser(&m, variables(env))
			if err != nil {
				t.Fatal(err)
			}
			if _, err := parser.Parse(c.args); err != nil {
				t.Fatal(err)
			}
			cfg, err := m.config(&invocation{Program: shop(env)})
			if err != nil || cfg.ReadOnly != c.readOnly || cfg.ShowPayloads != c.showPayloads || cfg.User != "carpool" || addr != net.JoinHostPort(cfg.Host, "0") {
				t.Errorf("%s, %s: %+v, %v", name, addr, cfg, err)
			}
		}
	}
}

func TestMonitor_AnAddressThatIsTakenIsNamed(t *testing.T) {
	t.Parallel()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	_, stderr, code := shop(map[string]string{"REDIS_URL": "redis://127.0.0.1:1", "MONITOR_ADDR": l.Addr().String()}).run(t, "monitor")
	if code != exitFailed || !strings.HasPrefix(stderr, "shop: MONITOR_ADDR: ") {
		t.Errorf("exit code %d\n%s", code, stderr)
	}
}
