package worker_test

import (
	"context"
	"log/slog"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/carpool-go/carpool/internal/asynqwire"
	"github.com/carpool-go/carpool/internal/asynqwire/wiretest"
	"github.com/carpool-go/carpool/tasks"
	"github.com/carpool-go/carpool/tasks/maintenance"
	"github.com/carpool-go/carpool/worker"
	"github.com/carpool-go/carpool/worker/internal/workertest"
)

func TestRun_ABurstEndsAndDoesTheRestWhereJobsHaveLostTheirData(t *testing.T) {
	t.Parallel()
	for _, how := range append(wiretest.Losses(), "unreadable") {
		t.Run(how, func(t *testing.T) {
			t.Parallel()
			b := workertest.Setup(t)
			rdb := b.Redis(t)
			for _, state := range asynqwire.States() {
				wiretest.Put(t, rdb, "default", state+"-lost", state)
				wiretest.Lose(t, rdb, "default", state+"-lost", how)
			}
			due := float64(time.Now().Add(-time.Minute).Unix())
			for _, set := range []string{asynqwire.Scheduled("default"), asynqwire.Retry("default")} {
				id := rdb.ZRange(t.Context(), set, 0, 0).Val()[0]
				if err := rdb.ZAdd(t.Context(), set, redis.Z{Score: due, Member: id}).Err(); err != nil {
					t.Fatal(err)
				}
			}
			var sound []*tasks.Info // one behind each that is lost
			for _, at := range []time.Time{{}, time.Now().Add(time.Second)} {
				info, err := b.Client.Enqueue(t.Context(), maintenance.PoolValidate{}, &tasks.EnqueueOptions{Queue: "default", RunAt: at})
				if err != nil {
					t.Fatal(err)
				}
				sound = append(sound, info)
			}
			time.Sleep(time.Until(sound[1].RunAt))

			cfg, log := burst(b), workertest.NewLog()
			cfg.Logger = slog.New(slog.NewJSONHandler(log, nil))
			ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
			defer cancel()
			if err := worker.Run(ctx, cfg); err != nil || ctx.Err() != nil {
				t.Fatalf("it has not ended by itself: %v\n%s", err, log)
			}
			for _, info := range sound {
				if _, err := b.Wait(t, info); err != nil {
					t.Error(err)
				}
			}
			if how == "unreadable" {
				return // it has data, and stays where its worker left it
			}
			for _, state := range asynqwire.States() {
				at, err := asynqwire.Listed(t.Context(), rdb, "default", state+"-lost")
				if err != nil {
					t.Fatal(err)
				}
				want := map[string]string{"archived": "archived", "completed": "completed"}[state]
				if at != want {
					t.Errorf("the lost job that was %s is now %q, want %q", state, at, want)
				}
			}
			if text := log.String(); !strings.Contains(text, "jobs have lost their data") || !strings.Contains(text, `scheduled-lost`) || !strings.Contains(text, `"queue":"default"`) {
				t.Errorf("the log does not name them:\n%s", text)
			}
		})
	}
}

// restricted returns the URL of the bundle's Redis for a new user with these rules.
func restricted(t *testing.T, b *workertest.Bundle, user string, rules ...string) string {
	t.Helper()
	rdb := b.Redis(t)
	setUser(t, rdb, user, append([]string{"on", ">hush"}, rules...)...)
	t.Cleanup(func() { _ = rdb.Do(context.Background(), "ACL", "DELUSER", user).Err() })
	at, err := url.Parse(b.RedisURL)
	if err != nil {
		t.Fatal(err)
	}
	at.User = url.UserPassword(user, "hush")
	return at.String()
}

func setUser(t *testing.T, rdb redis.UniversalClient, user string, rules ...string) {
	t.Helper()
	args := []any{"ACL", "SETUSER", user}
	for _, rule := range rules {
		args = append(args, rule)
	}
	if err := rdb.Do(context.Background(), args...).Err(); err != nil {
		t.Error(err)
	}
}

func TestRun_AUserOfRedisWhoMayNotWorkFailsAtTheStart(t *testing.T) {
	t.Parallel()
	b := workertest.Setup(t)
	for user, rules := range map[string][]string{
		"no-scripts": {"~*", "&*", "+@all", "-@scripting"},
		"no-asynq":   {"~carpool:*", "&*", "+@all"},
		"no-carpool": {"~asynq:*", "&*", "+@all"},
	} {
		cfg := burst(b)
		cfg.RedisURL = restricted(t, b, user, rules...)
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
		err := worker.Run(ctx, cfg)
		cancel()
		if err == nil || !strings.HasPrefix(err.Error(), "REDIS_URL: the server forbids this user a command: NOPERM") || strings.Contains(err.Error(), "hush") {
			t.Errorf("%s: %v", user, err)
		}
	}
}

func TestRun_AUserOfRedisMayDoWithBothKeyPatterns(t *testing.T) {
	t.Parallel()
	b := workertest.Setup(t)
	info, err := b.Client.Enqueue(t.Context(), maintenance.PoolValidate{}, &tasks.EnqueueOptions{Queue: "default"})
	if err != nil {
		t.Fatal(err)
	}
	cfg := burst(b)
	cfg.RedisURL = restricted(t, b, "both", "~asynq:*", "~carpool:*", "&asynq:*", "+@all", "-@dangerous", "+info")
	if err := worker.Run(t.Context(), cfg); err != nil {
		t.Fatal(err)
	}
	if _, err := b.Wait(t, info); err != nil {
		t.Error(err)
	}
}

// lockOut takes the scripts from a user of Redis when the worker has seen that it may use them.
type lockOut struct{ do func() }

func (*lockOut) Register(*tasks.Set)           {}
func (l *lockOut) Start(context.Context) error { l.do(); return nil }
func (*lockOut) Stop()                         {}

func TestRun_ABurstThatCannotFetchWhatIsDueGivesUp(t *testing.T) {
	t.Parallel()
	b := workertest.Setup(t)
	if _, err := b.Client.Enqueue(t.Context(), maintenance.PoolValidate{}, &tasks.EnqueueOptions{Queue: "default"}); err != nil {
		t.Fatal(err)
	}
	rdb := b.Redis(t)
	cfg := burst(b, &lockOut{func() { setUser(t, rdb, "locked-out", "-@scripting") }})
	cfg.RedisURL = restricted(t, b, "locked-out", "~*", "&*", "+@all")
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	err := worker.Run(ctx, cfg)
	if want := "worker: jobs are due (1), and for 30s none was fetched; the log says why"; err == nil || err.Error() != want {
		t.Errorf("error %v, want %s", err, want)
	}
}
