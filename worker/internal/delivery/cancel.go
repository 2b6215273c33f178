package delivery

import (
	"context"
	"log/slog"
	"time"

	"github.com/carpool-go/carpool/internal/asynqwire"
)

// finishCancelled takes a job that was cancelled while it ran from those to be retried,
// where asynq puts it. run is nil if it had not begun.
func (x *Executor) finishCancelled(queue, id string, run *jobRun) {
	var done bool
	var result []byte
	if run != nil && run.done {
		done, result = true, run.result
	}
	began := time.Now()
	for time.Since(began) < 2*time.Second || time.Since(began) < time.Minute && x.ending.Err() == nil {
		time.Sleep(20 * time.Millisecond)
		if finished, _ := asynqwire.FinishCancelled(context.Background(), x.rdb, x.inspector, queue, id, done, result); finished {
			return
		}
	}
	x.log.Warn("a cancelled job could not be put away; it stays among those to be retried, in a hundred years", slog.Group("job", "id", id, "queue", queue))
}
