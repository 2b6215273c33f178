package wait_test

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"github.com/carpool-go/carpool/internal/wait"
)

func TestFor_ReturnsNilWhenTheTimeIsOver(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		began := time.Now()
		if err := wait.For(t.Context(), time.Hour); err != nil {
			t.Fatal(err)
		}
		if waited := time.Since(began); waited != time.Hour {
			t.Errorf("it waited for %s", waited)
		}
	})
}

func TestFor_ReturnsTheCauseWhenTheContextEnds(t *testing.T) {
	t.Parallel()
	cause := errors.New("the house is on fire")
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancelCause(t.Context())
		time.AfterFunc(time.Minute, func() { cancel(cause) })
		began := time.Now()
		if err := wait.For(ctx, time.Hour); !errors.Is(err, cause) {
			t.Errorf("%v, want the context's cause", err)
		}
		if waited := time.Since(began); waited != time.Minute {
			t.Errorf("it waited for %s", waited)
		}
		// An end in the past goes before a wait that is none.
		if err := wait.For(ctx, 0); !errors.Is(err, cause) {
			t.Errorf("%v, want the context's cause", err)
		}
	})
}
