package servers

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"os/exec"
	"path/filepath"
	"strconv"
	"time"

	"github.com/jackc/pgx/v5"
)

// StartStandby starts a standby of a running server: a copy that takes no writes and follows by streaming, in a temporary
// folder, on a free port, with the primary's password, settings and TLS. From then on the primary confirms a commit when the
// standby has it too (synchronous_standby_names), and with the setting synchronous_commit=remote_apply when it can be seen
// there. It is stopped like any other server. An error that is ErrNotFound names what to install: the copy needs pg_basebackup.
func (p *Postgres) StartStandby(ctx context.Context) (*Postgres, error) {
	standby := &Postgres{cfg: p.cfg, programs: p.programs, primary: p}
	standby.cfg.Dir, standby.cfg.Port = "", 0
	if err := standby.launch(ctx, identities()); err != nil {
		return nil, fmt.Errorf("servers: start a standby of Postgres: %w", err)
	}
	if err := p.waitForStandby(ctx); err != nil {
		return nil, errors.Join(fmt.Errorf("servers: start a standby of Postgres: %w", err), standby.Stop())
	}
	return standby, nil
}

// copyPrimary makes the data folder of a standby.
func (p *Postgres) copyPrimary(ctx context.Context, dir string) error {
	program, err := exec.LookPath(filepath.Join(filepath.Dir(p.programs.postgres), "pg_basebackup"))
	if err != nil {
		return fmt.Errorf("pg_basebackup %w beside %s; install it: apt-get install postgresql (macOS: brew install postgresql@17)",
			ErrNotFound, p.programs.postgres)
	}
	from, err := url.Parse(p.primary.URL())
	if err != nil {
		return err
	}
	from.User = url.User(from.User.Username()) // everybody can read a command line
	args := []string{"--dbname", from.String(), "--pgdata", dir, "--write-recovery-conf", "--checkpoint", "fast"}
	if !p.cfg.Durable {
		args = append(args, "--no-sync")
	}
	cmd := p.identity.command(p.home.dir, program, args...)
	cmd.Env = append(cleanEnv(), "PGPASSWORD="+p.password) // which the standby's recovery has from then on
	return run(ctx, cmd, "pg_basebackup", p.cfg.Log, p.home.dog.watch)
}

// waitForStandby has the server wait for its standby with each commit, and returns when it does.
func (p *Postgres) waitForStandby(ctx context.Context) error {
	conn, err := pgx.Connect(ctx, p.URL())
	if err != nil {
		return err
	}
	defer conn.Close(context.WithoutCancel(ctx))
	// Not before there is a standby: commits would wait for one. And not on the command line, which would outdo this.
	for _, sql := range []string{"ALTER SYSTEM SET synchronous_standby_names = '*'", "SELECT pg_reload_conf()"} {
		if _, err := conn.Exec(ctx, sql); err != nil {
			return fmt.Errorf("make it wait for the standby: %w", err)
		}
	}
	for isSync := false; !isSync; {
		const sql = "SELECT EXISTS (SELECT FROM pg_stat_replication WHERE state = 'streaming' AND sync_state IN ('sync', 'quorum'))"
		if err := conn.QueryRow(ctx, sql).Scan(&isSync); err != nil {
			return fmt.Errorf("wait for the standby: %w", err)
		}
		time.Sleep(5 * time.Millisecond)
	}
	return nil
}

// Promote makes a primary of a standby, and returns when it takes writes. It waits for no other server.
func (p *Postgres) Promote(ctx context.Context) error {
	conn, err := pgx.Connect(ctx, p.URL())
	if err != nil {
		return fmt.Errorf("servers: promote the standby: %w", err)
	}
	defer conn.Close(context.WithoutCancel(ctx))
	var promoted bool
	const patience = 60 // seconds
	if err := conn.QueryRow(ctx, "SELECT pg_promote(true, "+strconv.Itoa(patience)+")").Scan(&promoted); err != nil {
		return fmt.Errorf("servers: promote the standby: %w", err)
	}
	if !promoted {
		return fmt.Errorf("servers: promote the standby: it takes no writes after %d s", patience)
	}
	return nil
}
