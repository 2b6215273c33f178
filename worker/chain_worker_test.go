package worker_test

import (
	"context"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/carpool-go/carpool/tasks"
)

// chainStep is a job whose effect is a row in the table steps and the next step.
type chainStep struct {
	Chain int `json:"chain"`
	Step  int `json:"step"`
	Steps int `json:"steps"` // that the chain is to have
}

func (chainStep) Kind() string { return "chain:step" }
func (chainStep) Options() tasks.Options {
	return tasks.Options{MaxRetry: 20, Timeout: time.Minute}
}
func (chainStep) Validate() error { return nil }

// chainTasks is the group of the chains' kind.
type chainTasks struct{}

func (chainTasks) Register(s *tasks.Set) {
	tasks.RegisterTx(s, func(ctx context.Context, job *tasks.Job, tx pgx.Tx, c chainStep) (any, error) {
		_, err := tx.Exec(ctx, "INSERT INTO steps (chain, step) VALUES ($1, $2)", c.Chain, c.Step)
		if err != nil || c.Step == c.Steps {
			return nil, err
		}
		next := c
		next.Step++
		_, err = job.Client.EnqueueTx(ctx, tx, next, nil)
		return nil, err
	})
}
