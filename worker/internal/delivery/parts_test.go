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

func TestFetcher_SaysWhyNoJobsAreFetched(t *testing.T) {
	t.Parallel()
	long := time.Now().Add(-2 * stillAfter)
	for name, c := range map[string]struct {
		f    *fetcher
		want string
	}{
		"it fetches":               {&fetcher{slots: 2, moved: time.Now()}, ""},
		"all slots are busy":       {&fetcher{slots: 2, running: 2, moved: long}, ""},
		"nobody asks":              {&fetcher{slots: 2, running: 1, moved: long}, "no fetch was made in 20s, although slots are free"},
		"one answer was lost":      {&fetcher{slots: 2, failed: 1, moved: time.Now()}, ""},
		"Redis does not answer":    {&fetcher{slots: 2, failed: 2, moved: time.Now()}, "Redis does not answer fetches; the log says more"},
		"the worker stops":         {&fetcher{slots: 2, stopped: true, moved: time.Now()}, "no more jobs are fetched: the worker stops"},
		"a slot has just got free": {freed(&fetcher{slots: 2, running: 2, moved: long}), ""},
	} {
		if got := c.f.fault(); got != c.want {
			t.Errorf("%s: %q, want %q", name, got, c.want)
		}
	}
}

func freed(f *fetcher) *fetcher {
	f.free()
	return f
}
