package servers

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"syscall"
	"time"

	embeddedpostgres "github.com/fergusstrange/embedded-postgres"
)

// postgresDownload fetches the programs of Postgres from a Maven repository, without installing anything.
type postgresDownload struct {
	cache string // the folder to put them into, in one of their own
	from  string // the repository's URL; empty: embedded-postgres's own choice
}

func downloadPostgres(ctx context.Context, log io.Writer) (programs, error) {
	cache, err := cacheDir()
	if err != nil {
		return programs{}, fmt.Errorf("find the cache folder: %w", err)
	}
	return postgresDownload{cache: cache}.fetch(ctx, log)
}

// cacheDir is the user's cache folder. Root's own lies below /root, where the user that Postgres runs as may not go, so root
// uses the system's.
func cacheDir() (string, error) {
	if os.Geteuid() == 0 {
		return "/var/cache/carpool", nil
	}
	dir, err := os.UserCacheDir()
	return filepath.Join(dir, "carpool"), err
}

// fetch returns the programs, from the cache if they are there.
func (d postgresDownload) fetch(ctx context.Context, log io.Writer) (programs, error) {
	version := embeddedpostgres.V17
	dir := filepath.Join(d.cache, "postgres-"+string(version))
	if p, ok := programsIn(filepath.Join(dir, "bin")); ok {
		return p, nil
	}
	_, _ = fmt.Fprintf(log, "downloading Postgres %s into %s\n", version, dir)
	missing, err := MissingFoldersOf(d.cache)
	if err != nil {
		return programs{}, err
	}
	if err := os.MkdirAll(d.cache, 0o755); err != nil {
		return programs{}, err
	}
	removeIfEmpty := func() {
		for _, folder := range missing {
			_ = os.Remove(folder)
		}
	}
	scratch, err := newHome("", d.cache, "download-")
	if err != nil {
		removeIfEmpty()
		return programs{}, err
	}
	scratch.dog.removeIfEmpty(missing)
	fetched := make(chan error, 1)
	go func() {
		err := d.fetchInto(dir, scratch.dir, version, log)
		err = errors.Join(err, scratch.close())
		removeIfEmpty()
		fetched <- err
	}()
	select {
	case err = <-fetched:
	case <-ctx.Done():
		// The library cannot be called back. Its goroutine ends with the download; if we end before it, the watchdog cleans up.
		return programs{}, context.Cause(ctx)
	}
	if err != nil {
		return programs{}, err
	}
	p, ok := programsIn(filepath.Join(dir, "bin"))
	if !ok {
		return programs{}, errors.New("it brought no programs")
	}
	return p, nil
}

// fetchInto has embedded-postgres fetch the programs into scratch, whence they go to dir when they are whole.
func (d postgresDownload) fetchInto(dir, scratch string, version embeddedpostgres.PostgresVersion, log io.Writer) error {
	port, err := FreePort()
	if err != nil {
		return err
	}
	files, runtime := filepath.Join(scratch, "files"), filepath.Join(scratch, "run")
	cfg := embeddedpostgres.DefaultConfig().Version(version).Port(uint32(port)).Logger(log).
		CachePath(filepath.Join(scratch, "archive")).BinariesPath(files).RuntimePath(runtime)
	if d.from != "" {
		cfg = cfg.BinaryRepositoryURL(d.from)
	}
	// That library offers fetching only as a part of starting, so a server is started and stopped once. As root its initdb
	// refuses, but by then the programs are there: the folder to run in is made after the last of them.
	logs := filepath.Join(os.TempDir(), "embedded_postgres_log*") // it leaves one there
	others, _ := filepath.Glob(logs)
	pg := embeddedpostgres.NewDatabase(cfg)
	startErr := pg.Start()
	if startErr == nil {
		_ = pg.Stop()
	}
	all, _ := filepath.Glob(logs)
	for _, log := range all {
		if !slices.Contains(others, log) {
			_ = os.Remove(log)
		}
	}
	if _, err := os.Stat(runtime); err != nil {
		return startErr
	}
	if err := openToAll(files); err != nil {
		return err
	}
	if err := os.Chmod(d.cache, 0o755); err != nil {
		return err
	}
	if err := os.Rename(files, dir); err != nil {
		if _, ok := programsIn(filepath.Join(dir, "bin")); ok {
			return nil // another process was quicker
		}
		return err
	}
	return nil
}

// openToAll lets everybody read what is in the folder, and run what its owner may run, whatever the umask was.
func openToAll(folder string) error {
	return filepath.WalkDir(folder, func(path string, entry fs.DirEntry, err error) error {
		if err != nil || entry.Type()&fs.ModeSymlink != 0 {
			return err
		}
		info, err := entry.Info()
		if err != nil {
			return err
		}
		mode := info.Mode().Perm() | 0o444
		if mode&0o100 != 0 {
			mode |= 0o111
		}
		return os.Chmod(path, mode)
	})
}

// installPostgres installs Debian's package.
func installPostgres(ctx context.Context, log io.Writer) error {
	for _, args := range [][]string{{"update"}, {"install", "--no-install-recommends", "-y", "postgresql"}} {
		cmd := exec.Command("apt-get", append([]string{"-o", "DPkg::Lock::Timeout=300", "-qq"}, args...)...)
		cmd.Env = append(os.Environ(), "DEBIAN_FRONTEND=noninteractive")
		if err := aptGet(ctx, cmd, log); err != nil {
			return err
		}
	}
	return nil
}

// aptGet runs a command of apt-get. Interrupted, it stops where that does no harm, for which it gets a minute.
func aptGet(ctx context.Context, cmd *exec.Cmd, log io.Writer) error {
	p, err := startProcess(cmd, "apt-get", log, syscall.SIGINT)
	if err != nil {
		return err
	}
	if err := p.wait(ctx); err != nil {
		p.stop(time.Minute, syscall.SIGINT)
		return err
	}
	if p.err != nil {
		return p.failure()
	}
	return nil
}
