// Package dbpool is a pool of Postgres connections, on pgx's pgxpool, that lends
// no dead connection and tells what it does.
//
// It has the settings of SQLAlchemy's QueuePool: a size that is kept, an overflow
// for load, a bounded wait, recycling, and a check before each loan.
package dbpool

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/url"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/multitracer"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"
)

// Config says how a pool is made. Begin with [DefaultConfig]: the zero value has
// no URL and no size, and is refused.
type Config struct {
	// URL is a postgres:// URL, or key=value pairs, as pgx reads them. Required.
	URL string
	// Size is how many connections are kept; at least 1.
	Size int
	// MaxOverflow is how many more may be open under load; 0 is none.
	MaxOverflow int
	// OverflowIdle is how long a connection beyond Size stays open unused; 0
	// closes it within a second.
	OverflowIdle time.Duration
	// Timeout is the longest wait for a connection; it must be positive.
	Timeout time.Duration
	// Recycle is a connection's longest life, less up to a tenth of it at
	// random; 0 is for ever.
	Recycle time.Duration
	// PrePing checks each connection before it is lent: it looks at the socket,
	// and pings where that can't be enough.
	PrePing bool
	// PingIdle is how long a connection may have shown no sign of life before a
	// quiet socket is no longer proof enough, and it is pinged: the network, or
	// the whole server, may have gone without a word. 0 pings before each loan.
	PingIdle time.Duration
	// PingTimeout bounds each ping; it must be positive.
	PingTimeout time.Duration
	// LeakAfter is how long a connection may be out before its holder is logged;
	// 0 is for ever.
	LeakAfter time.Duration
	// ThroughPooler is for a URL that leads to PgBouncer, or its like, in
	// transaction mode: statements are not prepared under names, which the next
	// transaction would not find on another of the pooler's connections.
	ThroughPooler bool
	// Echo logs each SQL statement at INFO, never its arguments.
	Echo bool
	// Logger takes what the pool logs; nil is [slog.Default].
	Logger *slog.Logger
	// AfterConnect prepares a new connection, such as by registering types on
	// it; nil for nothing. Its error is one of connecting.
	AfterConnect func(context.Context, *pgx.Conn) error
	// Tracer sees what happens on the connections too, as pgx calls it: for
	// traces, say. nil for none.
	Tracer pgx.QueryTracer
}

// DefaultConfig has the numbers of a SQLAlchemy QueuePool that served well: 5
// connections, 5 more under load, 30 s of waiting, half an hour of life, checked
// before each loan.
func DefaultConfig(url string) Config {
	return Config{
		URL: url, Size: 5, MaxOverflow: 5, OverflowIdle: 5 * time.Second,
		Timeout: 30 * time.Second, Recycle: 30 * time.Minute,
		PrePing: true, PingIdle: time.Second, PingTimeout: 2 * time.Second, LeakAfter: time.Minute,
	}
}

// mostConnections is the largest max_connections that Postgres takes.
const mostConnections = 262143

// Validate names every fault of the configuration. The error never shows the
// URL, which may hold a password.
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

// wantURL ends each complaint about a URL.
const wantURL = "want postgres://user:password@host:5432/name, with special characters in the password %-encoded"

func (c Config) parseURL() (*pgxpool.Config, error) {
	if c.URL == "" {
		return nil, errors.New("the URL is empty; want postgres://user:password@host:5432/name")
	}
	password, rest := splitURL(c.URL)
	if strings.Contains(rest, "@") {
		// What pgx takes for the password ends too early. The rest of it would
		// stand in each error of connecting, as the name of a host or database.
		return nil, errors.New("the URL has an @ behind the user and password; " + wantURL)
	}
	cfg, err := pgxpool.ParseConfig(c.URL)
	if err == nil {
		return cfg, nil
	}
	// pgx repeats the URL, and hides a password only where it finds it. Behind
	// that it says which setting is wrong.
	decoded, undecodable := url.PathUnescape(password)
	_, reason, ok := strings.Cut(err.Error(), "`: ")
	if !ok || rest == "" || undecodable != nil || strings.Contains(c.URL, "password=") || decoded != "" && strings.Contains(reason, decoded) {
		return nil, errors.New("the URL can't be read; " + wantURL)
	}
	return nil, fmt.Errorf("the URL has a wrong setting: %s", reason)
}

// splitURL returns the password of a URL, as it stands there, and the hosts and
// the path, by the rules that pgx splits it by. Of what is no URL, both are
// empty.
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

const (
	// A connection to a host that has vanished is found out by the kernel after
	// these, whether it is idle or waits for an answer.
	keepAliveIdle     = 15 * time.Second
	keepAliveInterval = 5 * time.Second
	keepAliveCount    = 3
	userTimeout       = 20 * time.Second
)

// mostConnectTimeout bounds one attempt to connect, unless the URL's
// connect_timeout does.
const mostConnectTimeout = 5 * time.Second

func (p *Pool) pgxConfig() (*pgxpool.Config, error) {
	cfg, err := p.cfg.parseURL()
	if err != nil {
		return nil, err
	}
	// pgxpool connects and keeps count; what is idle, who waits and what is
	// checked when is decided here. So its own clockwork is off.
	const never = 100 * 365 * 24 * time.Hour
	cfg.MaxConns = int32(p.cfg.Size + p.cfg.MaxOverflow)
	cfg.MinConns, cfg.MinIdleConns = 0, 0
	cfg.MaxConnLifetime, cfg.MaxConnLifetimeJitter = never, 0
	cfg.MaxConnIdleTime, cfg.HealthCheckPeriod = never, never
	cfg.ShouldPing = func(context.Context, pgxpool.ShouldPingParams) bool { return false }
	cfg.BeforeConnect = func(_ context.Context, c *pgx.ConnConfig) error {
		born := p.deaths.Load()
		then := c.AfterConnect
		c.AfterConnect = func(ctx context.Context, pg *pgconn.PgConn) error {
			if then != nil {
				if err := then(ctx, pg); err != nil {
					return err
				}
			}
			pg.CustomData()[memberKey] = &member{pool: p, proven: born}
			return nil
		}
		return nil
	}
	cfg.AfterConnect = p.cfg.AfterConnect
	cfg.ConnConfig.Tracer = tracer{p}
	if p.cfg.Tracer != nil {
		cfg.ConnConfig.Tracer = multitracer.New(tracer{p}, p.cfg.Tracer)
	}
	p.sockets.dialer = net.Dialer{
		KeepAliveConfig: net.KeepAliveConfig{Enable: true, Idle: keepAliveIdle, Interval: keepAliveInterval, Count: keepAliveCount},
		Control:         setUserTimeout,
	}
	cfg.ConnConfig.DialFunc = p.sockets.dial
	if p.cfg.ThroughPooler {
		cfg.ConnConfig.DefaultQueryExecMode = pgx.QueryExecModeCacheDescribe
		cfg.ConnConfig.StatementCacheCapacity = 0
	}
	if cfg.ConnConfig.ConnectTimeout <= 0 {
		// A connection that hangs must leave time for another try.
		cfg.ConnConfig.ConnectTimeout = min(p.cfg.Timeout/3+time.Millisecond, mostConnectTimeout)
	}
	if cfg.ConnConfig.RuntimeParams["application_name"] == "" {
		cfg.ConnConfig.RuntimeParams["application_name"] = "carpool"
	}
	return cfg, nil
}
