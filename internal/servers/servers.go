// Package servers starts real servers as child processes, for dev and for tests: Postgres, Redis, and a stand-in for
// Redis in this process.
//
// No server outlives the program that started it. Stop ends it and removes its files. If the program is killed with -9,
// the kernel ends the server (Linux), and on every unix a watchdog ends it, paused or not, and removes its files.
// On Windows a killed program leaves its servers behind.
//
// Servers listen on 127.0.0.1 alone and have a random password, since other people may use the machine too. The password
// is in the URL and nowhere else: not on a command line, not in an error.
package servers

import (
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
)

// ErrNotFound says that a server's program is not on this machine. The error that wraps it names what to install.
var ErrNotFound = errors.New("not found")

// home is a server's folder and the watchdog over it.
type home struct {
	dir       string
	temporary bool
	dog       *watchdog

	// What was there before, unless it is temporary.
	missing MissingFolders
	entries []os.DirEntry
	owner   identity
}

// newHome takes dir, or makes a temporary folder below root if dir is empty.
func newHome(dir, root, prefix string) (*home, error) {
	h := &home{dir: dir, temporary: dir == ""}
	var err error
	if h.temporary {
		h.dir, err = os.MkdirTemp(root, prefix)
	} else {
		err = h.keep(dir)
	}
	if err != nil {
		return nil, fmt.Errorf("make the server's folder: %w", err)
	}
	remove := ""
	if h.temporary {
		remove = h.dir
	}
	if h.dog, err = startWatchdog(remove); err != nil {
		return nil, errors.Join(err, h.restore())
	}
	return h, nil
}

// keep makes a folder that stays, if it is missing, and remembers what it found.
func (h *home) keep(dir string) (err error) {
	if h.dir, err = filepath.Abs(dir); err != nil {
		return err
	}
	if h.missing, err = MissingFoldersOf(h.dir); err != nil {
		return err
	}
	// Others may pass through the folders above it, since the server may run as another user.
	if err = os.MkdirAll(filepath.Dir(h.dir), 0o711); err == nil {
		err = os.MkdirAll(h.dir, 0o700)
	}
	if err == nil {
		h.entries, err = os.ReadDir(h.dir)
	}
	if err == nil {
		h.owner, err = ownerOf(h.dir)
	}
	if err != nil {
		return errors.Join(err, h.missing.Remove())
	}
	return nil
}

// close dismisses the watchdog and removes what is temporary. The server must have ended.
func (h *home) close() error {
	err := h.removeFiles()
	h.dog.stop()
	return err
}

// abandon is close after a start that failed: it leaves the folder as newHome found it. The server must have ended.
func (h *home) abandon() error {
	err := h.restore()
	h.dog.stop()
	return err
}

func (h *home) restore() error {
	switch {
	case h.temporary:
		return h.removeFiles()
	case len(h.missing) > 0:
		return h.missing.Remove()
	}
	now, err := os.ReadDir(h.dir)
	errs := []error{err}
	for _, entry := range now {
		if !slices.ContainsFunc(h.entries, func(e os.DirEntry) bool { return e.Name() == entry.Name() }) {
			errs = append(errs, os.RemoveAll(filepath.Join(h.dir, entry.Name())))
		}
	}
	return errors.Join(append(errs, h.owner.take(h.dir))...)
}

func (h *home) removeFiles() error {
	if !h.temporary {
		return nil
	}
	if err := os.RemoveAll(h.dir); err != nil {
		return fmt.Errorf("remove the server's folder: %w", err)
	}
	return nil
}

// MissingFolders are a folder and those above it that were missing at some time, the innermost first.
type MissingFolders []string

// MissingFoldersOf says which of dir and the folders above it are missing now: those that making it would make.
func MissingFoldersOf(dir string) (MissingFolders, error) {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, fmt.Errorf("servers: %w", err)
	}
	var missing MissingFolders
	for {
		if _, err := os.Lstat(dir); !errors.Is(err, os.ErrNotExist) {
			return missing, nil
		}
		missing = append(missing, dir)
		dir = filepath.Dir(dir)
	}
}

// Remove removes the innermost folder with all that is in it, if it has been made by now, and those above it that are empty.
func (m MissingFolders) Remove() error {
	if len(m) == 0 {
		return nil
	}
	if err := os.RemoveAll(m[0]); err != nil {
		return fmt.Errorf("servers: %w", err)
	}
	for _, above := range m[1:] {
		if err := os.Remove(above); err != nil && !errors.Is(err, os.ErrNotExist) {
			return nil // somebody else uses it by now
		}
	}
	return nil
}

// newPassword makes a password that needs no quoting anywhere.
func newPassword() string { return rand.Text() }
