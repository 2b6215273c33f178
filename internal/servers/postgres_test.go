//go:build unix

package servers

import (
	"context"
	"errors"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
)

// giveUp bounds waits that end soon unless something is broken.
const giveUp = time.Minute

func TestPostgres_TakesConnectionsWithItsPasswordAlone(t *testing.T) {
	t.Parallel()
	pg := newPostgres(t, PostgresConfig{})
	mustAnswer(t, pg.URL())

	wrong, err := url.Parse(pg.URL())
	if err != nil {
		t.Fatal(err)
	}
	wrong.User = url.UserPassword("postgres", "guessed")
	if conn, err := pgx.Connect(t.Context(), wrong.String()); err == nil {
		conn.Close(t.Context())
		t.Error("a wrong password was taken")
	}
}

func TestPostgres_SettingsReachTheServer(t *testing.T) {
	t.Parallel()
	pg := newPostgres(t, PostgresConfig{Settings: map[string]string{"max_connections": "7", "fsync": "on"}})
	conn := connect(t, pg.URL())
	for setting, want := range map[string]string{
		"max_connections": "7", "fsync": "on", "full_page_writes": "off", "listen_addresses": "127.0.0.1",
	} {
		var got string
		if err := conn.QueryRow(t.Context(), "SELECT current_setting($1)", setting).Scan(&got); err != nil || got != want {
			t.Errorf("%s is %q, %v; want %q", setting, got, err, want)
		}
	}
}

func TestPostgres_DatabaseIsMadeOnceAndFoundAgain(t *testing.T) {
	t.Parallel()
	pg := newPostgres(t, PostgresConfig{})
	first, err := pg.Database(t.Context(), `odd "name"`)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := connect(t, first).Exec(t.Context(), "CREATE TABLE mark (id int)"); err != nil {
		t.Fatal(err)
	}
	second, err := pg.Database(t.Context(), `odd "name"`)
	if err != nil || second != first {
		t.Fatalf("the second time: %v, another URL: %t", err, second != first)
	}
	if _, err := connect(t, second).Exec(t.Context(), "SELECT FROM mark"); err != nil {
		t.Error(err)
	}
}

func TestPostgres_RestartKeepsPortPasswordAndData(t *testing.T) {
	t.Parallel()
	for _, mode := range []string{"fast", "immediate", "smart"} {
		t.Run(mode, func(t *testing.T) {
			t.Parallel()
			pg := newPostgres(t, PostgresConfig{})
			before := connect(t, pg.URL())
			if _, err := before.Exec(t.Context(), "CREATE TABLE mark (id int)"); err != nil {
				t.Fatal(err)
			}
			if mode == "smart" {
				before.Close(t.Context())
			}
			if err := pg.Restart(t.Context(), mode); err != nil {
				t.Fatal(err)
			}
			if mode != "smart" && before.Ping(t.Context()) == nil {
				t.Error("a connection outlived the restart")
			}
			if _, err := connect(t, pg.URL()).Exec(t.Context(), "SELECT FROM mark"); err != nil {
				t.Error(err)
			}
		})
	}
}

func TestPostgres_SmartRestartWaitsForItsClientsUntilTheContextEnds(t *testing.T) {
	t.Parallel()
	pg := newPostgres(t, PostgresConfig{})
	client := connect(t, pg.URL())
	ctx, cancel := context.WithCancel(t.Context())
	restarted := make(chan error, 1)
	go func() { restarted <- pg.Restart(ctx, "smart") }()
	// In a smart shutdown the server turns new clients away and goes on serving the old ones.
	for {
		conn, err := pgx.Connect(t.Context(), pg.URL())
		if err != nil {
			break
		}
		conn.Close(t.Context())
		select {
		case err := <-restarted:
			t.Fatalf("it restarted over a client's head: %v", err)
		case <-time.After(5 * time.Millisecond):
		}
	}
	if err := client.Ping(t.Context()); err != nil {
		t.Errorf("the client that it waits for: %v", err)
	}
	cancel()
	if err := <-restarted; !errors.Is(err, context.Canceled) {
		t.Errorf("restart: %v, want the context's error", err)
	}
}

func TestPostgres_RestartRefusesAnUnknownMode(t *testing.T) {
	t.Parallel()
	if err := (&Postgres{}).Restart(t.Context(), "quick"); err == nil || !strings.Contains(err.Error(), `"quick" is none of`) {
		t.Errorf("got %v, want an error that names the mode", err)
	}
}

func TestPostgres_PausedAnswersNobodyAndResumedGoesOn(t *testing.T) {
	t.Parallel()
	pg := newPostgres(t, PostgresConfig{})
	session := connect(t, pg.URL())
	if err := pg.Pause(); err != nil {
		t.Fatal(err)
	}
	answered := make(chan error, 1)
	go func() { answered <- session.Ping(context.WithoutCancel(t.Context())) }()
	short, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if conn, err := pgx.Connect(short, pg.URL()); err == nil {
		conn.Close(t.Context())
		t.Error("a new session was served")
	}
	select {
	case err := <-answered:
		t.Errorf("an old session was answered: %v", err)
	default:
	}
	if err := pg.Resume(); err != nil {
		t.Fatal(err)
	}
	select {
	case err := <-answered:
		if err != nil {
			t.Errorf("the old session after Resume: %v", err)
		}
	case <-time.After(giveUp):
		t.Fatal("the old session was not answered after Resume")
	}
	mustAnswer(t, pg.URL())
}

func TestPostgres_StopLeavesNoProcessAndNoFile(t *testing.T) {
	t.Parallel()
	for name, meanwhile := range map[string]func(*Postgres) error{
		"running": func(*Postgres) error { return nil },
		"paused":  func(pg *Postgres) error { return pg.Pause() },
		"crashed": func(pg *Postgres) error { return kill(pg.server.pid(), 9) },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			pg := newPostgres(t, PostgresConfig{TLS: true})
			connect(t, pg.URL())
			pids := pg.pids(t)
			if len(pids) < 3 {
				t.Fatalf("processes %v: want the server, its sessions and the watchdog", pids)
			}
			if err := meanwhile(pg); err != nil {
				t.Fatal(err)
			}
			if err := pg.Stop(); err != nil {
				t.Fatal(err)
			}
			waitUntilGone(t, pids, pg.home.dir)
			if err := pg.Stop(); err != nil {
				t.Errorf("the second Stop: %v", err)
			}
			if pg.Pause() == nil {
				t.Error("a stopped server could be paused")
			}
		})
	}
}

func TestPostgres_ItsFolderIsKeptWithDataAndPassword(t *testing.T) {
	t.Parallel()
	cfg := PostgresConfig{Dir: filepath.Join(openDir(t), "kept"), Durable: true}
	first := newPostgres(t, cfg)
	if _, err := connect(t, first.URL()).Exec(t.Context(), "CREATE TABLE mark (id int)"); err != nil {
		t.Fatal(err)
	}
	if err := first.Stop(); err != nil {
		t.Fatal(err)
	}
	second := newPostgres(t, cfg)
	if _, err := connect(t, second.URL()).Exec(t.Context(), "SELECT FROM mark"); err != nil {
		t.Error(err)
	}

	_, err := StartPostgres(t.Context(), cfg)
	if err == nil || !strings.Contains(err.Error(), "postmaster.pid") {
		t.Errorf("a second server in the same folder: %v, want Postgres's own refusal", err)
	}
	mustAnswer(t, second.URL())
}

func TestPostgres_AnInitdbThatWasCutOffIsDoneAgain(t *testing.T) {
	t.Parallel()
	dir := openDir(t)
	// As initdb leaves it when it is killed: the version is there early on, the rest is not.
	unfinished := filepath.Join(dir, "data.new")
	if err := os.MkdirAll(unfinished, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(unfinished, "PG_VERSION"), []byte("15\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	mustAnswer(t, newPostgres(t, PostgresConfig{Dir: dir}).URL())
}

func TestPostgres_TLSProvesWhoItIs(t *testing.T) {
	t.Parallel()
	pg := newPostgres(t, PostgresConfig{TLS: true})
	var encrypted bool
	err := connect(t, pg.URL()).QueryRow(t.Context(),
		"SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()").Scan(&encrypted)
	if err != nil || !encrypted {
		t.Errorf("encrypted: %t, %v", encrypted, err)
	}
	if _, err := os.Stat(pg.CAFile()); err != nil {
		t.Error(err)
	}
	// Somebody who trusts another certificate.
	other := newPostgres(t, PostgresConfig{TLS: true})
	if conn, err := pgx.Connect(t.Context(), strings.Replace(pg.URL(), url.QueryEscape(pg.CAFile()), url.QueryEscape(other.CAFile()), 1)); err == nil {
		conn.Close(t.Context())
		t.Error("the server was taken for another")
	}
}

func TestPostgres_ATakenPortIsNamed(t *testing.T) {
	t.Parallel()
	port := occupiedPort(t)
	_, err := StartPostgres(t.Context(), PostgresConfig{Port: port})
	if !errors.Is(err, errPortTaken) || !strings.Contains(err.Error(), strconv.Itoa(port)) {
		t.Errorf("got %v, want an error that names port %d", err, port)
	}
}

func TestOnSomePort_TriesAnotherWhenSomebodyWasQuicker(t *testing.T) {
	t.Parallel()
	var tried []int
	err := onSomePort(0, func(port int) error {
		if tried = append(tried, port); len(tried) < 3 {
			return errPortTaken
		}
		return nil
	})
	if err != nil || len(tried) != 3 {
		t.Errorf("tried %v, %v; want a third try that works", tried, err)
	}
}

func TestPostgres_AnErrorOfTheServerIsPassedOnWithoutThePassword(t *testing.T) {
	t.Parallel()
	_, err := StartPostgres(t.Context(), PostgresConfig{Settings: map[string]string{"shared_buffers": "nonsense"}})
	if err == nil || !strings.Contains(err.Error(), "shared_buffers") {
		t.Errorf("got %v, want what Postgres said", err)
	}
}

func TestPostgres_AContextThatEndsEndsTheStart(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := StartPostgres(ctx, PostgresConfig{}); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v, want the context's error", err)
	}
}

// newPostgres starts a server that is stopped when the test ends.
func newPostgres(t *testing.T, cfg PostgresConfig) *Postgres {
	t.Helper()
	pg, err := StartPostgres(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := pg.Stop(); err != nil {
			t.Error(err)
		}
	})
	return pg
}

// openDir is a temporary folder that other users may search, as Postgres may have to run as one. t.TempDir is closed to them.
func openDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "carpool-test-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	return dir
}

// connect opens a session that is closed when the test ends.
func connect(t *testing.T, url string) *pgx.Conn {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), giveUp)
	defer cancel()
	conn, err := pgx.Connect(ctx, url)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), giveUp)
		defer cancel()
		_ = conn.Close(ctx) // the server may be gone
	})
	return conn
}

func mustAnswer(t *testing.T, url string) {
	t.Helper()
	var one int
	if err := connect(t, url).QueryRow(t.Context(), "SELECT 1").Scan(&one); err != nil || one != 1 {
		t.Errorf("SELECT 1 gave %d, %v", one, err)
	}
}

// occupiedPort is a port that somebody listens on until the test ends.
func occupiedPort(t *testing.T) int {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	return l.Addr().(*net.TCPAddr).Port
}
