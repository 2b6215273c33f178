package monitor

import (
	"context"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"

	"github.com/hibiken/asynq"
	"github.com/redis/go-redis/v9"

	"github.com/carpool-go/carpool/internal/testservers"
	"github.com/carpool-go/carpool/tasks"
)

func TestMain(m *testing.M) {
	redis.SetLogger(quiet{})
	testservers.Main(m)
}

// quiet drops what go-redis says of connections that it replaces.
type quiet struct{}

func (quiet) Printf(context.Context, string, ...any) {}

// open opens a client of the Redis at url until the test ends.
func open(t *testing.T, url string) redis.UniversalClient {
	t.Helper()
	rdb, err := tasks.OpenRedis(url)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = rdb.Close() })
	return rdb
}

// serve serves a monitor until the test ends and returns its address.
func serve(t *testing.T, cfg Config) string {
	t.Helper()
	if cfg.Redis == nil {
		cfg.Redis = open(t, testservers.Redis(t))
	}
	cfg.User = "carpool"
	server := httptest.NewServer(New(cfg))
	t.Cleanup(server.Close)
	return server.URL
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

func enqueue(t *testing.T, rdb redis.UniversalClient) *asynq.TaskInfo {
	t.Helper()
	info, err := asynq.NewClientFromRedisClient(rdb).EnqueueContext(t.Context(),
		asynq.NewTask("csv:import", []byte(`{"source":"https://example.com/s3cr3t","deep":{"s3cr3t":1}}`)))
	if err != nil {
		t.Fatal(err)
	}
	return info
}

func TestMonitor_ShowsQueuesAndOnlyTheNamesOfAPayloadsFields(t *testing.T) {
	t.Parallel()
	rdb := open(t, testservers.Redis(t))
	info := enqueue(t, rdb)
	at := serve(t, Config{Redis: rdb})
	if code, page := ask(t, "GET", at, nil); code != 200 || !strings.Contains(page, "<html") {
		t.Errorf("the first page: %d\n%.300s", code, page)
	}
	code, page := ask(t, "GET", at+"/api/queues/default/tasks/"+info.ID, nil)
	if code != 200 || !strings.Contains(page, "csv:import") || !strings.Contains(page, "source") || strings.Contains(page, "s3cr3t") {
		t.Errorf("a task's page: %d\n%s", code, page)
	}
	at = serve(t, Config{Redis: rdb, ShowPayloads: true})
	if _, page := ask(t, "GET", at+"/api/queues/default/tasks/"+info.ID, nil); !strings.Contains(page, "s3cr3t") {
		t.Errorf("with ShowPayloads:\n%s", page)
	}
}

func TestMonitor_WithAPasswordNothingIsShownWithoutIt(t *testing.T) {
	t.Parallel()
	at := serve(t, Config{Password: "open sesame"})
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
	rdb := open(t, testservers.Redis(t))
	info := enqueue(t, rdb)
	at := serve(t, Config{Redis: rdb})
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
	at = serve(t, Config{Redis: rdb, ReadOnly: true})
	if code, _ := ask(t, "DELETE", at+"/api/queues/default/archived_tasks/"+info.ID, nil); code < 400 {
		t.Errorf("with ReadOnly a deletion answers %d", code)
	}
}

func TestMonitor_IsThereWithoutRedis(t *testing.T) {
	t.Parallel()
	at := serve(t, Config{Redis: open(t, "redis://127.0.0.1:1")})
	if code, _ := ask(t, "GET", at, nil); code != 200 {
		t.Errorf("the first page: %d", code)
	}
	if code, _ := ask(t, "GET", at+"/api/queues", nil); code != 500 {
		t.Errorf("the queues: %d", code)
	}
}

func TestIsLoopback_IsTrueOfNothingThatOthersReach(t *testing.T) {
	t.Parallel()
	for host, want := range map[string]bool{
		"127.0.0.1": true, "127.8.8.8": true, "::1": true, "localhost": true,
		"": false, "0.0.0.0": false, "::": false, "10.0.0.1": false, "example.com": false, "localhost.example.com": false,
	} {
		if got := IsLoopback(host); got != want {
			t.Errorf("IsLoopback(%q) is %t", host, got)
		}
	}
}
