package main

import (
	"bytes"
	"context"
	"encoding/json"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/hibiken/asynq"

	"github.com/carpool-go/carpool/internal/testservers"
	"github.com/carpool-go/carpool/tasks"
)

func TestMain(m *testing.M) { testservers.Main(m) }

// start runs the monitor on a free port until the test ends and returns its
// address.
func start(t *testing.T, cfg config) string {
	t.Helper()
	if cfg.RedisURL == "" {
		cfg.RedisURL = testservers.Redis(t)
	}
	cfg.Addr, cfg.User = "127.0.0.1:0", "carpool"
	log := &logLines{lines: make(chan string, 100)}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- run(ctx, cfg, slog.New(slog.NewJSONHandler(log, nil))) }()
	t.Cleanup(func() {
		http.DefaultClient.CloseIdleConnections()
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	for {
		select {
		case line := <-log.lines:
			var r struct{ URL string }
			if json.Unmarshal([]byte(line), &r) == nil && r.URL != "" {
				return r.URL
			}
		case err := <-done:
			done <- nil
			t.Fatal(err)
		case <-time.After(time.Minute):
			t.Fatal("the monitor does not start")
		}
	}
}

type logLines struct {
	mu    sync.Mutex
	lines chan string
}

func (l *logLines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for line := range bytes.Lines(p) {
		l.lines <- string(line)
	}
	return len(p), nil
}

func ask(t *testing.T, method, url string, change func(*http.Request)) (int, string) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), method, url, nil)
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

func enqueue(t *testing.T, redisURL string) *asynq.TaskInfo {
	t.Helper()
	rdb, err := tasks.OpenRedis(redisURL)
	if err != nil {
		t.Fatal(err)
	}
	defer rdb.Close()
	info, err := asynq.NewClientFromRedisClient(rdb).EnqueueContext(t.Context(),
		asynq.NewTask("csv:import", []byte(`{"source":"https://example.com/s3cr3t","deep":{"s3cr3t":1}}`)))
	if err != nil {
		t.Fatal(err)
	}
	return info
}

func TestMonitor_ShowsQueuesAndOnlyTheNamesOfAPayloadsFields(t *testing.T) {
	t.Parallel()
	redisURL := testservers.Redis(t)
	info := enqueue(t, redisURL)
	at := start(t, config{RedisURL: redisURL})
	if code, page := ask(t, "GET", at, nil); code != 200 || !strings.Contains(page, "<html") {
		t.Errorf("the first page: %d\n%.300s", code, page)
	}
	code, page := ask(t, "GET", at+"/api/queues/default/tasks/"+info.ID, nil)
	if code != 200 || !strings.Contains(page, "csv:import") || !strings.Contains(page, "source") || strings.Contains(page, "s3cr3t") {
		t.Errorf("a task's page: %d\n%s", code, page)
	}
	at = start(t, config{RedisURL: redisURL, ShowPayloads: true})
	if _, page := ask(t, "GET", at+"/api/queues/default/tasks/"+info.ID, nil); !strings.Contains(page, "s3cr3t") {
		t.Errorf("with MONITOR_SHOW_PAYLOADS:\n%s", page)
	}
}

func TestMonitor_WithAPasswordNothingIsShownWithoutIt(t *testing.T) {
	t.Parallel()
	at := start(t, config{Password: "open sesame"})
	for name, change := range map[string]func(*http.Request){
		"no login":       nil,
		"wrong password": func(r *http.Request) { r.SetBasicAuth("carpool", "open") },
		"wrong user":     func(r *http.Request) { r.SetBasicAuth("root", "open sesame") },
		"empty":          func(r *http.Request) { r.SetBasicAuth("", "") },
	} {
		for _, path := range []string{"/", "/api/queues", "/static/js/x.js"} {
			if code, _ := ask(t, "GET", at+path, change); code != http.StatusUnauthorized {
				t.Errorf("%s: %s answers %d", name, path, code)
			}
		}
	}
	if code, _ := ask(t, "GET", at+"/api/queues", func(r *http.Request) { r.SetBasicAuth("carpool", "open sesame") }); code != 200 {
		t.Errorf("the right login: %d", code)
	}
}

func TestMonitor_OtherWebPagesCanNeitherReadNorAct(t *testing.T) {
	t.Parallel()
	redisURL := testservers.Redis(t)
	info := enqueue(t, redisURL)
	at := start(t, config{RedisURL: redisURL})
	if code, _ := ask(t, "GET", at+"/api/queues", func(r *http.Request) { r.Host = "evil.example" }); code != http.StatusForbidden {
		t.Errorf("under another name it answers %d", code)
	}
	archive := at + "/api/queues/default/pending_tasks/" + info.ID + ":archive"
	if code, _ := ask(t, "POST", archive, func(r *http.Request) { r.Header.Set("Origin", "https://evil.example") }); code != http.StatusForbidden {
		t.Errorf("a request from another page answers %d", code)
	}
	u, err := url.Parse(at)
	if err != nil {
		t.Fatal(err)
	}
	if code, _ := ask(t, "POST", archive, func(r *http.Request) { r.Header.Set("Origin", "http://"+u.Host) }); code >= 300 {
		t.Errorf("a request from its own page answers %d", code)
	}
	at = start(t, config{RedisURL: redisURL, ReadOnly: true})
	if code, _ := ask(t, "DELETE", at+"/api/queues/default/archived_tasks/"+info.ID, nil); code < 400 {
		t.Errorf("with MONITOR_READ_ONLY a deletion answers %d", code)
	}
}

func TestMonitor_StartsAndStopsWithoutRedis(t *testing.T) {
	t.Parallel()
	at := start(t, config{RedisURL: "redis://127.0.0.1:1"})
	if code, _ := ask(t, "GET", at, nil); code != 200 {
		t.Errorf("the first page: %d", code)
	}
	if code, _ := ask(t, "GET", at+"/api/queues", nil); code != 500 {
		t.Errorf("the queues: %d", code)
	}
}

func TestConfig_EveryFaultIsNamedAndAnOpenAddressNeedsAPassword(t *testing.T) {
	t.Parallel()
	err := (&config{Addr: "0.0.0.0:80"}).validate()
	if err == nil || !strings.Contains(err.Error(), "REDIS_URL is not set") || !strings.Contains(err.Error(), "MONITOR_PASSWORD is not set") {
		t.Errorf("error %v", err)
	}
	err = (&config{RedisURL: "redis://:hush@h", Addr: "8080", Password: "hush"}).validate()
	if err == nil || strings.Count(err.Error(), "set the variable instead") != 2 || !strings.Contains(err.Error(), "not host:port") || strings.Contains(err.Error(), "hush") {
		t.Errorf("error %v", err)
	}
	for _, addr := range []string{"127.0.0.1:0", "localhost:0", "[::1]:0"} {
		if err := (&config{RedisURL: "redis://h", Addr: addr}).validate(); err != nil {
			t.Errorf("%s: %v", addr, err)
		}
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	cfg := config{RedisURL: "redis://127.0.0.1:1", Addr: l.Addr().String()}
	if err := run(t.Context(), cfg, slog.New(slog.DiscardHandler)); err == nil || !strings.Contains(err.Error(), "MONITOR_ADDR: ") {
		t.Errorf("an address that is taken: %v", err)
	}
}
