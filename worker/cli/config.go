package cli

import (
	"fmt"
	"log/slog"
	"net"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/carpool-go/carpool/dbpool"
	"github.com/carpool-go/carpool/internal/asynqwire"
	"github.com/carpool-go/carpool/internal/instance"
	"github.com/carpool-go/carpool/outbound"
	"github.com/carpool-go/carpool/tasks"
	"github.com/carpool-go/carpool/worker"
)

// The settings are declared as strings, once, for the environment, the flags
// and the help; what they mean is read by the functions below, which collect
// every fault, so that one start shows all of them.

type redisSettings struct {
	RedisURL string `name:"redis-url" env:"REDIS_URL" placeholder:"redis://…" group:"Servers" help:"Redis that holds the queues: redis://, rediss://, redis-sentinel:// or redis-cluster://."`
}

type databaseSettings struct {
	DatabaseURL string `name:"database-url" env:"DATABASE_URL" placeholder:"postgres://…" group:"Servers" help:"Postgres that jobs work on."`
}

type logSettings struct {
	LogLevel  string `env:"LOG_LEVEL" default:"info" group:"Log" help:"debug shows a record after each job; or info, warn, error."`
	LogFormat string `env:"LOG_FORMAT" default:"auto" group:"Log" help:"json, text, or auto: text on a terminal, JSON elsewhere."`
}

type poolSettings struct {
	Size          string `name:"db-pool-size" env:"DB_POOL_SIZE" default:"5" group:"Pool" help:"Connections kept open."`
	MaxOverflow   string `name:"db-max-overflow" env:"DB_MAX_OVERFLOW" default:"5" group:"Pool" help:"Further connections under load, closed soon after."`
	Timeout       string `name:"db-pool-timeout" env:"DB_POOL_TIMEOUT" default:"30s" group:"Pool" help:"Longest wait for a connection."`
	Recycle       string `name:"db-pool-recycle" env:"DB_POOL_RECYCLE" default:"30m" group:"Pool" help:"A connection's longest life, jittered; 0 for no limit."`
	PrePing       string `name:"db-pool-pre-ping" env:"DB_POOL_PRE_PING" default:"true" group:"Pool" help:"Check each connection before it is lent."`
	ValidateEvery string `name:"db-pool-validate-every" env:"DB_POOL_VALIDATE_EVERY" default:"1m" group:"Pool" help:"How often idle connections are validated."`
	LeakAfter     string `name:"db-pool-leak-after" env:"DB_POOL_LEAK_AFTER" default:"1m" group:"Pool" help:"Log who has held a connection this long; 0 for never."`
	Pooler        string `name:"db-pooler" env:"DB_POOLER" default:"false" group:"Pool" help:"The URL leads to PgBouncer, or its like, in transaction mode."`
	Echo          string `name:"db-echo" env:"DB_ECHO" default:"false" group:"Pool" help:"Log each SQL statement, never its arguments."`
}

type workerSettings struct {
	Concurrency     string `name:"concurrency" env:"WORKER_CONCURRENCY" default:"10" group:"Worker" help:"Jobs at once."`
	Queues          string `name:"queues" env:"WORKER_QUEUES" default:"critical=6,default=3,low=1" group:"Worker" help:"Queues to pull from, with their weights."`
	Fetchers        string `name:"fetchers" env:"WORKER_FETCHERS" hidden:"" help:"Has no effect any more."`
	ShutdownTimeout string `name:"shutdown-timeout" env:"WORKER_SHUTDOWN_TIMEOUT" default:"25s" group:"Worker" help:"How long jobs may go on after SIGTERM before they are pushed back."`
}

type startupSettings struct {
	StartupTimeout string `name:"startup-timeout" env:"WORKER_STARTUP_TIMEOUT" default:"60s" group:"Servers" help:"How long to wait at the start for servers that are down."`
}

type payloadSettings struct {
	MaxPayload string `name:"max-payload" env:"MAX_PAYLOAD" default:"1MiB" group:"Worker" help:"Payloads and results of jobs that are larger are refused."`
}

type outboundSettings struct {
	OutboundAllow string `name:"outbound-allow" env:"OUTBOUND_ALLOW" group:"Worker" placeholder:"HOST|CIDR,…" help:"Addresses that jobs may call although they are not public."`
}

type healthSettings struct {
	HealthAddr string `name:"health-addr" env:"HEALTH_ADDR" placeholder:"HOST:PORT" group:"Worker" help:"Where a worker serves /livez and /readyz; unset, nowhere."`
}

// runSettings are what run and config read, but for the groups' own.
type runSettings struct {
	redisSettings    `embed:""`
	databaseSettings `embed:""`
	startupSettings  `embed:""`
	logSettings      `embed:""`
	poolSettings     `embed:""`
	workerSettings   `embed:""`
	payloadSettings  `embed:""`
	outboundSettings `embed:""`
	healthSettings   `embed:""`
}

// config reads the settings of run, and those of the groups into their fields.
func (r *runSettings) config(in *invocation) (worker.Config, error) {
	if _, err := in.kinds(); err != nil {
		return worker.Config{}, err
	}
	cfg, f := r.read(in)
	if err := f.err(); err != nil {
		return worker.Config{}, err
	}
	if err := cfg.Validate(); err != nil { // what isn't a setting
		return worker.Config{}, programFault("the program can't be run", err)
	}
	return cfg, nil
}

// read is config with the faults of the settings. What has a fault is not to be used.
func (r *runSettings) read(in *invocation) (worker.Config, *faults) {
	f := in.faults()
	cfg := worker.Config{
		RedisURL:        f.redisURL(r.RedisURL),
		Pool:            f.pool(r.databaseSettings, r.poolSettings),
		Groups:          in.Groups,
		Schedules:       in.Schedules,
		Queues:          f.queues(r.Queues),
		Concurrency:     f.number("WORKER_CONCURRENCY", r.Concurrency, 1, worker.MaxConcurrency, "10"),
		ShutdownTimeout: orNone(f.duration("WORKER_SHUTDOWN_TIMEOUT", r.ShutdownTimeout, 0, "25s")),
		StartupTimeout:  orNone(f.startup(r.startupSettings)),
		ValidateEvery:   f.duration("DB_POOL_VALIDATE_EVERY", r.ValidateEvery, time.Second, "1m"),
		MaxPayload:      f.maxPayload(r.MaxPayload),
		OutboundAllow:   f.outbound(r.OutboundAllow),
		HealthAddr:      f.health(r.HealthAddr),
		Name:            in.Env("RENDER_INSTANCE_ID"),
		Version:         in.Version,
	}
	f.log(r.logSettings)
	f.list = append(f.list, in.settings.read()...)
	return cfg, f
}

// orNone is a time of [worker.Config], where 0 is the default and less is none.
func orNone(d time.Duration) time.Duration {
	if d == 0 {
		return -1
	}
	return d
}

// faults collects what is wrong with the settings, and reads those that aren't.
type faults struct {
	env  func(string) string
	list []string
}

func (in *invocation) faults() *faults { return &faults{env: in.Env} }

func (f *faults) add(name, problem, example string) {
	f.list = append(f.list, faultLine(name, problem, example))
}

// faultLine says what is wrong with a setting, and how it is set.
func faultLine(name, problem, example string) string {
	return fmt.Sprintf("%s %s; for example %s=%s", name, problem, name, example)
}

// has reports whether something is wrong with a setting.
func (f *faults) has(name string) bool {
	return slices.ContainsFunc(f.list, func(line string) bool { return strings.HasPrefix(line, name+" ") })
}

func (f *faults) err() error {
	switch len(f.list) {
	case 0:
		return nil
	case 1:
		return configError(f.list[0])
	}
	return configError(fmt.Sprintf("%d settings are wrong:\n  %s", len(f.list), strings.Join(f.list, "\n  ")))
}

// configError is a fault of the settings, or of the program, that only the person who
// starts the worker can mend: the worker exits with code 2.
type configError string

func (e configError) Error() string { return string(e) }

// argumentError is a fault of a command's flags and arguments that is found when the
// command runs: the program exits with code 2, and points to the command's help.
type argumentError string

func (e argumentError) Error() string { return string(e) }

const (
	exampleRedisURL    = "redis://localhost:6379/0"
	exampleDatabaseURL = "postgres://user:password@localhost:5432/app"
)

// flagsAreSeen is why a secret must not be given as a flag.
const flagsAreSeen = "which everybody on the machine can read in the list of processes; set the variable instead"

func (f *faults) redisURL(value string) string {
	switch {
	case value == "":
		f.add("REDIS_URL", "is not set", exampleRedisURL)
	case f.secretInFlag("REDIS_URL", value):
		f.add("REDIS_URL", "is given as a flag with a password in it, "+flagsAreSeen, exampleRedisURL)
	default:
		rdb, err := tasks.OpenRedis(value)
		if err != nil {
			f.add("REDIS_URL", "is wrong: "+strings.TrimPrefix(err.Error(), "tasks: redis URL: "), exampleRedisURL)
			return ""
		}
		_ = rdb.Close()
	}
	return value
}

func (f *faults) databaseURL(value string) string {
	switch {
	case value == "":
		f.add("DATABASE_URL", "is not set", exampleDatabaseURL)
	case f.secretInFlag("DATABASE_URL", value):
		f.add("DATABASE_URL", "is given as a flag with a password in it, "+flagsAreSeen, exampleDatabaseURL)
	case !strings.HasPrefix(value, "postgres://") && !strings.HasPrefix(value, "postgresql://"):
		f.add("DATABASE_URL", "is wrong: it must begin with postgres:// or postgresql://", exampleDatabaseURL)
	default:
		if err := dbpool.DefaultConfig(value).Validate(); err != nil {
			f.add("DATABASE_URL", "is wrong: "+strings.TrimPrefix(err.Error(), "dbpool: "), exampleDatabaseURL)
		}
	}
	return value
}

// secretInFlag reports whether value came from a flag, not from the variable
// name, and may have a password in it.
func (f *faults) secretInFlag(name, value string) bool {
	return value != f.env(name) && strings.ContainsAny(value, "@=") && redactURL(value) != value
}

func (f *faults) pool(db databaseSettings, p poolSettings) dbpool.Config {
	cfg := dbpool.DefaultConfig(f.databaseURL(db.DatabaseURL))
	cfg.Size = f.number("DB_POOL_SIZE", p.Size, 1, 1000, "5")
	cfg.MaxOverflow = f.number("DB_MAX_OVERFLOW", p.MaxOverflow, 0, 1000, "5")
	cfg.Timeout = f.duration("DB_POOL_TIMEOUT", p.Timeout, time.Millisecond, "30s")
	cfg.Recycle = f.duration("DB_POOL_RECYCLE", p.Recycle, 0, "30m")
	cfg.PrePing = f.boolean("DB_POOL_PRE_PING", p.PrePing, "true")
	cfg.LeakAfter = f.duration("DB_POOL_LEAK_AFTER", p.LeakAfter, 0, "1m")
	cfg.ThroughPooler = f.boolean("DB_POOLER", p.Pooler, "false")
	cfg.Echo = f.boolean("DB_ECHO", p.Echo, "false")
	return cfg
}

func (f *faults) maxPayload(value string) int {
	return f.size("MAX_PAYLOAD", value, worker.LeastMaxPayload, worker.MostMaxPayload, "1MiB")
}

func (f *faults) outbound(allow string) string {
	if _, err := outbound.New(allow); err != nil {
		f.add("OUTBOUND_ALLOW", "is wrong: "+err.Error(), "10.1.0.0/16,hooks.internal")
	}
	return allow
}

const exampleHealthAddr = "127.0.0.1:8081"

func (f *faults) health(addr string) string {
	if addr != "" {
		f.hostPort("HEALTH_ADDR", addr, exampleHealthAddr)
	}
	return addr
}

// hostPort returns the host of an address to listen on.
func (f *faults) hostPort(name, addr, example string) (host string) {
	host, port, err := net.SplitHostPort(addr)
	if n, wrong := strconv.Atoi(port); err != nil || wrong != nil || n < 0 || n > 65535 {
		f.add(name, fmt.Sprintf("is %q, which is not host:port", addr), example)
	}
	return host
}

func (f *faults) log(l logSettings) (level slog.Level, format string) {
	if err := level.UnmarshalText([]byte(l.LogLevel)); err != nil {
		f.add("LOG_LEVEL", fmt.Sprintf("is %q, which is not one of debug, info, warn, error", l.LogLevel), "info")
	}
	if !slices.Contains([]string{"auto", "json", "text"}, l.LogFormat) {
		f.add("LOG_FORMAT", fmt.Sprintf("is %q, which is not one of auto, json, text", l.LogFormat), "auto")
	}
	return level, l.LogFormat
}

func (f *faults) startup(s startupSettings) time.Duration {
	return f.duration("WORKER_STARTUP_TIMEOUT", s.StartupTimeout, 0, "60s")
}

func (f *faults) number(name, value string, lowest, highest int, example string) int {
	n, err := strconv.Atoi(strings.TrimSpace(value))
	if err != nil || n < lowest || n > highest {
		f.add(name, fmt.Sprintf("is %q, which is not a whole number from %d to %d", value, lowest, highest), example)
	}
	return n
}

// units are those of a size, in bytes.
var units = []struct {
	name  string
	bytes int
}{{"KiB", 1 << 10}, {"MiB", 1 << 20}}

// size returns bytes.
func (f *faults) size(name, value string, lowest, highest int, example string) int {
	for _, unit := range units {
		text, has := strings.CutSuffix(strings.TrimSpace(value), unit.name)
		if !has {
			continue
		}
		n, err := strconv.Atoi(strings.TrimSpace(text))
		if err == nil && n >= lowest/unit.bytes && n <= highest/unit.bytes {
			return n * unit.bytes
		}
	}
	f.add(name, fmt.Sprintf("is %q, which is not a size from %dKiB to %dMiB with its unit", value, lowest>>10, highest>>20), example)
	return 0
}

func (f *faults) duration(name, value string, lowest time.Duration, example string) time.Duration {
	d, err := time.ParseDuration(strings.TrimSpace(value))
	switch {
	case err != nil:
		f.add(name, fmt.Sprintf("is %q, which is not a time with its unit, such as 500ms, 30s or 5m", value), example)
	case d < lowest:
		f.add(name, fmt.Sprintf("is %q, which is less than %s", value, lowest), example)
	}
	return d
}

func (f *faults) boolean(name, value, example string) bool {
	b, err := strconv.ParseBool(strings.TrimSpace(value))
	if err != nil {
		f.add(name, fmt.Sprintf("is %q, which is neither true nor false", value), example)
	}
	return b
}

func (f *faults) queues(value string) map[string]int {
	const name, example = "WORKER_QUEUES", "critical=6,default=3,low=1"
	queues := make(map[string]int)
	for entry := range strings.SplitSeq(value, ",") {
		queue, weight, weighted := strings.Cut(strings.TrimSpace(entry), "=")
		n := 1
		if weighted {
			var err error
			if n, err = strconv.Atoi(weight); err != nil || n < 1 || n > worker.MaxWeight {
				f.add(name, fmt.Sprintf("gives %q the weight %q, which is not a whole number from 1 to %d", queue, weight, worker.MaxWeight), example)
			}
		}
		if !asynqwire.IsQueueName(queue) {
			f.add(name, fmt.Sprintf("has a queue %q; a queue's name is made of letters, digits, and _ . : -", queue), example)
		}
		if strings.HasPrefix(queue, instance.QueuePrefix) {
			f.add(name, fmt.Sprintf("has a queue %q; names that begin with %s are the instances' own", queue, instance.QueuePrefix), example)
		}
		if _, twice := queues[queue]; twice {
			f.add(name, fmt.Sprintf("names the queue %q twice", queue), example)
		}
		queues[queue] = n
	}
	return queues
}

// shownURL is a URL of which a password can be told from the rest: its scheme, user,
// password, hosts, path and query. A host may be missing before a path, where a parameter
// names a socket.
var shownURL = regexp.MustCompile(`^(?i:([a-z][a-z0-9+.-]*://)(?:([^:/?#@]*)(:[^/?#]*)?@)?` +
	`((?:[\w.%-]+|\[[\da-f:.%]+\])(?::\d+)?(?:,(?:[\w.%-]+|\[[\da-f:.%]+\])(?::\d+)?)*(?:/[^?#@]*)?|/[\w.-]*)` +
	`(?:\?([^#@]*))?)$`)

// shownParam matches the names of URL parameters whose values are no secrets: those of
// Postgres, of pgx and its pool, of Redis, and the client's certificates by their files.
var shownParam = regexp.MustCompile(`^(?i:ssl(mode|rootcert|cert|crl|sni|negotiation)|(fallback_)?application_name|` +
	`connect_timeout|target_session_attrs|host(addr)?|port|user|dbname|channel_binding|gssencmode|krbsrvname|` +
	`(min|max)_protocol_version|keepalives\w*|tcp_user_timeout|load_balance_hosts|client_encoding|search_path|timezone|` +
	`\w*_timeout|statement_cache_\w+|description_cache_\w+|default_query_exec_mode|default_transaction_\w+|` +
	`pool_\w+|master|db|protocol)$`)

// redactURL returns the URL as it may be shown: with *** for its password, and for the
// values of parameters that are not known to be harmless. All of a text is *** in which a
// password can't be told from the rest.
func redactURL(raw string) string {
	if raw == "" {
		return ""
	}
	part := shownURL.FindStringSubmatch(raw)
	if part == nil {
		return "***"
	}
	scheme, user, password, location, query := part[1], part[2], part[3], part[4], part[5]
	shown := scheme
	switch {
	case password != "":
		shown += user + ":***@"
	case user != "":
		shown += user + "@"
	}
	shown += location
	if query == "" {
		return shown
	}
	params := strings.Split(query, "&")
	for i, param := range params {
		name, value, named := strings.Cut(param, "=")
		switch {
		case !named:
			params[i] = "***"
		case !shownParam.MatchString(name) || strings.ContainsAny(value, "=;"):
			params[i] = name + "=***"
		}
	}
	return shown + "?" + strings.Join(params, "&")
}
