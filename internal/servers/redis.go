package servers

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/url"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

// RedisConfig says how a Redis is to be started. The zero value is one without persistence on a free port.
type RedisConfig struct {
	// Dir holds the append-only file and is kept. Empty: a temporary folder, removed by Stop.
	Dir string
	// Port on 127.0.0.1; 0 picks a free one.
	Port int
	// AppendFsync is "always" or "everysec": the data outlives Kill and Restart, and the server if Dir is set. Empty: it
	// does not.
	AppendFsync string
	// ReplicaOf is the server that this one copies; its start returns when it has a copy. Both have one password, and both
	// have TLS or neither. Nil: none.
	ReplicaOf *Redis
	// TLS has the server speak TLS on a port of its own too (TLSURL), with a certificate for localhost and 127.0.0.1 (CAFile),
	// which is also what it takes from clients and wants of them.
	TLS bool
	// Users are further users than the default one, each a name and its rules as ACL SETUSER takes them. They outlive
	// Restart, which users made by ACL SETUSER don't.
	Users []string
	// Log receives what the server prints. Nil: only the end of it is kept, for errors.
	Log io.Writer

	cluster string // the password of the servers of a Redis Cluster; "" for a server by itself
}

// RedisDatabases is how many logical databases a started Redis has: /0 up to one less than this.
const RedisDatabases = 4096

// Redis is a running redis-server, or its twin valkey-server.
type Redis struct {
	cfg      RedisConfig
	program  string
	home     *home
	password string
	port     int
	busPort  int // on which the servers of a Redis Cluster talk
	tlsPort  int
	sentinel *sentinel // nil: it is a server of data

	mu      sync.Mutex // guards what follows
	server  *process
	stopped bool
}

// StartRedis starts redis-server or valkey-server from PATH and returns when it takes commands. The context bounds the
// start alone: the server runs until Stop. A start that fails leaves Dir as it was. An error that is ErrNotFound names what
// to install.
func StartRedis(ctx context.Context, cfg RedisConfig) (*Redis, error) {
	r, err := startRedis(ctx, cfg, exec.LookPath)
	if err != nil {
		return nil, fmt.Errorf("servers: start Redis: %w", err)
	}
	return r, nil
}

func startRedis(ctx context.Context, cfg RedisConfig, lookPath func(string) (string, error)) (*Redis, error) {
	if f := cfg.AppendFsync; f != "" && f != "always" && f != "everysec" {
		return nil, fmt.Errorf(`AppendFsync is %q; it must be "", "always" or "everysec"`, f)
	}
	r := &Redis{cfg: cfg, password: newPassword()}
	if cfg.ReplicaOf != nil {
		r.password = cfg.ReplicaOf.password
	}
	if cfg.cluster != "" {
		r.password = cfg.cluster
	}
	return r, r.startAtHome(ctx, lookPath)
}

// startAtHome finds the program, and starts it for the first time.
func (r *Redis) startAtHome(ctx context.Context, lookPath func(string) (string, error)) (err error) {
	if r.program, err = lookPath("redis-server"); err != nil {
		if r.program, err = lookPath("valkey-server"); err != nil {
			return fmt.Errorf("redis-server %w on PATH, nor valkey-server; "+
				"install one (Debian: apt-get install redis-server; macOS: brew install redis)", ErrNotFound)
		}
	}
	if r.home, err = newHome(r.cfg.Dir, temporaryRoot(), "carpool-redis-"); err != nil {
		return err
	}
	if r.cfg.TLS && r.elder() == nil {
		if err := WriteCertificate(r.CAFile(), r.KeyFile(), Certificate{}); err != nil {
			return errors.Join(err, r.home.abandon())
		}
	}
	err = onSomePort(r.cfg.Port, func(port int) (err error) {
		r.port = port
		if r.cfg.TLS {
			if r.tlsPort, err = FreePort(); err != nil {
				return err
			}
		}
		if r.cfg.cluster != "" {
			if r.busPort, err = FreePort(); err != nil {
				return err
			}
		}
		return r.start(ctx)
	})
	if err != nil {
		return errors.Join(err, r.home.abandon())
	}
	return nil
}

// config is the server's configuration. It goes to standard input, since everybody can read a command line.
func (r *Redis) config() string {
	lines := []string{
		"bind 127.0.0.1",
		"port " + strconv.Itoa(r.port),
		"requirepass " + r.password,
		"masterauth " + r.password,
		"databases " + strconv.Itoa(RedisDatabases),
		"dir " + strconv.Quote(r.home.dir),
		`save ""`,
		"maxmemory-policy noeviction",
		"daemonize no",
		"repl-diskless-sync-delay 0", // a replica waits for no other
	}
	for _, user := range r.cfg.Users {
		lines = append(lines, "user "+user)
	}
	if master := r.cfg.ReplicaOf; master != nil {
		lines = append(lines, "replicaof 127.0.0.1 "+strconv.Itoa(master.replicationPort()))
	}
	if r.cfg.cluster != "" {
		lines = append(lines, "cluster-enabled yes", "cluster-port "+strconv.Itoa(r.busPort), "cluster-node-timeout 1000")
	}
	lines = append(lines, r.tls()...)
	if r.cfg.AppendFsync == "" {
		lines = append(lines, "appendonly no")
	} else {
		lines = append(lines, "appendonly yes", "appendfsync "+r.cfg.AppendFsync)
	}
	return strings.Join(lines, "\n") + "\n"
}

// tls are the lines of the configuration that have it speak TLS, with clients and with its like.
func (r *Redis) tls() []string {
	if !r.cfg.TLS {
		return nil
	}
	return []string{
		"tls-port " + strconv.Itoa(r.tlsPort), "tls-cert-file " + strconv.Quote(r.CAFile()), "tls-key-file " + strconv.Quote(r.KeyFile()),
		"tls-ca-cert-file " + strconv.Quote(r.CAFile()), "tls-auth-clients yes", "tls-replication yes",
	}
}

// replicationPort is the port that its replicas and sentinels go to.
func (r *Redis) replicationPort() int {
	if r.cfg.TLS {
		return r.tlsPort
	}
	return r.port
}

// elder is the server whose certificate this one has too; nil if it has its own.
func (r *Redis) elder() *Redis {
	if r.sentinel != nil {
		return r.sentinel.master
	}
	return r.cfg.ReplicaOf
}

func (r *Redis) start(ctx context.Context) error {
	cmd, err := r.command()
	if err != nil {
		return err
	}
	cmd.Dir = r.home.dir
	server, err := startProcess(cmd, "redis-server", r.cfg.Log, syscall.SIGTERM)
	if err != nil {
		return err
	}
	r.home.dog.watch(server.pid())
	if err := server.until(ctx, r.isReady(ctx)); err != nil {
		server.stop(stopGrace, syscall.SIGTERM)
		r.home.dog.watch(0)
		return portTaken(err, r.port, "Address already in use")
	}
	r.server = server
	return nil
}

func (r *Redis) command() (*exec.Cmd, error) {
	if r.sentinel != nil {
		return r.sentinel.command(r)
	}
	cmd := exec.Command(r.program, "-")
	cmd.Stdin = strings.NewReader(r.config())
	return cmd, nil
}

// isReady asks for a sign of life that only a server which has loaded its data gives, and only ours: it needs the password.
// A replica has a copy of its master's data then.
func (r *Redis) isReady(ctx context.Context) func() bool {
	if r.cfg.ReplicaOf != nil {
		return r.says(ctx, "INFO replication", "master_link_status:up")
	}
	return r.says(ctx, "PING", "+OK\r\n+PONG\r\n")
}

// says sends a command, and reports whether the text comes up in the answer.
func (r *Redis) says(ctx context.Context, command, text string) func() bool {
	return func() bool {
		conn, err := (&net.Dialer{}).DialContext(ctx, "tcp", r.addr())
		if err != nil {
			return false
		}
		defer conn.Close()
		_ = conn.SetDeadline(time.Now().Add(time.Second))
		if _, err := fmt.Fprintf(conn, "AUTH %s\r\n%s\r\n", r.password, command); err != nil {
			return false
		}
		var answer strings.Builder
		for part := make([]byte, 4096); !strings.Contains(answer.String(), text); {
			n, err := conn.Read(part)
			if err != nil {
				return false
			}
			answer.Write(part[:n])
		}
		return true
	}
}

// CAFile is the certificate to trust, and KeyFile its key, in PEM. They exist if the server was started with TLS, which asks
// clients for a certificate of the same authority, as this one is. A replica and a sentinel have their master's.
func (r *Redis) CAFile() string { return r.certificate("server.crt") }

// KeyFile is the key of CAFile.
func (r *Redis) KeyFile() string { return r.certificate("server.key") }

func (r *Redis) certificate(file string) string {
	if elder := r.elder(); elder != nil {
		return elder.certificate(file)
	}
	return filepath.Join(r.home.dir, file)
}

// TLSURL leads to database 0 over TLS, without the files that a client needs.
func (r *Redis) TLSURL() string {
	u := url.URL{Scheme: "rediss", User: url.UserPassword("", r.password), Host: r.tlsAddr(), Path: "/0"}
	return u.String()
}

func (r *Redis) tlsAddr() string { return net.JoinHostPort("127.0.0.1", strconv.Itoa(r.tlsPort)) }

func (r *Redis) addr() string { return net.JoinHostPort("127.0.0.1", strconv.Itoa(r.port)) }

// URL leads to the server's database 0.
func (r *Redis) URL() string { return r.DatabaseURL(0) }

// DatabaseURL leads to the server's nth logical database, 0 up to RedisDatabases-1. Channels of Pub/Sub are common to all
// of them.
func (r *Redis) DatabaseURL(n int) string {
	u := url.URL{
		Scheme: "redis", User: url.UserPassword("", r.password),
		Host: r.addr(), Path: "/" + strconv.Itoa(n),
	}
	return u.String()
}

// Kill ends the server with SIGKILL, as a crash does. Restart brings it back.
func (r *Redis) Kill() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.kill()
}

func (r *Redis) kill() {
	r.server.stop(stopGrace)
	<-r.server.done
	r.home.dog.watch(0)
}

// Restart kills the server, if it still runs, and starts it again on the same port. What was not persisted is lost.
func (r *Redis) Restart(ctx context.Context) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.stopped {
		return errors.New("servers: restart Redis: it has been stopped")
	}
	r.kill()
	if err := r.start(ctx); err != nil {
		return fmt.Errorf("servers: restart Redis: %w", err)
	}
	return nil
}

// Pause freezes the server (SIGSTOP): connections stay open and nothing answers.
func (r *Redis) Pause() error { return r.send("pause", sigStop) }

// Resume ends a Pause.
func (r *Redis) Resume() error { return r.send("resume", sigCont) }

func (r *Redis) send(what string, s syscall.Signal) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.server.ended() {
		return fmt.Errorf("servers: %s Redis: it does not run", what)
	}
	if err := kill(r.server.pid(), s); err != nil {
		return fmt.Errorf("servers: %s Redis: %w", what, err)
	}
	return nil
}

// Stop ends the server and removes its files, if they are temporary. Stopping twice is safe.
func (r *Redis) Stop() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.stopped {
		return nil
	}
	r.stopped = true
	if !r.home.temporary {
		// A frozen server hears nothing but SIGCONT.
		if !r.server.ended() {
			_ = kill(r.server.pid(), sigCont)
		}
		r.server.stop(stopGrace, syscall.SIGTERM)
	}
	r.kill()
	if err := r.home.close(); err != nil {
		return fmt.Errorf("servers: stop Redis: %w", err)
	}
	return nil
}

// stopAll stops servers in this order.
func stopAll(list ...*Redis) error {
	var errs []error
	for _, r := range list {
		errs = append(errs, r.Stop())
	}
	return errors.Join(errs...)
}

// addrs are the addresses of servers, separated by commas.
func addrs(list []*Redis) string {
	hosts := make([]string, len(list))
	for i, r := range list {
		hosts[i] = r.addr()
	}
	return strings.Join(hosts, ",")
}
