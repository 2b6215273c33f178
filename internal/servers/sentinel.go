package servers

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
)

// RedisTrio is a Redis, a replica of it, and three sentinels that put the one in the place of the other when it is away.
type RedisTrio struct {
	// Servers are the two that hold data: first the one that is the master at the start.
	Servers []*Redis
	// Sentinels are the three. Kill, Pause and Restart work as those of a server do.
	Sentinels []*Redis
}

const (
	sentinelQuorum = 2
	trioMaster     = "carpool"
)

// StartRedisTrio starts the five of them on free ports, all with one password, and returns when the sentinels know the
// replica and each other. With TLS all of them have one certificate, and speak TLS among themselves. A master is away when
// it has given no answer for a second. cfg is that of the servers; its Dir and Port must not be set. The context bounds the
// start alone.
func StartRedisTrio(ctx context.Context, cfg RedisConfig) (trio *RedisTrio, err error) {
	if cfg.Dir != "" || cfg.Port != 0 || cfg.ReplicaOf != nil {
		return nil, errors.New("servers: start Redis with sentinels: Dir, Port and ReplicaOf must not be set")
	}
	trio = new(RedisTrio)
	defer func() {
		if err != nil {
			trio, err = nil, errors.Join(err, trio.Stop())
		}
	}()
	for range 2 {
		r, err := StartRedis(ctx, cfg)
		if err != nil {
			return nil, err
		}
		trio.Servers = append(trio.Servers, r)
		cfg.ReplicaOf = trio.Servers[0]
	}
	for range 3 {
		r := &Redis{cfg: RedisConfig{TLS: cfg.TLS, Log: cfg.Log}, password: trio.Servers[0].password, sentinel: &sentinel{trio.Servers[0]}}
		if err := r.startAtHome(ctx, exec.LookPath); err != nil {
			return nil, fmt.Errorf("servers: start a sentinel: %w", err)
		}
		trio.Sentinels = append(trio.Sentinels, r)
	}
	for _, r := range trio.Sentinels {
		if err := r.server.until(ctx, r.says(ctx, "INFO sentinel", "slaves=1,sentinels=3")); err != nil {
			return nil, fmt.Errorf("servers: start Redis with sentinels: %w", err)
		}
	}
	return trio, nil
}

// URL leads to database 0 of the master by the sentinels, as tasks.OpenRedis takes it.
func (t *RedisTrio) URL() string { return t.url("redis-sentinel", addrs(t.Sentinels)) }

// TLSURL is URL over TLS, without the files that a client needs: CAFile and KeyFile of the servers.
func (t *RedisTrio) TLSURL() string {
	var hosts []string
	for _, r := range t.Sentinels {
		hosts = append(hosts, r.tlsAddr())
	}
	return t.url("rediss-sentinel", strings.Join(hosts, ","))
}

func (t *RedisTrio) url(scheme, hosts string) string {
	u := url.URL{
		Scheme: scheme, User: url.UserPassword("", t.Servers[0].password),
		Host: hosts, Path: "/0", RawQuery: "master=" + trioMaster,
	}
	return u.String()
}

// Stop ends all five and removes their files. Stopping twice is safe.
func (t *RedisTrio) Stop() error {
	return errors.Join(stopAll(t.Sentinels...), stopAll(t.Servers...)) // the other way round they would see a failure
}

// sentinel is what makes a redis-server one.
type sentinel struct{ master *Redis }

// command writes the configuration to a file that only we can read, because a sentinel writes to it what it learns. A
// sentinel that is started again begins with what it has learnt.
func (s *sentinel) command(r *Redis) (*exec.Cmd, error) {
	file := filepath.Join(r.home.dir, "sentinel-"+strconv.Itoa(r.port)+".conf")
	if _, err := os.Lstat(file); errors.Is(err, os.ErrNotExist) {
		lines := []string{
			"bind 127.0.0.1",
			"port " + strconv.Itoa(r.port),
			"dir " + strconv.Quote(r.home.dir),
			"requirepass " + r.password,
			"sentinel sentinel-pass " + r.password,
			fmt.Sprintf("sentinel monitor %s 127.0.0.1 %d %d", trioMaster, s.master.replicationPort(), sentinelQuorum),
			"sentinel auth-pass " + trioMaster + " " + r.password,
			"sentinel down-after-milliseconds " + trioMaster + " 1000",
			"sentinel failover-timeout " + trioMaster + " 5000",
		}
		lines = append(lines, r.tls()...)
		if err := os.WriteFile(file, []byte(strings.Join(lines, "\n")+"\n"), 0o600); err != nil {
			return nil, fmt.Errorf("write the sentinel's configuration: %w", err)
		}
	}
	return exec.Command(r.program, file, "--sentinel"), nil
}
