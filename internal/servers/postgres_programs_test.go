//go:build unix

package servers

import (
	"context"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

func nowhere(string) (string, error) { return "", exec.ErrNotFound }

func noDownload(context.Context, io.Writer) (programs, error) {
	return programs{}, errors.New("the network is down")
}

func TestPostgresFinder_FollowsALinkOnPathIntoItsInstallation(t *testing.T) {
	t.Parallel()
	bin := installation(t, t.TempDir(), "lib/postgresql/15/bin")
	link := filepath.Join(t.TempDir(), "postgres")
	if err := os.Symlink(filepath.Join(bin, "postgres"), link); err != nil {
		t.Fatal(err)
	}
	f := postgresFinder{lookPath: func(string) (string, error) { return link, nil }, download: noDownload}
	wantPrograms(t, f, bin)
}

func TestPostgresFinder_PassesOverAPathThatLacksInitdb(t *testing.T) {
	t.Parallel()
	root := t.TempDir()
	onPath := installation(t, root, "path/bin")
	if err := os.Remove(filepath.Join(onPath, "initdb")); err != nil {
		t.Fatal(err)
	}
	bin := installation(t, root, "lib/postgresql/15/bin")
	f := postgresFinder{
		lookPath: func(string) (string, error) { return filepath.Join(onPath, "postgres"), nil },
		globs:    []string{filepath.Join(root, "lib/postgresql/*/bin")},
		download: noDownload,
	}
	wantPrograms(t, f, bin)
}

func TestPostgresFinder_TakesTheHighestVersion(t *testing.T) {
	t.Parallel()
	for _, layout := range []string{"lib/postgresql/%/bin", "opt/postgresql@%/bin", "pgsql-%/bin"} {
		root := t.TempDir()
		var highest string
		for _, version := range []string{"9.6", "9", "10", "17"} {
			highest = installation(t, root, strings.Replace(layout, "%", version, 1))
		}
		f := postgresFinder{lookPath: nowhere, globs: []string{
			filepath.Join(root, "nothing", "*"),
			filepath.Join(root, strings.Replace(layout, "%", "*", 1)),
		}, download: noDownload}
		wantPrograms(t, f, highest)
	}
}

func TestPostgresFinder_DownloadsWhereNoneIsInstalled(t *testing.T) {
	t.Parallel()
	bin := installation(t, t.TempDir(), "bin")
	f := postgresFinder{lookPath: nowhere, download: func(context.Context, io.Writer) (programs, error) {
		p, _ := programsIn(bin)
		return p, nil
	}}
	wantPrograms(t, f, bin)
}

func TestPostgresFinder_InstallsWhatCannotBeDownloadedAndSaysSo(t *testing.T) {
	t.Parallel()
	root := t.TempDir()
	var bin string
	f := postgresFinder{lookPath: nowhere, globs: []string{filepath.Join(root, "lib/*/bin")}, download: noDownload}
	f.install = func(context.Context, io.Writer) error {
		bin = installation(t, root, "lib/15/bin")
		return nil
	}
	var said strings.Builder
	got, err := f.find(t.Context(), &said)
	if err != nil || got.postgres != filepath.Join(bin, "postgres") {
		t.Errorf("found %v, %v; want what was installed in %s", got, err, bin)
	}
	for _, want := range []string{"installing Postgres with apt-get", "the network is down"} {
		if !strings.Contains(said.String(), want) {
			t.Errorf("it does not say %q: %s", want, said.String())
		}
	}
}

func TestPostgresFinder_TheErrorSaysThatItsInstallationFailedToo(t *testing.T) {
	t.Parallel()
	f := postgresFinder{lookPath: nowhere, download: noDownload}
	for _, why := range []error{errors.New("no mirror answers"), nil} {
		f.install = func(context.Context, io.Writer) error { return why }
		_, err := f.find(t.Context(), nil)
		if !errors.Is(err, ErrNotFound) || !strings.Contains(err.Error(), "the network is down") || why != nil && !errors.Is(err, why) {
			t.Errorf("got %v, want ErrNotFound with both reasons", err)
		}
	}
}

func TestPostgresFinder_DoesNotInstallOnceItsContextHasEnded(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithCancel(t.Context())
	f := postgresFinder{lookPath: nowhere, download: func(context.Context, io.Writer) (programs, error) {
		cancel()
		return programs{}, context.Canceled
	}}
	f.install = func(context.Context, io.Writer) error {
		t.Error("it installs")
		return nil
	}
	if _, err := f.find(ctx, nil); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v, want the context's error", err)
	}
}

func TestNewPostgresFinder_OnlyRootMayInstallAndOnlyIfAllowed(t *testing.T) {
	t.Parallel()
	if newPostgresFinder(false).install != nil {
		t.Error("it would install though it is not allowed to")
	}
	if os.Geteuid() != 0 && newPostgresFinder(true).install != nil {
		t.Error("it would install though we are not root")
	}
}

func TestPostgresFinder_TheErrorSaysWhereItLookedAndWhatToInstall(t *testing.T) {
	t.Parallel()
	f := postgresFinder{lookPath: nowhere, globs: []string{"/usr/lib/none/*/bin"}, download: noDownload}
	_, err := startPostgres(t.Context(), PostgresConfig{}, f, identities())
	if !errors.Is(err, ErrNotFound) {
		t.Fatalf("got %v, want ErrNotFound", err)
	}
	for _, want := range []string{"PATH", "/usr/lib/none/*/bin", "the network is down", "apt-get install postgresql", "brew install postgresql"} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("the error lacks %q: %v", want, err)
		}
	}
}

// installation makes a folder that holds Postgres's programs, or what passes for them.
func installation(t *testing.T, root, dir string) string {
	t.Helper()
	dir = filepath.Join(root, dir)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	for _, program := range []string{"postgres", "initdb"} {
		if err := os.WriteFile(filepath.Join(dir, program), []byte("#!/bin/sh\n"), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	real, err := filepath.EvalSymlinks(dir)
	if err != nil {
		t.Fatal(err)
	}
	return real
}

func wantPrograms(t *testing.T, f postgresFinder, dir string) {
	t.Helper()
	got, err := f.find(t.Context(), io.Discard)
	want := programs{postgres: filepath.Join(dir, "postgres"), initdb: filepath.Join(dir, "initdb")}
	if err != nil || got != want {
		t.Errorf("found %v, %v; want %v", got, err, want)
	}
}
