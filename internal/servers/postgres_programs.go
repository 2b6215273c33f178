package servers

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"

	embeddedpostgres "github.com/fergusstrange/embedded-postgres"
)

// programs is where the programs of one Postgres installation lie.
type programs struct{ postgres, initdb string }

// postgresFinder says where to look for Postgres.
type postgresFinder struct {
	lookPath func(string) (string, error)                       // finds a program on PATH
	globs    []string                                           // folders of programs; the highest version wins
	download func(context.Context, io.Writer) (programs, error) // the last way out
}

func defaultPostgresFinder() postgresFinder {
	return postgresFinder{
		lookPath: exec.LookPath,
		globs: []string{
			"/usr/lib/postgresql/*/bin",          // Debian
			"/opt/homebrew/opt/postgresql@*/bin", // Homebrew on Apple's own processors
			"/usr/local/opt/postgresql@*/bin",    // Homebrew on Intel
			"/usr/pgsql-*/bin",                   // Red Hat
			"/Applications/Postgres.app/Contents/Versions/*/bin",
		},
		download: downloadPostgres,
	}
}

func (f postgresFinder) find(ctx context.Context, log io.Writer) (programs, error) {
	if path, err := f.lookPath("postgres"); err == nil {
		// A link on PATH leads into an installation, whose other programs and files lie around what the link leads to.
		if real, err := filepath.EvalSymlinks(path); err == nil {
			if p, ok := programsIn(filepath.Dir(real)); ok {
				return p, nil
			}
		}
	}
	for _, glob := range f.globs {
		dirs, _ := filepath.Glob(glob)
		best, bestVersion := programs{}, -1.0
		for _, dir := range dirs {
			if p, ok := programsIn(dir); ok && versionIn(dir) > bestVersion {
				best, bestVersion = p, versionIn(dir)
			}
		}
		if bestVersion >= 0 {
			return best, nil
		}
	}
	p, err := f.download(ctx, log)
	if err != nil {
		return programs{}, fmt.Errorf("Postgres %w: neither on PATH nor in %s, and the download failed (%w); "+
			"install it (Debian: apt-get install postgresql; macOS: brew install postgresql@17)",
			ErrNotFound, strings.Join(f.globs, ", "), err)
	}
	return p, nil
}

func programsIn(dir string) (programs, bool) {
	postgres, err1 := exec.LookPath(filepath.Join(dir, "postgres"))
	initdb, err2 := exec.LookPath(filepath.Join(dir, "initdb"))
	return programs{postgres: postgres, initdb: initdb}, err1 == nil && err2 == nil
}

// versionIn reads the version out of a folder such as /usr/lib/postgresql/17/bin; 0 if there is none.
func versionIn(dir string) float64 {
	parent := filepath.Base(filepath.Dir(dir))
	version, _ := strconv.ParseFloat(strings.TrimLeftFunc(parent, func(r rune) bool { return r < '0' || r > '9' }), 64)
	return version
}

// downloadPostgres has embedded-postgres fetch the programs into the user's cache folder. That library offers fetching only
// as a part of starting, so a server is started and stopped once; as root its initdb refuses, but by then the programs
// are there.
func downloadPostgres(ctx context.Context, log io.Writer) (programs, error) {
	cache, err := os.UserCacheDir()
	if err != nil {
		return programs{}, fmt.Errorf("find the cache folder: %w", err)
	}
	version := embeddedpostgres.V17
	dir := filepath.Join(cache, "carpool", "postgres-"+string(version))
	if p, ok := programsIn(filepath.Join(dir, "bin")); ok {
		return p, nil
	}
	if log == nil {
		log = io.Discard
	}
	_, _ = fmt.Fprintf(log, "downloading Postgres %s into %s\n", version, dir)
	port, err := FreePort()
	if err != nil {
		return programs{}, err
	}
	scratch, err := os.MkdirTemp("", "carpool-fetch-")
	if err != nil {
		return programs{}, err
	}
	fetched := make(chan error, 1)
	go func() {
		defer os.RemoveAll(scratch)
		pg := embeddedpostgres.NewDatabase(embeddedpostgres.DefaultConfig().
			Version(version).Port(uint32(port)).Logger(log).
			CachePath(filepath.Join(cache, "carpool")).BinariesPath(dir).RuntimePath(scratch))
		err := pg.Start()
		if err == nil {
			err = pg.Stop()
		}
		fetched <- err
	}()
	select {
	case err = <-fetched:
	case <-ctx.Done():
		// The library cannot be called back. Its goroutine ends with the download.
		return programs{}, context.Cause(ctx)
	}
	if p, ok := programsIn(filepath.Join(dir, "bin")); ok {
		return p, nil
	}
	if err == nil {
		err = errors.New("it brought no programs")
	}
	return programs{}, err
}
