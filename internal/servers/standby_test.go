//go:build unix

package servers

import (
	"testing"

	"github.com/jackc/pgx/v5"
)

func TestStartStandby_HasWhatWasCommittedAndTakesOverWhenThePrimaryIsKilled(t *testing.T) {
	t.Parallel()
	for _, tls := range []bool{false, true} {
		primary := newPostgres(t, PostgresConfig{TLS: tls, Settings: map[string]string{"synchronous_commit": "remote_apply"}})
		standby, err := primary.StartStandby(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = standby.Stop() })
		if _, err := connect(t, primary.URL()).Exec(t.Context(), "CREATE TABLE mark (id int)"); err != nil {
			t.Fatal(err)
		}
		conn := connect(t, standby.URL())
		if _, err := conn.Exec(t.Context(), "SELECT FROM mark"); err != nil {
			t.Errorf("the standby has not what was committed: %v", err)
		}
		const write = "INSERT INTO mark VALUES (1)"
		if _, err := conn.Exec(t.Context(), write); err == nil {
			t.Error("the standby takes writes")
		}
		primary.Kill()
		if conn, err := pgx.Connect(t.Context(), primary.URL()); err == nil {
			_ = conn.Close(t.Context())
			t.Error("the primary answers after Kill")
		}
		if err := standby.Promote(t.Context()); err != nil {
			t.Fatal(err)
		}
		if _, err := conn.Exec(t.Context(), write); err != nil {
			t.Errorf("after the promotion: %v", err)
		}
	}
}

func TestPostgres_KillAndShutdownLeaveTheDataForRestart(t *testing.T) {
	t.Parallel()
	pg := newPostgres(t, PostgresConfig{})
	if _, err := connect(t, pg.URL()).Exec(t.Context(), "CREATE TABLE mark (id int)"); err != nil {
		t.Fatal(err)
	}
	for _, end := range []func() error{
		func() error { pg.Kill(); return nil },
		func() error { return pg.Shutdown(t.Context(), "fast") },
	} {
		if err := end(); err != nil {
			t.Fatal(err)
		}
		if conn, err := pgx.Connect(t.Context(), pg.URL()); err == nil {
			_ = conn.Close(t.Context())
			t.Error("it answers although it has been ended")
		}
		if err := pg.Restart(t.Context(), "fast"); err != nil {
			t.Fatal(err)
		}
		if _, err := connect(t, pg.URL()).Exec(t.Context(), "SELECT FROM mark"); err != nil {
			t.Error(err)
		}
	}
}
