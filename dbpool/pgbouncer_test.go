//go:build linux

package dbpool_test

import (
	"context"
	"fmt"
	"net"
	"net/url"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/jackc/pgx/v5"

	"github.com/carpool-go/carpool/dbpool"
	"github.com/carpool-go/carpool/internal/servers"
)

// bounce starts a PgBouncer in transaction mode before the database of a URL and
// returns the URL that leads through it.
func bounce(t *testing.T, rawURL string) string {
	t.Helper()
	program, err := exec.LookPath("pgbouncer")
	if err != nil {
		if program, err = exec.LookPath("/usr/sbin/pgbouncer"); err != nil {
			t.Fatal("pgbouncer is not installed; `make test` installs it")
		}
	}
	u, err := url.Parse(rawURL)
	if err != nil {
		t.Fatal(err)
	}
	password, _ := u.User.Password()
	port, err := servers.FreePort()
	if err != nil {
		t.Fatal(err)
	}
	dir, err := os.MkdirTemp("", "carpool-pgbouncer-*")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	ini := filepath.Join(dir, "pgbouncer.ini")
	config := fmt.Sprintf(`[databases]
%s = host=%s port=%s user=%s password=%s
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = %d
unix_socket_dir =
auth_type = any
pool_mode = transaction
default_pool_size = 2
`, strings.Trim(u.Path, "/"), u.Hostname(), u.Port(), u.User.Username(), password, port)
	if err := os.WriteFile(ini, []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(program, "-q", ini)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if os.Getuid() == 0 { // which it refuses to run as
		nobody, err := user.Lookup("nobody")
		if err != nil {
			t.Fatal(err)
		}
		uid, err := strconv.Atoi(nobody.Uid)
		if err != nil {
			t.Fatal(err)
		}
		for _, path := range []string{dir, ini} {
			if err := os.Chown(path, uid, -1); err != nil {
				t.Fatal(err)
			}
		}
		cmd.SysProcAttr.Credential = &syscall.Credential{Uid: uint32(uid), Gid: uint32(uid)}
	}
	cmd.Dir = dir
	var log syncBuffer
	cmd.Stderr = &log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		if t.Failed() {
			t.Logf("pgbouncer:\n%s", log.String())
		}
	})
	u.Host = net.JoinHostPort("127.0.0.1", strconv.Itoa(port))
	u.RawQuery = "sslmode=disable"
	eventually(t, "pgbouncer answers", func() bool {
		conn, err := pgx.Connect(t.Context(), u.String())
		if err != nil {
			return false
		}
		return conn.Close(context.Background()) == nil
	})
	return u.String()
}

func TestPool_WorksThroughPgBouncerInTransactionMode(t *testing.T) {
	t.Parallel()
	p := open(t, func(c *dbpool.Config) {
		c.URL = bounce(t, c.URL)
		c.ThroughPooler = true
	})
	if _, err := p.Exec(t.Context(), "CREATE TABLE t (n int)"); err != nil {
		t.Fatal(err)
	}
	// More of our connections than the pooler has of its own, so that the
	// transactions of one of ours run on different ones of its.
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			for j := range 25 {
				var sum int
				if err := p.QueryRow(t.Context(), "SELECT $1::int + $2::int", i, j).Scan(&sum); err != nil || sum != i+j {
					t.Errorf("%d + %d is %d, %v", i, j, sum, err)
					return
				}
				err := pgx.BeginFunc(t.Context(), p, func(tx pgx.Tx) error {
					_, err := tx.Exec(t.Context(), "INSERT INTO t VALUES ($1)", j)
					return err
				})
				if err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
	var n int
	if err := p.QueryRow(t.Context(), "SELECT count(*) FROM t WHERE n >= $1", 0).Scan(&n); err != nil || n != 8*25 {
		t.Errorf("%d rows, %v", n, err)
	}
}
