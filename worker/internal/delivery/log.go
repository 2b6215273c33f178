package delivery

import (
	"context"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"time"
)

// jobLog is the handler of a job's logger, which says with each record which job it is. Most
// jobs log nothing, so that is put together when one does.
type jobLog struct {
	slog.Handler
	id, kind string
}

func (l *jobLog) with() slog.Handler {
	return l.Handler.WithAttrs([]slog.Attr{slog.Group("job", "id", l.id, "kind", l.kind)})
}

// Handle logs a record.
func (l *jobLog) Handle(ctx context.Context, r slog.Record) error { return l.with().Handle(ctx, r) }

// WithAttrs returns a handler with further attributes.
func (l *jobLog) WithAttrs(attrs []slog.Attr) slog.Handler { return l.with().WithAttrs(attrs) }

// WithGroup returns a handler for attributes of a group.
func (l *jobLog) WithGroup(name string) slog.Handler { return l.with().WithGroup(name) }

// asynqLog lets asynq log through slog. It drops what asynq says of its own comings and
// goings, and of single tasks, because the level debug is for the records of jobs, which
// say that better.
//
// While Redis is away each of its loops says so each time; of errors that begin
// alike, one is logged in asynqQuiet.
type asynqLog struct {
	log *slog.Logger

	mu   sync.Mutex
	said map[string]time.Time // by how the message begins
}

const asynqQuiet = 10 * time.Second

func (*asynqLog) Debug(...any) {}
func (*asynqLog) Info(...any)  {}

func (l *asynqLog) Error(args ...any) {
	message := fmt.Sprint(args...)
	begins := message[:min(len(message), len("Failed to forward"))]
	l.mu.Lock()
	defer l.mu.Unlock()
	if time.Since(l.said[begins]) < asynqQuiet {
		l.log.Debug(message)
		return
	}
	if l.said == nil {
		l.said = make(map[string]time.Time)
	}
	l.said[begins] = time.Now()
	l.log.Error(message)
}

// Fatal doesn't end the process, as asynq's own logger would: jobs that run
// must not be cut off by a log record.
func (l *asynqLog) Fatal(args ...any) { l.log.Error(fmt.Sprint(args...)) }

func (l *asynqLog) Warn(args ...any) {
	message := fmt.Sprint(args...)
	if strings.HasPrefix(message, "Quitting worker.") {
		return
	}
	l.log.Warn(message)
}
