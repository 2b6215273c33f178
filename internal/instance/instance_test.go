package instance_test

import (
	"strings"
	"testing"

	"github.com/carpool-go/carpool/internal/asynqwire"
	"github.com/carpool-go/carpool/internal/instance"
)

func TestNewName_IsFitForAQueue(t *testing.T) {
	t.Parallel()
	for begins, want := range map[string]string{
		"":                       "worker-",
		"srv-abc":                "srv-abc-",
		"a}b {c\n\x00é":          "a-b--c----",
		strings.Repeat("x", 300): strings.Repeat("x", 60) + "-",
	} {
		name := instance.NewName(begins)
		queue := instance.Queue(name)
		if !strings.HasPrefix(name, want) || len(name) != len(want)+8 || !asynqwire.IsQueueName(queue) || !instance.IsQueue(queue) {
			t.Errorf("%q becomes %q", begins, name)
		}
	}
}
