package doctor

import (
	"context"
	"log/slog"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/redis/go-redis/v9"

	"github.com/carpool-go/carpool/admin"
	"github.com/carpool-go/carpool/dbpool"
	"github.com/carpool-go/carpool/internal/instance"
	"github.com/carpool-go/carpool/internal/schema"
	"github.com/carpool-go/carpool/internal/servers"
	"github.com/carpool-go/carpool/internal/testservers"
	"github.com/carpool-go/carpool/tasks"
	"github.com/carpool-go/carpool/tasks/builtin"
	"github.com/carpool-go/carpool/tasks/maintenance"
	"github.com/carpool-go/carpool/worker/internal/fleet"
	"github.com/carpool-go/carpool/worker/internal/workertest"
)

// config is that of a worker with the ready-made kinds and the defaults of all settings.
func config(t *testing.T, redisURL, databaseURL string) Config {
	t.Helper()
	set, err := tasks.NewSet(&maintenance.Tasks{}, new(builtin.Tasks))
	if err != nil {
		t.Fatal(err)
	}
	return Config{
		RedisURL: redisURL, Pool: dbpool.DefaultConfig(databaseURL), Tasks: set,
		Queues: map[string]int{"critical": 6, "default": 3, "low": 1}, Concurrency: 10, MaxPayload: tasks.DefaultMaxPayload,
		ShutdownTimeout: 25 * time.Second, StopsWithin: 32 * time.Second, ValidateEvery: time.Minute,
	}
}

// redisOnly is a config without a database, and databaseOnly one without a Redis.
func redisOnly(t *testing.T, url string) Config    { return config(t, url, "") }
func databaseOnly(t *testing.T, url string) Config { return config(t, "", url) }

// examine returns what was found, and logs it if the test fails.
func examine(t *testing.T, c Config) []Finding {
	t.Helper()
	findings := Examine(t.Context(), c)
	t.Cleanup(func() {
		if t.Failed() {
			t.Log(text(findings))
		}
	})
	for _, f := range findings {
		if strings.Contains(f.Says+f.WayOut, "hush") {
			t.Errorf("a secret is in %+v", f)
		}
	}
	return findings
}

func text(findings []Finding) string {
	var lines strings.Builder
	for _, f := range findings {
		lines.WriteString(string(f.Result) + " " + f.Check + ": " + f.Says + " → " + f.WayOut + "\n")
	}
	return lines.String()
}

// require fails unless there is a finding of this check and result, with these texts in what
// it says and in the way out.
func require(t *testing.T, findings []Finding, check string, result Result, says, wayOut string) Finding {
	t.Helper()
	for _, f := range findings {
		if f.Check == check && f.Result == result && strings.Contains(f.Says, says) && strings.Contains(f.WayOut, wayOut) {
			return f
		}
	}
	t.Errorf("there is no %s of %q that says %q, with the way out %q", result, check, says, wayOut)
	return Finding{}
}

// requireOK fails if there is anything but ok among the findings of these checks, or nothing.
func requireOK(t *testing.T, findings []Finding, checks ...string) {
	t.Helper()
	for _, check := range checks {
		require(t, findings, check, OK, "", "")
		for _, f := range findings {
			if f.Check == check && f.Result != OK {
				t.Errorf("%+v", f)
			}
		}
	}
}

// startRedis starts a Redis that a test may set wrong.
func startRedis(t *testing.T, cfg servers.RedisConfig) (url string, rdb redis.UniversalClient) {
	t.Helper()
	r, err := servers.StartRedis(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = r.Stop() })
	return r.URL(), workertest.OpenRedis(t, r.URL())
}

func do(t *testing.T, rdb redis.UniversalClient, commands ...string) {
	t.Helper()
	for _, command := range commands {
		var args []any
		for _, arg := range strings.Split(command, " ") {
			args = append(args, arg)
		}
		if err := rdb.Do(t.Context(), args...).Err(); err != nil {
			t.Fatalf("%s: %v", command, err)
		}
	}
}

// startPostgres starts a Postgres that a test may set wrong, with carpool's tables.
func startPostgres(t *testing.T, cfg servers.PostgresConfig) *servers.Postgres {
	t.Helper()
	pg, err := servers.StartPostgres(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = pg.Stop() })
	migrate(t, pg.URL())
	return pg
}

func migrate(t *testing.T, url string) {
	t.Helper()
	if err := schema.Migrate(t.Context(), url, slog.New(slog.DiscardHandler)); err != nil {
		t.Fatal(err)
	}
}

func exec(t *testing.T, url string, statements ...string) {
	t.Helper()
	ctx := context.WithoutCancel(t.Context()) // it is for the end of a test, too
	conn, err := pgx.Connect(ctx, url)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(ctx)
	for _, sql := range statements {
		if _, err := conn.Exec(ctx, sql); err != nil {
			t.Fatalf("%s: %v", sql, err)
		}
	}
}

// as is the URL of a database for another role, whose password is hush.
func as(t *testing.T, rawURL, role string) string {
	t.Helper()
	u := testservers.ParseURL(t, rawURL)
	return strings.Replace(rawURL, u.User.String()+"@", role+":hush@", 1)
}

// startInstance shows an instance until the test ends.
func startInstance(t *testing.T, rdb redis.UniversalClient, change func(*fleet.Config)) {
	t.Helper()
	name := instance.NewName("shop")
	cfg := fleet.Config{
		Redis: rdb,
		Self: admin.Instance{
			Name: name, Version: "1.2.3", Host: "host", PID: os.Getpid(), Started: time.Now(), Kinds: []string{"shop:order"},
			Queues: map[string]int{"critical": 6, "default": 3, "low": 1}, OwnQueue: instance.Queue(name), Concurrency: 10,
		},
		Running: func() int { return 0 }, Pool: func() dbpool.Stats { return dbpool.Stats{PoolSize: 5} },
		DatabaseAway: func() bool { return false }, Blocked: func() string { return "" },
		Log: workertest.Discard(),
	}
	change(&cfg)
	f := fleet.New(cfg)
	t.Cleanup(f.Stop)
	if err := f.Start(); err != nil {
		t.Fatal(err)
	}
}

func TestExamine_WhereAllIsWellEachCheckSaysSo(t *testing.T) {
	t.Parallel()
	redisURL, rdb := startRedis(t, servers.RedisConfig{AppendFsync: "everysec"})
	pg := startPostgres(t, servers.PostgresConfig{Durable: true, TLS: true})
	exec(t, pg.URL(), "CREATE ROLE shop LOGIN PASSWORD 'hush'", "GRANT USAGE, CREATE ON SCHEMA imports TO shop", "GRANT USAGE ON SCHEMA carpool TO shop",
		"GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA carpool TO shop", "GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA carpool TO shop")
	do(t, rdb, "ACL SETUSER worker on >hush ~asynq:* ~carpool:* resetchannels &asynq:cancel +@all -@admin -@dangerous +info", "CONFIG SET maxmemory 1gb")
	startInstance(t, rdb, func(*fleet.Config) {})

	u := testservers.ParseURL(t, as(t, pg.URL(), "shop"))
	q := u.Query()
	q.Set("sslmode", "verify-full")
	q.Set("sslrootcert", pg.CAFile())
	u.RawQuery = q.Encode()
	c := config(t, strings.Replace(redisURL, testservers.ParseURL(t, redisURL).User.String()+"@", "worker:hush@", 1), u.String())
	c.KillAfter = time.Minute
	findings := examine(t, c)
	requireOK(t, findings, "settings", "shutdown", "redis", "redis tls", "redis rights", "redis eviction", "redis memory", "redis persistence", "redis role", "redis connections",
		"postgres", "postgres tls", "postgres pooler", "postgres tables", "postgres role", "postgres grants", "postgres session", "postgres connections",
		"clocks", "workers", "queues", "payload limit", "kinds", "schedules")
	for _, f := range findings {
		if f.Result != OK {
			t.Errorf("%+v", f)
		}
	}
	require(t, findings, "postgres tls", OK, "TLS 1.3, the certificate is verified", "")
	if t.Failed() {
		return
	}
	for _, f := range findings {
		if f.Says == "" || f.WayOut != "" || strings.ContainsAny(f.Says, "\n%") {
			t.Errorf("%+v", f)
		}
	}
}

func TestExamine_AServerThatIsAwayIsAFailureAndTheOtherOneIsLookedAt(t *testing.T) {
	t.Parallel()
	b := workertest.Setup(t)
	silentRedis, redisProxy := testservers.ThroughProxy(t, b.RedisURL)
	redisProxy.Blackhole()
	silentPostgres, postgresProxy := testservers.ThroughProxy(t, b.DatabaseURL)
	postgresProxy.Blackhole()
	silent := testservers.ParseURL(t, silentRedis).Host
	for name, c := range map[string]struct{ redis, database, check, says, other string }{
		"no Redis":           {"redis://:hush@127.0.0.1:1", b.DatabaseURL, "redis", "REDIS_URL: Redis at 127.0.0.1:1 cannot be reached", "postgres tables"},
		"a silent Redis":     {silentRedis, b.DatabaseURL, "redis", "cannot be reached: no answer within ", "postgres tables"},
		"no Sentinel":        {"redis-sentinel://:hush@127.0.0.1:1,127.0.0.1:2?master=m", b.DatabaseURL, "redis", "cannot be reached by the Sentinels", "postgres tables"},
		"silent Sentinels":   {"redis-sentinel://:hush@" + silent + "," + silent + "?master=m", b.DatabaseURL, "redis", "cannot be reached by the Sentinels", "postgres tables"},
		"a silent cluster":   {"redis-cluster://:hush@" + silent, b.DatabaseURL, "redis", "cannot be reached", "postgres tables"},
		"a wrong password":   {"redis://:hush@" + testservers.ParseURL(t, b.RedisURL).Host, b.DatabaseURL, "redis", "refuses this user or password", "postgres tables"},
		"no Postgres":        {b.RedisURL, "postgres://u:hush@127.0.0.1:1/app", "postgres", "DATABASE_URL: Postgres cannot be reached", "redis rights"},
		"a silent Postgres":  {b.RedisURL, silentPostgres, "postgres", "DATABASE_URL: ", "redis rights"},
		"a role that is not": {b.RedisURL, as(t, b.DatabaseURL, "nobody"), "postgres", "refuses this user or password", "redis rights"},
		"both are silent":    {silentRedis, silentPostgres, "postgres", "DATABASE_URL: ", "settings"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			done := make(chan []Finding, 1)
			go func() { done <- Examine(t.Context(), config(t, c.redis, c.database)) }()
			select {
			case findings := <-done:
				require(t, findings, c.check, Failure, c.says, "")
				requireOK(t, findings, c.other)
				if strings.Contains(text(findings), "hush") {
					t.Errorf("a secret is in\n%s", text(findings))
				}
			case <-time.After(time.Minute): // on a machine that is busy
				t.Error("it does not end")
			}
		})
	}
}

func TestExamine_FindsAWorkersClockThatIsWrong(t *testing.T) {
	t.Parallel()
	c := config(t, testservers.Redis(t), testservers.Postgres(t))
	for ahead, which := range map[time.Duration]string{time.Hour: "behind", -time.Hour: "ahead of"} {
		c.now = func() time.Time { return time.Now().Add(ahead) }
		findings := examine(t, c)
		for _, server := range []string{"Redis", "Postgres"} {
			require(t, findings, "clocks", Warning, "the clock of "+server+" is 1h0m0s "+which+" this machine's", "NTP")
		}
	}
	c.now = nil
	requireOK(t, examine(t, c), "clocks")
}

func TestExamine_AFarServerIsAWarning(t *testing.T) {
	t.Parallel()
	redisURL, redisProxy := testservers.ThroughProxy(t, testservers.Redis(t))
	databaseURL, postgresProxy := testservers.ThroughProxy(t, testservers.Postgres(t))
	redisProxy.Delay(20 * time.Millisecond)
	postgresProxy.Delay(20 * time.Millisecond)
	findings := examine(t, config(t, redisURL, databaseURL))
	require(t, findings, "redis", Warning, "a round trip takes ", "same region")
	require(t, findings, "postgres", Warning, "a round trip takes ", "same region")
}

// hold opens a connection to Postgres and returns what closes it.
func hold(t *testing.T, url string) (end func()) {
	t.Helper()
	conn, err := pgx.Connect(t.Context(), url)
	if err != nil {
		t.Fatal(err)
	}
	return func() { _ = conn.Close(context.Background()) }
}
