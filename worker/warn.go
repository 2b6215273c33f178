package worker

import (
	"context"
	"log/slog"

	"github.com/redis/go-redis/v9"

	"github.com/carpool-go/carpool/dbpool"
	"github.com/carpool-go/carpool/worker/internal/doctor"
)

// warnOfEviction says so if Redis is set to drop keys when its memory is full:
// the keys are jobs.
func warnOfEviction(ctx context.Context, rdb redis.UniversalClient, log *slog.Logger) {
	policy, err := doctor.EvictionPolicy(ctx, rdb)
	if err != nil || policy == "" {
		return // not every hosted Redis shows it
	}
	if policy != doctor.NoEviction {
		log.Warn("Redis may drop jobs when its memory is full; set its maxmemory-policy to noeviction", "maxmemory_policy", policy)
	}
}

// warnOfBudget says so if the database can't hold this instance twice, as it must
// during a deploy. How many instances there are, one of them can't know.
func warnOfBudget(ctx context.Context, db *dbpool.Pool, pool dbpool.Config, log *slog.Logger) {
	budget, err := doctor.WorkerBudget(ctx, db, pool)
	if err != nil {
		return // a pooler, or a role that may not look, doesn't tell
	}
	if warning := budget.Warning(1); warning != "" {
		log.Warn("the database may run out of connections", "why", warning)
	}
}
