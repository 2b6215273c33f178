package servers

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
)

func TestIdentities_OnlyRootNeedsAnother(t *testing.T) {
	t.Parallel()
	for _, id := range identities() {
		if asWeAre := id.name == "as we are"; asWeAre != (os.Geteuid() != 0) {
			t.Errorf("user %d may run Postgres %s", os.Geteuid(), id.name)
		}
	}
	if len(identities()) == 0 {
		t.Error("nobody may run Postgres")
	}
}

// usable are the identities that this machine lets us take. A container may refuse us the user namespace, for one.
func usable(t *testing.T) []identity {
	t.Helper()
	found, err := newPostgresFinder(false).find(t.Context(), nil)
	if err != nil {
		t.Fatal(err)
	}
	dir := openDir(t)
	ids := slices.DeleteFunc(identities(), func(id identity) bool {
		err := id.probe(t.Context(), found.postgres, dir)
		if err != nil {
			t.Logf("not to be had on this machine: %s: %v", id.name, err)
		}
		return err != nil
	})
	if len(ids) == 0 {
		t.Fatal("there is no way to run Postgres on this machine")
	}
	return ids
}

// Each way of running Postgres is tried by itself, so that the second is known to work where the first does.
func TestPostgres_RunsUnderEachIdentity(t *testing.T) {
	t.Parallel()
	for _, id := range usable(t) {
		t.Run(id.name, func(t *testing.T) {
			t.Parallel()
			pg, err := startPostgres(t.Context(), PostgresConfig{TLS: true}, newPostgresFinder(false), []identity{id})
			if err != nil {
				t.Fatal(err)
			}
			mustAnswer(t, pg.URL())
			if err := pg.Restart(t.Context(), "fast"); err != nil {
				t.Error(err)
			}
			pids := pg.pids(t)
			if err := pg.Stop(); err != nil {
				t.Error(err)
			}
			waitUntilGone(t, pids, pg.home.dir)
		})
	}
}

func TestPostgres_AFolderKeptUnderOneIdentityServesAnother(t *testing.T) {
	t.Parallel()
	dir := openDir(t)
	for _, id := range usable(t) {
		pg, err := startPostgres(t.Context(), PostgresConfig{Dir: dir}, newPostgresFinder(false), []identity{id})
		if err != nil {
			t.Fatalf("%s: %v", id.name, err)
		}
		mustAnswer(t, pg.URL())
		if err := pg.Stop(); err != nil {
			t.Error(err)
		}
	}
}

func TestChooseIdentity_FallsBackAndNamesWhatFailed(t *testing.T) {
	t.Parallel()
	postgres, err := newPostgresFinder(false).find(t.Context(), nil)
	if err != nil {
		t.Fatal(err)
	}
	denied := identity{name: "in a namespace", own: func(string) error { return errors.New("not permitted") }}
	chosen, err := chooseIdentity(t.Context(), postgres.postgres, t.TempDir(), []identity{denied, {name: "as ourselves"}})
	if err != nil || chosen.name != "as ourselves" {
		t.Errorf("chose %q, %v", chosen.name, err)
	}
	missing := identity{name: "as nobody", apply: func(cmd *exec.Cmd) { cmd.Dir = "/nowhere" }}
	_, err = chooseIdentity(t.Context(), "/nowhere/postgres", t.TempDir(), []identity{denied, missing})
	for _, want := range []string{"in a namespace: not permitted", "as nobody: "} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("got %v, want it to say %q", err, want)
		}
	}
}

func TestPostgres_InAClosedFolderOnlyItsOwnerRunsIt(t *testing.T) {
	t.Parallel()
	closed := filepath.Join(t.TempDir(), "closed")
	if err := os.Mkdir(closed, 0o700); err != nil {
		t.Fatal(err)
	}
	for _, id := range usable(t) {
		cfg := PostgresConfig{Dir: filepath.Join(closed, strings.ReplaceAll(id.name, " ", "-"))}
		pg, err := startPostgres(t.Context(), cfg, newPostgresFinder(false), []identity{id})
		if !strings.HasPrefix(id.name, "as user ") {
			if err != nil {
				t.Errorf("%s: %v", id.name, err)
				continue
			}
			mustAnswer(t, pg.URL())
			if err := pg.Stop(); err != nil {
				t.Error(err)
			}
			continue
		}
		if err == nil || !strings.Contains(err.Error(), id.name+": ") || !strings.Contains(err.Error(), "permission denied") {
			t.Errorf("%s: got %v, want the refusal by name", id.name, err)
		}
	}
}

// As where user namespaces are forbidden, which is what containers do: below a folder that only root may enter, and below one
// that is made for it.
func TestPostgres_RootKeepsItsFolderAnywhereWithoutUserNamespaces(t *testing.T) {
	t.Parallel()
	candidates := slices.DeleteFunc(identities(), func(id identity) bool { return strings.HasPrefix(id.name, "in a user namespace") })
	closed := filepath.Join(t.TempDir(), "closed")
	if err := os.Mkdir(closed, 0o700); err != nil {
		t.Fatal(err)
	}
	for _, dir := range []string{filepath.Join(closed, "new", "postgres"), filepath.Join(openDir(t), "new", "postgres")} {
		for range 2 { // the second time it is there
			pg, err := startPostgres(t.Context(), PostgresConfig{Dir: dir, TLS: true}, newPostgresFinder(false), candidates)
			if err != nil {
				t.Fatal(err)
			}
			mustAnswer(t, pg.URL())
			if err := pg.Restart(t.Context(), "fast"); err != nil {
				t.Error(err)
			}
			if err := pg.Stop(); err != nil {
				t.Error(err)
			}
		}
	}
}

func TestPostgres_AStartThatFailsLeavesItsFolderAsItWas(t *testing.T) {
	t.Parallel()
	failing := slices.DeleteFunc(identities(), func(id identity) bool { return id.own == nil && os.Geteuid() == 0 })
	for i := range failing {
		failing[i].apply = func(cmd *exec.Cmd) { cmd.Path = "/nowhere/postgres" }
	}
	start := func(dir string) {
		t.Helper()
		if _, err := startPostgres(t.Context(), PostgresConfig{Dir: dir, TLS: true}, newPostgresFinder(false), failing); err == nil {
			t.Fatal("it started")
		}
	}
	root := openDir(t)
	start(filepath.Join(root, "new", "postgres"))
	wantEntries(t, root)

	was := filepath.Join(root, "was")
	if err := os.Mkdir(was, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(was, "mine"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	start(was)
	wantEntries(t, was, "mine")
	for _, path := range []string{was, filepath.Join(was, "mine")} {
		info, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		if owner := info.Sys().(*syscall.Stat_t).Uid; int(owner) != os.Geteuid() {
			t.Errorf("%s belongs to user %d", path, owner)
		}
	}
}
