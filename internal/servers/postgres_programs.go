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
)

// programs is where the programs of one Postgres installation lie.
type programs struct{ postgres, initdb string }

// postgresFinder says where to look for Postgres, and how to come by it if it is not on this machine.
type postgresFinder struct {
	lookPath func(string) (string, error)                       // finds a program on PATH
	globs    []string                                           // folders of programs; the highest version wins
	download func(context.Context, io.Writer) (programs, error) // without touching the system
	install  func(context.Context, io.Writer) error             // the last way out; nil: not allowed, or not possible
}

func newPostgresFinder(mayInstall bool) postgresFinder {
	f := postgresFinder{
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
	if _, err := exec.LookPath("apt-get"); err == nil && mayInstall && os.Geteuid() == 0 {
		f.install = installPostgres
	}
	return f
}

// find returns the programs that are on this machine, else downloads them, else installs them.
func (f postgresFinder) find(ctx context.Context, log io.Writer) (programs, error) {
	if log == nil {
		log = io.Discard
	}
	if p, ok := f.findInstalled(); ok {
		return p, nil
	}
	p, downloadErr := f.download(ctx, log)
	if downloadErr == nil {
		return p, nil
	}
	if ctx.Err() != nil {
		return programs{}, fmt.Errorf("download Postgres: %w", context.Cause(ctx))
	}
	why := fmt.Errorf("the download failed (%w)", downloadErr)
	if f.install != nil {
		_, _ = fmt.Fprintf(log, "installing Postgres with apt-get, since it is not on this machine and %v\n", why)
		err := f.install(ctx, log)
		if ctx.Err() != nil {
			return programs{}, fmt.Errorf("install Postgres: %w", context.Cause(ctx))
		}
		if p, ok := f.findInstalled(); ok {
			return p, nil
		}
		if err == nil {
			err = errors.New("it brought no programs")
		}
		why = fmt.Errorf("%w, and so did its installation (%w)", why, err)
	}
	sudo := ""
	if os.Geteuid() > 0 {
		sudo = "sudo "
	}
	return programs{}, fmt.Errorf("Postgres %w; install it: %sapt-get install postgresql (macOS: brew install postgresql@17); "+
		"it is neither on PATH nor in %s, and %w",
		ErrNotFound, sudo, strings.Join(f.globs, ", "), why)
}

func (f postgresFinder) findInstalled() (programs, bool) {
	if path, err := f.lookPath("postgres"); err == nil {
		// A link on PATH leads into an installation, whose other programs and files lie around what the link leads to.
		if real, err := filepath.EvalSymlinks(path); err == nil {
			if p, ok := programsIn(filepath.Dir(real)); ok {
				return p, true
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
			return best, true
		}
	}
	return programs{}, false
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
