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
)

// ErrNotFound says that a server's program is not on this machine. The error that wraps it names what to install.
var ErrNotFound = errors.New("not found")

// home is a server's folder and the watchdog over it.
type home struct {
	dir       string
	temporary bool
	dog       *watchdog
}

// newHome takes dir, or makes a temporary folder below root if dir is empty.
func newHome(dir, root, prefix string) (*home, error) {
	h := &home{dir: dir, temporary: dir == ""}
	var err error
	if h.temporary {
		h.dir, err = os.MkdirTemp(root, prefix)
	} else if h.dir, err = filepath.Abs(dir); err == nil {
		err = os.MkdirAll(h.dir, 0o700)
	}
	if err != nil {
		return nil, fmt.Errorf("make the server's folder: %w", err)
	}
	remove := ""
	if h.temporary {
		remove = h.dir
	}
	if h.dog, err = startWatchdog(remove); err != nil {
		_ = h.removeFiles()
		return nil, err
	}
	return h, nil
}

// close dismisses the watchdog and removes what is temporary. The server must have ended.
func (h *home) close() error {
	err := h.removeFiles()
	h.dog.stop()
	return err
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

// newPassword makes a password that needs no quoting anywhere.
func newPassword() string { return rand.Text() }
