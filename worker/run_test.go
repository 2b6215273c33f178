package worker_test

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/carpool-go/carpool/dbpool"
	"github.com/carpool-go/carpool/scheduler"
	"github.com/carpool-go/carpool/tasks"
	"github.com/carpool-go/carpool/tasks/maintenance"
	"github.com/carpool-go/carpool/tasks/rowsprune"
	"github.com/carpool-go/carpool/worker"
	"github.com/carpool-go/carpool/worker/internal/workertest"
)

// lifecycle is a group that has something to start and stop.
type lifecycle struct {
	fail    error
	ctx     context.Context // of Start
	stopped bool
	ended   bool // ctx had ended when Stop was called
}

func (*lifecycle) Register(*tasks.Set) {}

func (l *lifecycle) Start(ctx context.Context) error {
	l.ctx = ctx
	return l.fail
}

func (l *lifecycle) Stop() { l.stopped, l.ended = true, l.ctx.Err() != nil }

func burst(b *workertest.Bundle, groups ...tasks.Group) worker.Config {
	return worker.Config{
		RedisURL: b.RedisURL, Pool: dbpool.DefaultConfig(b.DatabaseURL), Groups: groups,
		Burst: true, Name: "shop", Logger: workertest.Discard(),
	}
}

func TestRun_GroupsLiveFromTheStartToTheEndOfTheRun(t *testing.T) {
	t.Parallel()
	b := workertest.Setup(t)
	group := new(lifecycle)
	if err := worker.Run(t.Context(), burst(b, group)); err != nil {
		t.Fatal(err)
	}
	if !group.stopped || !group.ended {
		t.Errorf("stopped %t, its context had ended %t", group.stopped, group.ended)
	}
}

func TestRun_AGroupThatDoesNotStartStopsWhatHasStarted(t *testing.T) {
	t.Parallel()
	b := workertest.Setup(t)
	closed := errors.New("the shop is closed")
	first, second := new(lifecycle), &lifecycle{fail: closed}
	err := worker.Run(t.Context(), burst(b, first, second))
	if !errors.Is(err, closed) || !strings.Contains(err.Error(), "start *worker_test.lifecycle") {
		t.Errorf("error %v", err)
	}
	if !first.stopped || second.stopped {
		t.Errorf("the first was stopped %t, the second %t", first.stopped, second.stopped)
	}
	rdb := b.Redis(t)
	if names := rdb.ZRange(t.Context(), "carpool:instances", 0, -1).Val(); len(names) > 0 {
		t.Errorf("the instance is still in Redis: %q", names)
	}
	if queues := rdb.SMembers(t.Context(), "asynq:queues").Val(); len(queues) > 0 {
		t.Errorf("its queue is still listed: %q", queues)
	}
}

func TestRun_ThatEndsBeforeItHasStartedReturnsTheCause(t *testing.T) {
	t.Parallel()
	enough := errors.New("enough")
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(enough)
	cfg := worker.Config{
		RedisURL: "redis://127.0.0.1:1", Pool: dbpool.DefaultConfig("postgres://127.0.0.1:1/x"), Logger: workertest.Discard(),
	}
	if err := worker.Run(ctx, cfg); !errors.Is(err, enough) {
		t.Errorf("error %v", err)
	}
}

func TestMigrate_ShowsNothingOfAWrongURL(t *testing.T) {
	t.Parallel()
	err := worker.Migrate(t.Context(), "postgres://u:s3cr3t@localhost/x?s3cr3t", workertest.Discard())
	if err == nil || !strings.Contains(err.Error(), "a parameter behind the ? is not name=value") || strings.Contains(err.Error(), "s3cr3t") {
		t.Errorf("error %v", err)
	}
}

func TestConfig_ValidateNamesEveryFaultAndNoSecret(t *testing.T) {
	t.Parallel()
	prune := maintenance.Prune{}
	cfg := worker.Config{
		RedisURL: "redis:/:s3cr3t@host", Pool: dbpool.DefaultConfig("postgres://u:s3cr3t@host:port/x"),
		Groups: []tasks.Group{&Shop{}, &Shop{}}, Queues: map[string]int{"a b": 1, "instance-x": 1, "low": 1001},
		Schedules: []scheduler.Entry{
			{Name: "carpool-prune", Cron: "@daily", Payload: prune},
			{Name: "twice", Cron: "@daily", Payload: prune},
			{Name: "twice", Cron: "@daily", Payload: prune},
			{Name: "never", Cron: "x", Payload: prune},
			{Name: "large", Cron: "@daily", Payload: rowsprune.Prune{Table: "a." + strings.Repeat("x", 50), Column: "c", OlderThan: "1d"}},
		},
		Concurrency: 10_001, ValidateEvery: time.Millisecond, MaxPayload: 64, OutboundAllow: "10.0.0.0/99", HealthAddr: "8081",
	}
	err := cfg.Validate()
	if err == nil {
		t.Fatal("it is taken")
	}
	text := err.Error()
	for _, want := range []string{
		"RedisURL: ", "Pool: ", `Groups: tasks: Register: kind "order:book" is registered twice`,
		`Schedules: entry "carpool-prune": name: there are two of it`, `Schedules: entry "twice": name: there are two of it`,
		`Schedules: entry "never": `, `Queues: "a b" is no queue's name`, `Queues: "instance-x": names that begin with instance-`,
		`Queues: "low" has the weight 1001`, "Concurrency: 10001 is not", "ValidateEvery: 1ms is less", "OutboundAllow: ", `HealthAddr: "8081" is not host:port`,
		"MaxPayload: 64 is not from 1024 to 16777216 bytes", `Schedules: entry "large": payload: `,
	} {
		if !strings.Contains(text, "\n"+want) && !strings.HasPrefix(text, want) {
			t.Errorf("%q is not said", want)
		}
	}
	if strings.Contains(text, "s3cr3t") {
		t.Error("a password is shown")
	}
	if t.Failed() {
		t.Log(text)
	}
	if err := burst(&workertest.Bundle{RedisURL: "redis://h", DatabaseURL: "postgres://h/x"}).Validate(); err != nil {
		t.Errorf("one that is right: %v", err)
	}
}
