package worker

import (
	"context"
	"log/slog"
	"strings"

	"github.com/redis/go-redis/v9"

	"github.com/carpool-go/carpool/dbpool"
	"github.com/carpool-go/carpool/internal/asynqwire"
	"github.com/carpool-go/carpool/internal/instance"
)

// checkRedis asks Redis for what a worker can't do without: scripts, with asynq's keys and
// with carpool's. A user whose ACL forbids them would fetch no job, and say so again and
// again.
func checkRedis(ctx context.Context, rdb redis.UniversalClient) error {
	for _, key := range []string{asynqwire.Queues, instance.Names} {
		if err := rdb.Eval(ctx, `return redis.call("EXISTS", KEYS[1])`, []string{key}).Err(); err != nil {
			return err
		}
	}
	return nil
}

// warnOfEviction says so if Redis is set to drop keys when its memory is full:
// the keys are jobs.
func warnOfEviction(ctx context.Context, rdb redis.UniversalClient, log *slog.Logger) {
	memory, err := rdb.Info(ctx, "memory").Result()
	if err != nil {
		return // not every hosted Redis shows it
	}
	for line := range strings.Lines(memory) {
		policy, ok := strings.CutPrefix(strings.TrimSpace(line), "maxmemory_policy:")
		if ok && policy != "noeviction" {
			log.Warn("Redis may drop jobs when its memory is full; set its maxmemory-policy to noeviction", "maxmemory_policy", policy)
		}
	}
}

// warnOfBudget says so if the database can't hold this instance twice, as it must
// during a deploy. How many instances there are, one of them can't know.
func warnOfBudget(ctx context.Context, db *dbpool.Pool, log *slog.Logger) {
	budget, err := db.Budget(ctx)
	if err != nil {
		return // a pooler, or a role that may not look, doesn't tell
	}
	budget.PerInstance++ // the relay's
	if warning := budget.Warning(1); warning != "" {
		log.Warn("the database may run out of connections", "why", warning)
	}
}
