package dbpool

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/url"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/multitracer"
	"github.com/jackc/pgx/v5/pgxpool"
)

// Config has the settings of a pool. Start from [DefaultConfig], because the zero
// value is refused: it has no URL, no size and no timeouts.
type Config struct {
	// URL is a postgres:// URL, or key=value pairs, as pgx reads them. It is
	// required, and no error or log shows its password.
	URL string
	// Size is how many connections are kept open once they were needed, or
	// [Pool.Validate] was called. It must be at least 1.
	Size int
	// MaxOverflow is how many more may be open while callers wait. 0 is none.
	MaxOverflow int
	// OverflowIdle is how long a connection beyond Size stays open unused. 0
	// closes it within a second.
	OverflowIdle time.Duration
	// Timeout is the longest wait for a connection. It must be positive.
	Timeout time.Duration
	// Recycle is a connection's longest life, less up to a tenth of it at random,
	// so that connections opened together don't end together. 0 is for ever.
	Recycle time.Duration
	// PrePing has each connection checked before it is lent: by a look at its
	// socket, and by a ping if that leaves a doubt.
	PrePing bool
	// PingIdle is how long after the server's last answer a quiet socket is proof
	// enough of life. A connection that has been silent for longer is pinged,
	// because the network or the whole server may have vanished without a word. 0
	// pings before each loan.
	PingIdle time.Duration
	// PingTimeout bounds each ping. It must be positive.
	PingTimeout time.Duration
	// LeakAfter is how long a connection may be held before its holder is logged,
	// with the stack that acquired it. 0 is for ever.
	LeakAfter time.Duration
	// ThroughPooler is for a URL that leads to PgBouncer, or its like, in
	// transaction mode. It keeps pgx from preparing statements under names, because
	// the next transaction may run on a connection of the pooler's that lacks them.
	ThroughPooler bool
	// Echo logs each SQL statement at INFO, never its arguments.
	Echo bool
	// Logger takes the pool's log: leaks, and connections that could not be
	// replaced, at WARN. nil is [slog.Default].
	Logger *slog.Logger
	// AfterConnect prepares a new connection, such as by registering types on it.
	// Its error makes the attempt to connect fail. nil does nothing.
	AfterConnect func(context.Context, *pgx.Conn) error
	// Tracer is called by pgx for each statement, as the tracer of a pgx.Conn is;
	// what else it implements of pgx's tracers is called too. nil is none.
	Tracer pgx.QueryTracer
}

// DefaultConfig returns the settings of a SQLAlchemy QueuePool that served well, for
// the server at url: 5 connections, 5 more under load, 30 s of waiting, half an hour
// of life, checked before each loan. Beside those the overflow stays for 5 s, a
// connection is pinged after 1 s of silence and for up to 2 s, and its holder is
// logged after a minute.
func DefaultConfig(url string) Config {
	return Config{
		URL: url, Size: 5, MaxOverflow: 5, OverflowIdle: 5 * time.Second,
		Timeout: 30 * time.Second, Recycle: 30 * time.Minute,
		PrePing: true, PingIdle: time.Second, PingTimeout: 2 * time.Second, LeakAfter: time.Minute,
	}
}

// mostConnections is the largest max_connections that Postgres accepts.
const mostConnections = 262143

// Validate returns an error that names every fault of the configuration, nil if there
// is none. The error never shows the URL's password, nor what is behind its ?.
func (c Config) Validate() error {
	var faults []string
	if _, err := c.parseURL(); err != nil {
		faults = append(faults, err.Error())
	}
	if c.Size < 1 {
		faults = append(faults, fmt.Sprintf("Size is %d; set at least 1, or start from DefaultConfig", c.Size))
	}
	if c.MaxOverflow < 0 {
		faults = append(faults, fmt.Sprintf("MaxOverflow is %d; set 0 for none", c.MaxOverflow))
	}
	if c.Size > mostConnections || c.MaxOverflow > mostConnections-c.Size {
		faults = append(faults, fmt.Sprintf("Size %d and MaxOverflow %d are more together than any server takes; set at most %d", c.Size, c.MaxOverflow, mostConnections))
	}
	for _, d := range []struct {
		name    string
		value   time.Duration
		atLeast time.Duration
	}{
		{"Timeout", c.Timeout, 1},
		{"PingTimeout", c.PingTimeout, 1},
		{"PingIdle", c.PingIdle, 0},
		{"OverflowIdle", c.OverflowIdle, 0},
		{"Recycle", c.Recycle, 0},
		{"LeakAfter", c.LeakAfter, 0},
	} {
		if d.value < d.atLeast {
			faults = append(faults, fmt.Sprintf("%s is %s; set a positive time, or start from DefaultConfig", d.name, d.value))
		}
	}
	if len(faults) == 0 {
		return nil
	}
	return errors.New("dbpool: " + strings.Join(faults, "; "))
}

// wantURL ends the text of each error about the URL.
const wantURL = "want postgres://user:password@host:5432/name, with special characters in the password %-encoded"

// parseURL reads the URL. Its errors never show it.
func (c Config) parseURL() (*pgxpool.Config, error) {
	if c.URL == "" {
		return nil, errors.New("the URL is empty; want postgres://user:password@host:5432/name")
	}
	password, rest := splitURL(c.URL)
	if strings.Contains(rest, "@") {
		// pgx takes the password to end at the first @. Each error of connecting
		// would show the rest of it, as the name of a host or database.
		return nil, errors.New("the URL has an @ behind the user and password; " + wantURL)
	}
	cfg, err := pgxpool.ParseConfig(c.URL)
	if err == nil {
		return cfg, nil
	}
	// pgx's error repeats the URL, and hides a password only where it finds one.
	// The part behind the URL says which setting is wrong.
	decoded, undecodable := url.PathUnescape(password)
	_, reason, ok := strings.Cut(err.Error(), "`: ")
	reason = withoutQuery(reason, c.URL)
	if !ok || rest == "" || undecodable != nil || strings.Contains(c.URL, "password=") || decoded != "" && strings.Contains(reason, decoded) {
		return nil, errors.New("the URL can't be read; " + wantURL)
	}
	return nil, fmt.Errorf("the URL has a wrong setting: %s", reason)
}

// withoutQuery returns pgx's reason why a URL is wrong without what the URL has behind its ?,
// which may hold secrets as well. pgx names the setting first, and then, behind a colon or
// in parentheses, its value in many forms.
func withoutQuery(reason, rawURL string) string {
	_, query, ok := strings.Cut(rawURL, "?")
	if !ok {
		return reason
	}
	for param := range strings.SplitSeq(query, "&") {
		if name, _, named := strings.Cut(param, "="); !named || name == "" {
			return "a parameter behind the ? is not name=value"
		}
	}
	if end := strings.IndexAny(reason, ":("); end >= 0 {
		reason = strings.TrimSpace(reason[:end])
	}
	if strings.HasSuffix(reason, "configure TLS") {
		reason += "; sslmode is unknown, or a file that an ssl parameter names can't be used"
	}
	return reason
}

// splitURL returns the password of a URL, still encoded, and the hosts with the path,
// by the rules by which pgx splits it. Both are empty if u is no URL.
func splitURL(u string) (password, hostsAndPath string) {
	scheme, rest, _ := strings.Cut(u, "://")
	if scheme != "postgres" && scheme != "postgresql" {
		return "", ""
	}
	if i := strings.IndexAny(rest, "@/"); i >= 0 && rest[i] == '@' {
		_, password, _ = strings.Cut(rest[:i], ":")
		rest = rest[i+1:]
	}
	hostsAndPath, _, _ = strings.Cut(rest, "?")
	return password, hostsAndPath
}

// The kernel closes a connection to a host that has vanished after these times:
// after keepAliveIdle and keepAliveCount probes if it is idle or waits for an answer,
// after userTimeout if what it sent stays unacknowledged.
const (
	keepAliveIdle     = 15 * time.Second
	keepAliveInterval = 5 * time.Second
	keepAliveCount    = 3
	userTimeout       = 20 * time.Second
)

// mostConnectTimeout is the longest that one attempt to connect may take, unless the
// URL has a connect_timeout.
const mostConnectTimeout = 5 * time.Second

// pgxConfig returns the configuration of the pgxpool that opens the connections.
func (p *Pool) pgxConfig() (*pgxpool.Config, error) {
	cfg, err := p.cfg.parseURL()
	if err != nil {
		return nil, err
	}
	// pgxpool's own upkeep is turned off, because this pool decides which
	// connection is idle, checked or closed, and pgxpool only opens them.
	const never = 100 * 365 * 24 * time.Hour
	cfg.MaxConns = int32(p.cfg.Size + p.cfg.MaxOverflow)
	cfg.MinConns, cfg.MinIdleConns = 0, 0
	cfg.MaxConnLifetime, cfg.MaxConnLifetimeJitter = never, 0
	cfg.MaxConnIdleTime, cfg.HealthCheckPeriod = never, never
	cfg.ShouldPing = func(context.Context, pgxpool.ShouldPingParams) bool { return false }
	cfg.AfterConnect = func(ctx context.Context, pgxConn *pgx.Conn) error {
		pgxConn.PgConn().CustomData()[customDataKey] = ctx.Value(connKey{})
		socketOf(pgxConn.PgConn()).opened(pgxConn.PgConn())
		if p.cfg.AfterConnect == nil {
			return nil
		}
		return p.cfg.AfterConnect(ctx, pgxConn)
	}
	cfg.ConnConfig.Tracer = tracer{p}
	if p.cfg.Tracer != nil {
		cfg.ConnConfig.Tracer = multitracer.New(tracer{p}, p.cfg.Tracer)
	}
	cfg.ConnConfig.DialFunc = p.sockets.dial
	if p.cfg.ThroughPooler {
		cfg.ConnConfig.DefaultQueryExecMode = pgx.QueryExecModeCacheDescribe
		cfg.ConnConfig.StatementCacheCapacity = 0
	}
	if cfg.ConnConfig.ConnectTimeout <= 0 {
		// A third of the wait, because an attempt that hangs must leave time for
		// another.
		cfg.ConnConfig.ConnectTimeout = min(p.cfg.Timeout/3+time.Millisecond, mostConnectTimeout)
	}
	// A role's or a database's own encoding would change text on its way, because Go's is
	// UTF-8.
	cfg.ConnConfig.RuntimeParams["client_encoding"] = "UTF8"
	if cfg.ConnConfig.RuntimeParams["application_name"] == "" {
		cfg.ConnConfig.RuntimeParams["application_name"] = "carpool"
	}
	return cfg, nil
}
