package testservers

import (
	"bytes"
	"strings"
	"sync"
	"testing"
	"time"
)

// patience is how long a test waits for what comes at once unless something is broken. It is generous: the machine may be
// busy with other packages' tests.
const patience = time.Minute

// Eventually waits for a condition that nothing announces, for a minute at most.
func Eventually(t testing.TB, what string, holds func() bool) {
	t.Helper()
	for giveUp := time.Now().Add(patience); !holds(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(giveUp) {
			t.Fatalf("it does not come about that %s", what)
		}
	}
}

// Log keeps what is written to it, by several goroutines too, and can wait for a text to come up in it. The zero value is empty
// and ready.
type Log struct {
	mu    sync.Mutex
	buf   bytes.Buffer
	grown chan struct{} // closed when more is written; nil: nobody waits
}

// Write appends to the log. It never fails.
func (l *Log) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.grown != nil {
		close(l.grown)
		l.grown = nil
	}
	return l.buf.Write(p)
}

// String returns all that was written.
func (l *Log) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.String()
}

// Wait waits until the text is in the log, for a minute at most.
func (l *Log) Wait(t testing.TB, text string) {
	t.Helper()
	giveUp := time.After(patience)
	for {
		found, grown := l.has(text)
		if found {
			return
		}
		select {
		case <-grown:
		case <-giveUp:
			t.Fatalf("%q does not come up in the log:\n%s", text, l)
		}
	}
}

// has reports whether the text is in the log, and returns a channel that is closed when more is written.
func (l *Log) has(text string) (found bool, grown <-chan struct{}) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.grown == nil {
		l.grown = make(chan struct{})
	}
	return strings.Contains(l.buf.String(), text), l.grown
}
