package servers

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os/exec"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"time"
)

// process is one running program: in a process group of its own, so that Ctrl-C reaches us and not it, and ended by the
// kernel when we die, where the kernel can (Pdeathsig on Linux). Its last words are kept for error messages.
type process struct {
	cmd  *exec.Cmd
	name string
	log  *logTail
	done chan struct{} // closed once the process has ended and been waited for
	err  error         // what Wait said; read it after done
}

// startProcess starts cmd. deathSignal is what the kernel sends it when we die.
func startProcess(cmd *exec.Cmd, name string, log io.Writer, deathSignal syscall.Signal) (*process, error) {
	p := &process{cmd: cmd, name: name, log: &logTail{next: log}, done: make(chan struct{})}
	cmd.Stdout, cmd.Stderr = p.log, p.log
	// A server's own children hold its output open. Wait for them, so that "done" means all of them, but not for ever.
	cmd.WaitDelay = 5 * time.Second
	detach(cmd, deathSignal)
	started := make(chan error)
	go func() {
		// The kernel sends the death signal when the thread that started the child ends, not the process. This goroutine
		// keeps its thread for as long as the child lives.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := cmd.Start()
		started <- err
		if err != nil {
			return
		}
		p.err = cmd.Wait()
		close(p.done)
	}()
	if err := <-started; err != nil {
		return nil, fmt.Errorf("start %s: %w", name, err)
	}
	return p, nil
}

func (p *process) pid() int { return p.cmd.Process.Pid }

func (p *process) ended() bool {
	select {
	case <-p.done:
		return true
	default:
		return false
	}
}

// wait waits until the process has ended. Its error is the context's, never the process's exit code.
func (p *process) wait(ctx context.Context) error {
	select {
	case <-p.done:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("%s (pid %d) has not ended: %w", p.name, p.pid(), context.Cause(ctx))
	}
}

// stop sends each signal in turn and gives the process grace to end after each; the last resort is to kill it.
func (p *process) stop(grace time.Duration, signals ...syscall.Signal) {
	for _, s := range append(signals, syscall.SIGKILL) {
		if p.ended() {
			return
		}
		p.signal(s)
		select {
		case <-p.done:
		case <-time.After(grace):
		}
	}
}

// failure is the error of a process that ended though it should not have: its exit code and its last words.
func (p *process) failure() error {
	why := "ended"
	if p.err != nil {
		why = p.err.Error()
	}
	if said := p.log.String(); said != "" {
		return fmt.Errorf("%s: %s; it said:\n%s", p.name, why, said)
	}
	return fmt.Errorf("%s: %s", p.name, why)
}

// run starts cmd and waits for its end. A context that ends kills it.
func run(ctx context.Context, cmd *exec.Cmd, name string, log io.Writer, started func(pid int)) error {
	p, err := startProcess(cmd, name, log, syscall.SIGKILL)
	if err != nil {
		return err
	}
	if started != nil {
		started(p.pid())
	}
	if err := p.wait(ctx); err != nil {
		p.stop(time.Second, syscall.SIGTERM)
		<-p.done
		return err
	}
	if started != nil {
		started(0)
	}
	if p.err != nil {
		return p.failure()
	}
	return nil
}

// logTail passes a program's output on and keeps the end of it.
type logTail struct {
	next io.Writer // nil: nobody listens

	mu   sync.Mutex
	last []byte
}

const logTailBytes = 4 << 10

func (l *logTail) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.last = append(l.last, b...)
	if over := len(l.last) - logTailBytes; over > 0 {
		l.last = append(l.last[:0], l.last[over:]...)
	}
	if l.next != nil {
		// A listener that fails must not take the server down with it.
		_, _ = l.next.Write(b)
	}
	return len(b), nil
}

func (l *logTail) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return strings.TrimSpace(string(l.last))
}

var errEnded = errors.New("ended while it was starting")

// until calls ready every few milliseconds until it says yes, the process ends or the context does.
func (p *process) until(ctx context.Context, ready func() bool) error {
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for {
		if ready() {
			return nil
		}
		select {
		case <-p.done:
			return fmt.Errorf("%w: %w", errEnded, p.failure())
		case <-ctx.Done():
			return fmt.Errorf("%s was not ready: %w; it said:\n%s", p.name, context.Cause(ctx), p.log)
		case <-tick.C:
		}
	}
}
