package servers

import (
	"fmt"
	"io"
	"os/exec"
	"path/filepath"
	"sync"
	"syscall"
	"time"
)

// Program is a program that runs beside the servers and, like them, never outlives us.
type Program struct {
	process *process
	dog     *watchdog
	once    sync.Once
}

// StartProgram starts cmd, whose output goes to log, in a process group of its own, so that Ctrl-C reaches us and not it.
// It runs until it ends or Stop is called; if we are killed with -9, so is it.
func StartProgram(cmd *exec.Cmd, log io.Writer) (*Program, error) {
	dog, err := startWatchdog("")
	if err != nil {
		return nil, fmt.Errorf("servers: %w", err)
	}
	p, err := startProcess(cmd, filepath.Base(cmd.Path), log, syscall.SIGKILL)
	if err != nil {
		dog.stop()
		return nil, fmt.Errorf("servers: %w", err)
	}
	dog.watch(p.pid())
	return &Program{process: p, dog: dog}, nil
}

// PID is its process id.
func (p *Program) PID() int { return p.process.pid() }

// Done is closed when the program has ended.
func (p *Program) Done() <-chan struct{} { return p.process.done }

// Err is what a program that has ended says for itself: nil if it ended well, else its exit code and the end of its output.
func (p *Program) Err() error {
	if !p.process.ended() || p.process.err == nil {
		return nil
	}
	return p.process.failure()
}

// Stop sends SIGTERM, waits for the program to end, and kills it if that takes longer than grace. Stopping twice is safe.
func (p *Program) Stop(grace time.Duration) {
	p.once.Do(func() {
		p.process.stop(grace, syscall.SIGTERM)
		<-p.process.done
		p.dog.stop()
	})
}

// Folder is a temporary folder that is removed even if we are killed with -9, where there is a watchdog for it (on unix).
type Folder struct{ home *home }

// NewFolder makes a folder, in the system's own place for temporary ones, whose name begins with prefix.
func NewFolder(prefix string) (*Folder, error) {
	home, err := newHome("", "", prefix)
	if err != nil {
		return nil, fmt.Errorf("servers: %w", err)
	}
	return &Folder{home: home}, nil
}

// Path is where the folder is.
func (f *Folder) Path() string { return f.home.dir }

// Remove removes the folder and all that is in it.
func (f *Folder) Remove() error {
	if err := f.home.close(); err != nil {
		return fmt.Errorf("servers: %w", err)
	}
	return nil
}
