package servers

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/jackc/pgx/v5"
)

// PostgresConfig says how a Postgres is to be started. The zero value is a quick, temporary one on a free port.
type PostgresConfig struct {
	// Dir holds the server's files and is kept. Empty: a temporary folder, removed by Stop.
	Dir string
	// Port on 127.0.0.1; 0 picks a free one.
	Port int
	// Durable leaves fsync on. Off, the default, a crash of the machine may cost the data; a crash of the server may not.
	Durable bool
	// TLS has the server speak TLS too, with a certificate of its own for localhost and 127.0.0.1 (CAFile).
	TLS bool
	// Settings are further ones, as in postgresql.conf. They win over those made here.
	Settings map[string]string
	// Install has apt-get install Postgres where it is not on this machine and cannot be downloaded. Only root may, and where
	// there is no apt-get nothing is installed.
	Install bool
	// Log receives what initdb and the server print, and before it a line that begins with "downloading" or "installing" if
	// Postgres has to be fetched. Nil: only the end of it is kept, for errors.
	Log io.Writer
}

// Postgres is a running Postgres server.
type Postgres struct {
	cfg      PostgresConfig
	programs programs
	identity identity
	home     *home
	password string
	port     int
	primary  *Postgres // what a standby is a copy of; nil for others

	mu      sync.Mutex // guards what follows
	server  *process
	paused  []int // processes that Pause stopped
	stopped bool
}

// StartPostgres starts a server and returns when it takes connections. The context bounds the start alone: the server runs
// until Stop. A start that fails leaves Dir as it was. An error that is ErrNotFound names what to install.
func StartPostgres(ctx context.Context, cfg PostgresConfig) (*Postgres, error) {
	pg, err := startPostgres(ctx, cfg, newPostgresFinder(cfg.Install), identities())
	if err != nil {
		return nil, fmt.Errorf("servers: start Postgres: %w", err)
	}
	return pg, nil
}

func startPostgres(ctx context.Context, cfg PostgresConfig, finder postgresFinder, candidates []identity) (*Postgres, error) {
	programs, err := finder.find(ctx, cfg.Log)
	if err != nil {
		return nil, err
	}
	pg := &Postgres{cfg: cfg, programs: programs}
	if err := pg.launch(ctx, candidates); err != nil {
		return nil, err
	}
	return pg, nil
}

// launch makes the server's folder and starts the server in it.
func (p *Postgres) launch(ctx context.Context, candidates []identity) (err error) {
	if p.home, err = newHome(p.cfg.Dir, temporaryRoot(), "carpool-pg-"); err != nil {
		return err
	}
	if err = p.prepare(ctx, candidates); err == nil {
		err = onSomePort(p.cfg.Port, func(port int) error {
			p.port = port
			return p.start(ctx)
		})
	}
	if err != nil {
		return errors.Join(err, p.home.abandon())
	}
	return nil
}

func (p *Postgres) dataDir() string      { return filepath.Join(p.home.dir, "data") }
func (p *Postgres) passwordFile() string { return filepath.Join(p.home.dir, "password") }
func (p *Postgres) keyFile() string      { return filepath.Join(p.home.dir, "server.key") }

// CAFile is the certificate to trust (sslrootcert), in PEM. It exists if the server was started with TLS.
func (p *Postgres) CAFile() string { return filepath.Join(p.home.dir, "server.crt") }

// prepare makes the files of a new server, or takes over those of an earlier one.
func (p *Postgres) prepare(ctx context.Context, candidates []identity) error {
	if p.cfg.TLS {
		if err := WriteCertificate(p.CAFile(), p.keyFile(), Certificate{}); err != nil {
			return err
		}
	}
	_, err := os.Stat(p.dataDir())
	isNew := errors.Is(err, os.ErrNotExist)
	if isNew {
		p.password = newPassword()
		if p.primary != nil {
			p.password = p.primary.password
		}
		if err := os.WriteFile(p.passwordFile(), []byte(p.password+"\n"), 0o600); err != nil {
			return err
		}
	} else {
		written, err := os.ReadFile(p.passwordFile())
		if err != nil {
			return fmt.Errorf("the password of the kept server: %w", err)
		}
		p.password = strings.TrimSpace(string(written))
	}
	if p.identity, err = chooseIdentity(ctx, p.programs.postgres, p.home.dir, candidates); err != nil {
		return err
	}
	switch {
	case !isNew:
		return nil
	case p.primary != nil:
		return p.makeData(ctx, p.copyPrimary)
	default:
		return p.makeData(ctx, p.initdb)
	}
}

// makeData has fill make the data folder. It gets its name when it is whole, so that one that was cut off is never taken for
// it.
func (p *Postgres) makeData(ctx context.Context, fill func(ctx context.Context, dir string) error) error {
	unfinished := p.dataDir() + ".new"
	if err := os.RemoveAll(unfinished); err != nil {
		return err
	}
	if err := fill(ctx, unfinished); err != nil {
		return fmt.Errorf("%s: %w", p.identity.name, err)
	}
	return os.Rename(unfinished, p.dataDir())
}

func (p *Postgres) initdb(ctx context.Context, dir string) error {
	args := []string{
		"--pgdata", dir, "--username", "postgres", "--pwfile", p.passwordFile(),
		"--auth", "scram-sha-256", "--encoding", "UTF8", "--no-locale",
	}
	if !p.cfg.Durable {
		args = append(args, "--no-sync")
	}
	cmd := p.identity.command(p.home.dir, p.programs.initdb, args...)
	cmd.Env = cleanEnv()
	return run(ctx, cmd, "initdb", p.cfg.Log, p.home.dog.watch)
}

// cleanEnv is our environment without what would lead Postgres's own programs astray.
func cleanEnv() []string {
	return slices.DeleteFunc(os.Environ(), func(v string) bool { return strings.HasPrefix(v, "PG") })
}

// settings are those of the command line, which win over the data folder's own.
func (p *Postgres) settings() map[string]string {
	s := map[string]string{
		"listen_addresses":        "127.0.0.1",
		"unix_socket_directories": "", // a socket's path has about 100 bytes, and TCP serves
		"log_destination":         "stderr",
		"logging_collector":       "off",
	}
	if !p.cfg.Durable {
		// synchronous_commit stays on: what was committed must outlive Restart("immediate").
		maps.Copy(s, map[string]string{"fsync": "off", "full_page_writes": "off"})
	}
	if p.cfg.TLS {
		maps.Copy(s, map[string]string{"ssl": "on", "ssl_cert_file": p.CAFile(), "ssl_key_file": p.keyFile()})
	}
	maps.Copy(s, p.cfg.Settings)
	return s
}

// start runs the server and waits until it takes connections.
func (p *Postgres) start(ctx context.Context) error {
	args := []string{"-D", p.dataDir(), "-p", strconv.Itoa(p.port)}
	settings := p.settings()
	for _, name := range slices.Sorted(maps.Keys(settings)) {
		args = append(args, "-c", name+"="+settings[name])
	}
	cmd := p.identity.command(p.home.dir, p.programs.postgres, args...)
	cmd.Env = cleanEnv()
	// SIGINT is the fast shutdown: sessions are ended, files are left in order.
	server, err := startProcess(cmd, "postgres", p.cfg.Log, syscall.SIGINT)
	if err != nil {
		return err
	}
	p.home.dog.watch(server.pid())
	if err := server.until(ctx, func() bool { return p.isReady(server.pid()) }); err != nil {
		server.stop(stopGrace, syscall.SIGQUIT)
		p.home.dog.watch(0)
		return portTaken(err, p.port, "could not bind")
	}
	p.server = server
	return nil
}

// isReady reads what the server says of itself in its lock file: its pid in line 1, "ready" in line 8, as pg_ctl does.
func (p *Postgres) isReady(pid int) bool {
	b, err := os.ReadFile(filepath.Join(p.dataDir(), "postmaster.pid"))
	if err != nil {
		return false
	}
	lines := strings.Split(string(b), "\n")
	return len(lines) >= 8 && lines[0] == strconv.Itoa(pid) && strings.TrimSpace(lines[7]) == "ready"
}

// URL leads to the database postgres as superuser, over TCP; with TLS if the server has it, its certificate checked.
func (p *Postgres) URL() string { return p.url("postgres") }

func (p *Postgres) url(database string) string {
	query := url.Values{"sslmode": {"disable"}}
	if p.cfg.TLS {
		query = url.Values{"sslmode": {"verify-full"}, "sslrootcert": {p.CAFile()}}
	}
	u := url.URL{
		Scheme: "postgres", User: url.UserPassword("postgres", p.password),
		Host: net.JoinHostPort("127.0.0.1", strconv.Itoa(p.port)), Path: "/" + database, RawQuery: query.Encode(),
	}
	return u.String()
}

// Database returns the URL of the named database, which is made if it is missing.
func (p *Postgres) Database(ctx context.Context, name string) (string, error) {
	conn, err := pgx.Connect(ctx, p.URL())
	if err != nil {
		return "", fmt.Errorf("servers: create database %s: %w", name, err)
	}
	defer conn.Close(context.WithoutCancel(ctx))
	var exists bool
	if err := conn.QueryRow(ctx, "SELECT EXISTS (SELECT FROM pg_database WHERE datname = $1)", name).Scan(&exists); err != nil {
		return "", fmt.Errorf("servers: look for database %s: %w", name, err)
	}
	if !exists {
		if _, err := conn.Exec(ctx, "CREATE DATABASE "+pgx.Identifier{name}.Sanitize()); err != nil {
			return "", fmt.Errorf("servers: create database %s: %w", name, err)
		}
	}
	return p.url(name), nil
}

// Restart is Shutdown, and then starts the server again on the same port and data.
func (p *Postgres) Restart(ctx context.Context, mode string) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if err := p.shutdown(ctx, mode); err != nil {
		return fmt.Errorf("servers: restart Postgres: %w", err)
	}
	if err := p.start(ctx); err != nil {
		return fmt.Errorf("servers: restart Postgres: %w", err)
	}
	return nil
}

// Shutdown stops the server in one of Postgres's own three ways: "smart" waits for clients to leave, "fast" ends their
// sessions, "immediate" is a crash, with recovery at the next start. A paused server is resumed first. Restart brings it back.
func (p *Postgres) Shutdown(ctx context.Context, mode string) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if err := p.shutdown(ctx, mode); err != nil {
		return fmt.Errorf("servers: shut Postgres down: %w", err)
	}
	return nil
}

func (p *Postgres) shutdown(ctx context.Context, mode string) error {
	signal, ok := map[string]syscall.Signal{
		"smart": syscall.SIGTERM, "fast": syscall.SIGINT, "immediate": syscall.SIGQUIT,
	}[mode]
	if !ok {
		return fmt.Errorf("mode %q is none of smart, fast, immediate", mode)
	}
	if p.stopped {
		return errors.New("it has been stopped")
	}
	if err := p.resume(); err != nil {
		return err
	}
	p.server.signal(signal)
	if err := p.server.wait(ctx); err != nil {
		return err
	}
	p.home.dog.watch(0)
	return nil
}

// Kill ends the server with SIGKILL, paused or not, as a crash does; its sessions notice and end too. Restart brings it back.
func (p *Postgres) Kill() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.server.signal(syscall.SIGKILL)
	_ = p.resume() // frozen sessions would not notice; it never fails
	<-p.server.done
	p.home.dog.watch(0)
}

// Pause freezes the server and all its sessions (SIGSTOP): connections stay open and nothing answers.
func (p *Postgres) Pause() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.server.ended() {
		return errors.New("servers: pause Postgres: it does not run")
	}
	// The server first, so that no session is born while the sessions are counted.
	pid := p.server.pid()
	if err := kill(pid, sigStop); err != nil {
		return fmt.Errorf("servers: pause Postgres: %w", err)
	}
	p.paused = append(p.paused, pid)
	sessions, err := children(pid)
	if err != nil {
		return fmt.Errorf("servers: pause Postgres: %w", err)
	}
	for _, session := range sessions {
		if err := kill(session, sigStop); err == nil {
			p.paused = append(p.paused, session)
		}
	}
	p.home.dog.paused(p.paused)
	return nil
}

// Resume ends a Pause.
func (p *Postgres) Resume() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.resume()
}

func (p *Postgres) resume() error {
	// The sessions first: the server would take one that is still frozen for a lost one.
	for _, pid := range slices.Backward(p.paused) {
		_ = kill(pid, sigCont) // one that has ended needs none
	}
	p.paused = nil
	p.home.dog.paused(nil)
	return nil
}

// stopGrace is how long a server may take to heed a signal before a harsher one follows.
const stopGrace = 10 * time.Second

// Stop ends the server and removes its files, if they are temporary. Stopping twice is safe.
func (p *Postgres) Stop() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.stopped {
		return nil
	}
	p.stopped = true
	if err := p.resume(); err != nil {
		return err
	}
	if p.home.temporary {
		p.server.stop(stopGrace, syscall.SIGQUIT) // nothing to put in order
	} else {
		p.server.stop(stopGrace, syscall.SIGINT, syscall.SIGQUIT)
	}
	if err := p.home.close(); err != nil {
		return fmt.Errorf("servers: stop Postgres: %w", err)
	}
	return nil
}
