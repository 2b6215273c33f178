package delivery

import (
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"time"
)

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
	if strings.HasPrefix(message, "Retry exhausted for task") || strings.HasPrefix(message, "Quitting worker.") {
		return
	}
	l.log.Warn(message)
}
