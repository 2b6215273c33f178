package cli

import (
	"context"
	"encoding/json"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/carpool-go/carpool/tasks"
)

// parcel is a payload with options of its own.
type parcel struct {
	To   string `json:"to" doc:"Where it's sent." example:"O'Hare"`
	Note string `json:"note,omitempty"`
}

func (parcel) Kind() string { return "shop:parcel" }
func (parcel) Options() tasks.Options {
	return tasks.Options{Queue: "low", MaxRetry: tasks.NoRetry, Timeout: 90 * time.Second, Retention: 24 * time.Hour}
}
func (parcel) Validate() error { return nil }

// parcels is a group with that kind.
type parcels struct{}

func (parcels) Register(s *tasks.Set) {
	tasks.Register(s, func(_ context.Context, _ *tasks.Job, _ parcel) (any, error) { return nil, nil })
}

func TestKinds_OneIsShownWithAllOfItsOptions(t *testing.T) {
	t.Parallel()
	stdout, stderr, code := shop(nil, parcels{}, new(orders)).run(t, "kinds", "shop:parcel")
	want := `shop:parcel
  to    string  Where it's sent.
  note  string   (optional)

  queue      low
  retries    0
  timeout    1m30s for each try
  retention  24h after it is done, with its result
  effects    may happen more than once, as after a crash

  shop enqueue shop:parcel '{"to": "O'\''Hare"}'
  SELECT carpool.enqueue('shop:parcel', '{"to": "O''Hare"}')
`
	if diff := cmp.Diff(want, stdout); diff != "" || code != 0 || stderr != "" {
		t.Errorf("exit code %d %s (-want +got)\n%s", code, stderr, diff)
	}
	_, stderr, code = shop(nil, parcels{}).run(t, "kinds", "shop:parcl")
	if code != exitUsage || !strings.HasPrefix(stderr, `shop: kind: unknown kind "shop:parcl": this program knows carpool:prune, pool:validate, shop:parcel`) {
		t.Errorf("exit code %d\n%s", code, stderr)
	}
}

func TestKinds_JSONIsAnObjectALine(t *testing.T) {
	t.Parallel()
	stdout, stderr, code := shop(nil, parcels{}, new(orders)).run(t, "kinds", "--json")
	if code != 0 || stderr != "" {
		t.Fatalf("exit code %d\n%s", code, stderr)
	}
	kinds := make(map[string]kindJSON)
	for line := range strings.Lines(stdout) {
		var kind kindJSON
		if err := json.Unmarshal([]byte(line), &kind); err != nil {
			t.Fatalf("%s: %v", line, err)
		}
		kinds[kind.Kind] = kind
	}
	want := kindJSON{
		Kind: "shop:parcel", Queue: "low", TimeoutMS: 90_000, RetentionMS: 86_400_000,
		Fields: []fieldJSON{
			{Name: "to", Type: "string", Doc: "Where it's sent.", Example: json.RawMessage(`"O'Hare"`)},
			{Name: "note", Type: "string", Optional: true},
		},
		Example: json.RawMessage(`{"to":"O'Hare"}`),
	}
	if diff := cmp.Diff(want, kinds["shop:parcel"]); diff != "" {
		t.Errorf("(-want +got)\n%s", diff)
	}
	if len(kinds) != 4 {
		t.Errorf("there are %d kinds, want those of the groups and the worker's own:\n%s", len(kinds), stdout)
	}
	one, _, _ := shop(nil, parcels{}).run(t, "kinds", "--json", "shop:parcel")
	if strings.Count(one, "\n") != 1 || !strings.Contains(stdout, one) {
		t.Errorf("of one kind: %s", one)
	}
}

func TestConfig_JSONSaysWhereAValueIsFrom(t *testing.T) {
	t.Parallel()
	env := map[string]string{
		"REDIS_URL": "redis://:hush@localhost", "DATABASE_URL": exampleDatabaseURL, "ORDERS_KEY": "hush", "DB_POOL_SIZE": "5", "LOG_LEVEL": "warn",
	}
	stdout, stderr, code := shop(env, &orders{Limit: 20}).run(t, "config", "--json", "--log-level=debug", "--concurrency=3")
	if code != 0 || stderr != "" || strings.Contains(stdout, "hush") {
		t.Errorf("exit code %d\n%s%s", code, stderr, stdout)
	}
	got := make(map[string]shownSetting)
	for line := range strings.Lines(stdout) {
		var s shownSetting
		if err := json.Unmarshal([]byte(line), &s); err != nil {
			t.Fatalf("%s: %v", line, err)
		}
		got[s.Name] = s
	}
	for _, want := range []shownSetting{
		{"REDIS_URL", "redis://:***@localhost", "", "variable"},
		{"LOG_LEVEL", "debug", "info", "flag"},
		{"LOG_FORMAT", "auto", "auto", "default"},
		{"WORKER_CONCURRENCY", "3", "10", "flag"},
		{"DB_POOL_SIZE", "5", "5", "variable"},
		{"ORDERS_LIMIT", "20", "20", "default"},
		{"ORDERS_KEY", "***", "", "variable"},
	} {
		if got[want.Name] != want {
			t.Errorf("got %+v, want %+v", got[want.Name], want)
		}
	}
}
