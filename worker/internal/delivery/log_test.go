package delivery

import (
	"bytes"
	"errors"
	"log/slog"
	"strings"
	"testing"
)

func TestAsynqLog_KeepsWhatGoesWrongAndDropsTheRestAtAnyLevel(t *testing.T) {
	t.Parallel()
	var out bytes.Buffer
	log := &asynqLog{log: slog.New(slog.NewTextHandler(&out, &slog.HandlerOptions{Level: slog.LevelDebug}))}
	log.Debug("Scheduler heatbeater shutting down")
	log.Info("Starting processing")
	log.Info("Pushed task id=1 back to queue")
	log.Warn("Quitting worker. task id=1")
	if out.Len() > 0 {
		t.Errorf("it logs\n%s", out.String())
	}
	log.Warn("Lease reset failed for 1")
	log.Error("Dequeue error: ", errors.New("refused"))
	log.Fatal("no way on")
	for _, want := range []string{"level=WARN msg=\"Lease reset failed for 1\"", "level=ERROR msg=\"Dequeue error: refused\"", "level=ERROR msg=\"no way on\""} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("it does not log %s:\n%s", want, out.String())
		}
	}
}
