package main

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/lmittmann/tint"
	"github.com/mattn/go-isatty"
)

// newLogger logs to w: tinted text for people, JSON for machines.
func newLogger(w io.Writer, level slog.Level, format string) *slog.Logger {
	terminal := isTerminal(w)
	if format == "text" || format == "auto" && terminal {
		return slog.New(tint.NewTextHandler(w, &tint.Options{Level: level, NoColor: !terminal || os.Getenv("NO_COLOR") != ""}))
	}
	return slog.New(slog.NewJSONHandler(w, &slog.HandlerOptions{Level: level}))
}

func isTerminal(w io.Writer) bool {
	file, ok := w.(*os.File)
	return ok && isatty.IsTerminal(file.Fd())
}

// asynqLog lets asynq log through slog. What asynq says of its own comings and
// goings is for debugging; what it says of single tasks the frame's record says
// better.
//
// While Redis is away each of its loops says so each time; of errors that begin
// alike, one is logged in asynqQuiet.
type asynqLog struct {
	log *slog.Logger

	mu   sync.Mutex
	said map[string]time.Time // by how the message begins
}

const asynqQuiet = 10 * time.Second

func (l *asynqLog) Debug(args ...any) { l.log.Debug(fmt.Sprint(args...)) }
func (l *asynqLog) Info(args ...any)  { l.log.Debug(fmt.Sprint(args...)) }

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
	if strings.HasPrefix(message, "Retry exhausted for task") || strings.HasPrefix(message, "Quitting worker.") {
		l.log.Debug(message)
		return
	}
	l.log.Warn(message)
}

// redisLog lets go-redis log through slog. It speaks only of connections that
// it is going to replace.
type redisLog struct{ log *slog.Logger }

func (l redisLog) Printf(_ context.Context, format string, v ...any) {
	l.log.Debug(fmt.Sprintf(format, v...))
}
