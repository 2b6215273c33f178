package scheduler_test

import (
	"strings"
	"testing"
	"time"

	"github.com/carpool-go/carpool/scheduler"
	"github.com/carpool-go/carpool/tasks"
)

func TestEntry_ValidateNamesEverythingThatIsWrongByItsField(t *testing.T) {
	t.Parallel()
	err := scheduler.Entry{
		Name: "a b", Cron: "9 9", TimeZone: "Mars", Missed: "never", Overlap: "always",
		Options: tasks.Options{Queue: "c d", MaxRetry: 1 << 40, Timeout: time.Millisecond, Retention: -1, Isolation: "serializable"},
	}.Validate()
	if err == nil {
		t.Fatal("there is no error")
	}
	lines := strings.Split(err.Error(), "\n")
	for i, field := range []string{"name", "payload", "queue", "max_retry", "timeout", "retention", "isolation", "missed", "overlap", "time_zone", "cron"} {
		if i >= len(lines) || !strings.HasPrefix(lines[i], field+": ") {
			t.Errorf("line %d is not of %s:\n%v", i+1, field, err)
		}
	}
}
