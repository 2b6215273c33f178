package delivery

import (
	"context"
	"testing"
	"time"

	"github.com/carpool-go/carpool/dbpool"
	"github.com/carpool-go/carpool/tasks"
	"github.com/carpool-go/carpool/worker/internal/workertest"
)

func TestDelivery_ItsPartsMayBeStoppedTwiceAndWithoutStart(t *testing.T) {
	t.Parallel()
	b := setup(t)
	cfg := dbpool.DefaultConfig(b.DatabaseURL)
	cfg.Logger = workertest.Discard()
	db, err := dbpool.Open(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	for _, start := range []bool{true, false} {
		d := New(Config{
			Tasks: new(tasks.Set), Redis: b.Redis(t), ServersRedis: b.Redis(t), LooksRedis: b.Redis(t), DB: db,
			Queues: map[string]int{"default": 1}, OwnQueue: "instance-x-00000000", Concurrency: 2,
			ShutdownTimeout: time.Second, BaseContext: context.Background(), Fail: func(err error) { t.Error(err) }, Log: workertest.Discard(),
		})
		parts := []interface {
			Start() error
			Stop()
		}{d.Servers, d.Rescue, d.Executor, d.Breaker}
		for _, p := range parts {
			if !start {
				break
			}
			if err := p.Start(); err != nil {
				t.Fatal(err)
			}
		}
		for range 2 {
			for _, p := range parts {
				p.Stop()
			}
		}
	}
}
