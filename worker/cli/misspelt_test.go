package cli

import (
	"slices"
	"strings"
	"testing"

	"github.com/carpool-go/carpool/internal/testservers"
	"github.com/carpool-go/carpool/tasks"
	"github.com/carpool-go/carpool/tasks/builtin"
)

// withEnviron is a program with an environment that it can list.
func withEnviron(env []string, groups ...tasks.Group) Program {
	return Program{Name: "shop", Groups: groups, Env: environment(env), Environ: func() []string { return env }}
}

func TestMisspelt_NamesTheSettingThatIsMeant(t *testing.T) {
	t.Parallel()
	for env, meant := range map[string]string{
		"DB_POL_SIZE":             "DB_POOL_SIZE",
		"DB_POOLSIZE":             "DB_POOL_SIZE",
		"DB_POOL_SZIE":            "DB_POOL_SIZE",
		"db_pool_size":            "DB_POOL_SIZE",
		"DB_MAX_OVERFLOWS":        "DB_MAX_OVERFLOW",
		"DB_POOL_PREPING":         "DB_POOL_PRE_PING",
		"WORKER_CONCURENCY":       "WORKER_CONCURRENCY",
		"WORKER_QUEUE":            "WORKER_QUEUES",
		"WORKER_SHUTDOWN_TIMOUT":  "WORKER_SHUTDOWN_TIMEOUT",
		"WORKER_STARTUP_TIME_OUT": "WORKER_STARTUP_TIMEOUT",
		"REDIS_ULR":               "REDIS_URL",
		"DATABSE_URL":             "DATABASE_URL",
		"LOG_LEVLE":               "LOG_LEVEL",
		"OUTBOUND_ALOW":           "OUTBOUND_ALLOW",
		"MONITOR_PASWORD":         "MONITOR_PASSWORD",
		"WEBHOOK_SECERT":          "WEBHOOK_SECRET", // a group's, and secret
		"IMPORT_DIRS":             "IMPORT_DIR",
		"PRUNE_ALOW":              "PRUNE_ALLOW",
		"ORDERS_LIMITS":           "ORDERS_LIMIT",
	} {
		_, stderr, code := withEnviron([]string{env + "=hush"}, new(builtin.Tasks), new(orders)).run(t, "config")
		want := "shop: " + env + " is no setting; did you mean " + meant + "?\n"
		if code != exitUsage || strings.Count(stderr, want) != 1 || strings.Contains(stderr, "hush") {
			t.Errorf("%s: exit code %d, want %q in\n%s", env, code, want, stderr)
		}
	}
}

func TestMisspelt_DoesNotCryWolf(t *testing.T) {
	t.Parallel()
	settings := []string{
		"DATABASE_URL", "DB_ECHO", "DB_MAX_OVERFLOW", "DB_POOLER", "DB_POOL_LEAK_AFTER", "DB_POOL_PRE_PING", "DB_POOL_RECYCLE", "DB_POOL_SIZE",
		"DB_POOL_TIMEOUT", "DB_POOL_VALIDATE_EVERY", "HEALTH_ADDR", "IMPORT_DIR", "LOG_FORMAT", "LOG_LEVEL", "MAX_PAYLOAD", "MONITOR_ADDR", "MONITOR_PASSWORD", "MONITOR_READ_ONLY",
		"MONITOR_SHOW_PAYLOADS", "MONITOR_USER", "ORDERS_LIMIT", "OUTBOUND_ALLOW", "PRUNE_ALLOW", "REDIS_URL", "WEBHOOK_SECRET", "WORKER_CONCURRENCY", "WORKER_FETCHERS",
		"WORKER_QUEUES", "WORKER_SHUTDOWN_TIMEOUT", "WORKER_STARTUP_TIMEOUT",
	}
	environments := [][]string{{"DB_POL_SIZE="}, {"=C:=C:\\"}} // set to nothing; as Windows has it
	for _, name := range append([]string{
		"DB_HOST", "DB_PORT", "DB_USER", "DB_NAME", "DB_PASSWORD", "DB_PASS", "DB_URL", "DB_POOL", "DB_SSLMODE", "DB_TIMEOUT", "DB_SCHEMA",
		"DATABASE_HOST", "DATABASE_NAME", "DATABASE_URL_REPLICA", "DATABASE_POOL_SIZE", "DATABASE_DIR", "PGHOST", "PGUSER", "PGAPPNAME", "PGPASSWORD",
		"REDIS_HOST", "REDIS_PORT", "REDIS_TLS_URL", "REDIS_DB", "REDIS_PASSWORD", "REDISCLOUD_URL",
		"WORKER_ID", "WORKER_NAME", "WORKER_COUNT", "WORKER_CLASS", "WORKER_TIMEOUT", "WORKERS", "WEB_CONCURRENCY",
		"LOG_FILE", "LOG_DIR", "LOG_COLOR", "LOGNAME", "GLOG_LEVEL", "RUST_LOG", "MONITOR", "MONITOR_URL", "MONITOR_PORT",
		"WEBHOOK_URL", "WEBHOOK_TOKEN", "IMPORT_ID", "OUTBOUND_PROXY", "ORDERS_TOPIC",
		"PATH", "HOME", "HOSTNAME", "PORT", "NO_COLOR", "TERM", "RENDER", "RENDER_INSTANCE_ID", "A", "_",
	}, settings...) {
		environments = append(environments, []string{name + "=1"})
	}
	// Beside a setting that is given, its like is another program's.
	for _, given := range []string{"REDIS_URL", "DATABASE_URL", "LOG_LEVEL", "WORKER_QUEUES"} {
		for _, other := range []string{given + "2", given + "_2", given + "S", given[:len(given)-1] + "I"} {
			environments = append(environments, []string{given + "=1", other + "=1"})
		}
	}
	for _, env := range environments {
		in := invocation{Program: Program{Environ: func() []string { return env }}, variables: settings}
		if lines := in.misspelt(); len(lines) > 0 {
			t.Errorf("%q: %s", env, lines)
		}
	}
}

func TestMisspelt_KnowsTheSettingsOfEveryCommandAndGroup(t *testing.T) {
	t.Parallel()
	env := []string{
		"REDIS_URL=" + exampleRedisURL, "DATABASE_URL=" + exampleDatabaseURL,
		"MONITOR_ADDR=:1", "MONITOR_PASSWORD=x", "MONITOR_READ_ONLY=true", "WEBHOOK_SECRET=whsec_c2VjcmV0c2VjcmV0c2VjcmV0c2VjcmV0", "ORDERS_LIMIT=1",
	}
	if _, stderr, code := withEnviron(env, new(builtin.Tasks), new(orders)).run(t, "config"); code != 0 || stderr != "" {
		t.Errorf("exit code %d\n%s", code, stderr)
	}
}

func TestMisspelt_IsSaidByConfigRunAndMigrate(t *testing.T) {
	t.Parallel()
	const said = "DB_POL_SIZE is no setting; did you mean DB_POOL_SIZE?"
	b := setup(t)
	env := append(slices.Clone(b.Env), "DB_POL_SIZE=hush")
	for _, c := range []struct {
		args []string
		want string
	}{
		{[]string{"config"}, "shop: " + said + "\n"},
		{[]string{"run", "--burst"}, `"level":"WARN","msg":"` + said + `"`},
		{[]string{"migrate"}, `"level":"WARN","msg":"` + said + `"`},
	} {
		stdout, stderr, code := withEnviron(env).run(t, c.args...)
		if code != 0 || strings.Count(stderr, c.want) != 1 || strings.Contains(stdout+stderr, "hush") {
			t.Errorf("%q: exit code %d, want %q in\n%s%s", c.args, code, c.want, stdout, stderr)
		}
	}
	if _, stderr, _ := withEnviron(env).run(t, "kinds"); stderr != "" {
		t.Errorf("kinds, which has no settings:\n%s", stderr)
	}
}

func TestMisspelt_IsSaidWhereASettingIsMissing(t *testing.T) {
	t.Parallel()
	env := []string{"REDIS_ULR=" + testservers.Redis(t)}
	_, stderr, code := withEnviron(env).run(t, "status")
	if want := "shop: REDIS_ULR is no setting; did you mean REDIS_URL?\n"; code != exitUsage || !strings.HasSuffix(stderr, want) {
		t.Errorf("exit code %d, want %q in\n%s", code, want, stderr)
	}
}

func TestDistance(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		a, b string
		want int
	}{
		{"", "", 0},
		{"", "AB", 2},
		{"AB", "", 2},
		{"ABC", "ABC", 0},
		{"ABC", "AC", 1},
		{"AC", "ABC", 1},
		{"ABC", "AXC", 1},
		{"ABCD", "ACBD", 1},
		{"ABCD", "BADC", 2},
		{"KITTEN", "SITTING", 3},
	} {
		if got := distance(c.a, c.b); got != c.want {
			t.Errorf("from %q to %q it is %d, want %d", c.a, c.b, got, c.want)
		}
	}
}
