//go:build unix

package servers

import (
	"archive/zip"
	"bytes"
	"context"
	_ "embed"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// postgresArchive holds what passes for Postgres's programs, and a file beside them: all of them closed to others.
//
//go:embed testdata/postgres.txz
var postgresArchive []byte

func TestPostgresDownload_BringsProgramsThatEverybodyMayRun(t *testing.T) {
	t.Parallel()
	d := postgresDownload{cache: filepath.Join(t.TempDir(), "cache", "carpool"), from: repository(t, postgresArchive)}
	var said strings.Builder
	got, err := d.fetch(t.Context(), &said)
	if err != nil {
		t.Fatal(err)
	}
	if !strings.HasPrefix(said.String(), "downloading Postgres ") || !strings.Contains(said.String(), d.cache) {
		t.Errorf("it says %q", said.String())
	}
	installation := filepath.Dir(filepath.Dir(got.postgres))
	for file, want := range map[string]os.FileMode{
		got.postgres: 0o755, got.initdb: 0o755, filepath.Join(installation, "share/postgresql/postgres.bki"): 0o644,
	} {
		info, err := os.Stat(file)
		if err != nil {
			t.Fatal(err)
		}
		if mode := info.Mode().Perm(); mode&0o555 != want&0o555 {
			t.Errorf("%s has mode %o, want it as open as %o", file, mode, want)
		}
	}
	for dir := filepath.Dir(got.postgres); ; dir = filepath.Dir(dir) {
		info, err := os.Stat(dir)
		if err != nil {
			t.Fatal(err)
		}
		if info.Mode().Perm()&0o055 != 0o055 {
			t.Errorf("%s has mode %o, so others cannot pass", dir, info.Mode().Perm())
		}
		if dir == d.cache {
			break
		}
	}
	wantEntries(t, d.cache, filepath.Base(installation))

	// The second time nothing is fetched.
	d.from = "http://127.0.0.1:1"
	if again, err := d.fetch(t.Context(), io.Discard); err != nil || again != got {
		t.Errorf("the second time: %v, %v; want %v", again, err, got)
	}
}

func TestPostgresDownload_OneThatFailsLeavesNothing(t *testing.T) {
	t.Parallel()
	for name, from := range map[string]string{
		"refused": "http://127.0.0.1:1",
		"cut off": repository(t, postgresArchive[:len(postgresArchive)/2]),
	} {
		root := t.TempDir()
		d := postgresDownload{cache: filepath.Join(root, "cache", "carpool"), from: from}
		if got, err := d.fetch(t.Context(), io.Discard); err == nil {
			t.Errorf("%s: it found %v", name, got)
		}
		wantEntries(t, root)
	}
}

func TestPostgresDownload_EndsWithItsContext(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithCancel(t.Context())
	release := make(chan struct{})
	asked := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		cancel()
		<-release
		w.WriteHeader(http.StatusNotFound)
	}))
	defer asked.Close()
	defer close(release)
	d := postgresDownload{cache: t.TempDir(), from: asked.URL}
	if _, err := d.fetch(ctx, io.Discard); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v, want the context's error", err)
	}
}

func TestPostgresDownload_OneThatIsInterruptedLeavesNothing(t *testing.T) {
	t.Parallel()
	root := t.TempDir()
	begun, interrupted := make(chan struct{}, 10), make(chan struct{})
	asked := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {
		begun <- struct{}{}
		<-interrupted
	}))
	defer asked.Close()
	download := exec.Command(os.Args[0])
	download.Env = append(os.Environ(), helperEnv+"="+asked.URL+" into "+filepath.Join(root, "the cache", "carpool"))
	if err := download.Start(); err != nil {
		t.Fatal(err)
	}
	<-begun
	if err := download.Process.Signal(os.Interrupt); err != nil {
		t.Fatal(err)
	}
	_ = download.Wait()
	close(interrupted)
	if state := download.ProcessState; state.Exited() {
		t.Fatalf("it has ended by itself: %s", state)
	}
	waitUntilGone(t, nil, filepath.Join(root, "the cache"))
}

// repository is a Maven repository whose every archive is this one.
func repository(t *testing.T, archive []byte) string {
	t.Helper()
	var jar bytes.Buffer
	z := zip.NewWriter(&jar)
	w, err := z.Create("postgres.txz")
	if err == nil {
		_, err = w.Write(archive)
	}
	if err = errors.Join(err, z.Close()); err != nil {
		t.Fatal(err)
	}
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if !strings.HasSuffix(r.URL.Path, ".jar") {
			http.NotFound(w, r)
			return
		}
		_, _ = w.Write(jar.Bytes())
	}))
	t.Cleanup(server.Close)
	return server.URL
}

func wantEntries(t *testing.T, dir string, want ...string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	if strings.Join(names, " ") != strings.Join(want, " ") {
		t.Errorf("%s holds %q, want %q", dir, names, want)
	}
}
