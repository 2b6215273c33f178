package worker

import (
	"log/slog"
	"strings"
	"testing"

	"github.com/carpool-go/carpool/dbpool"
	"github.com/carpool-go/carpool/internal/servers"
	"github.com/carpool-go/carpool/internal/testservers"
	"github.com/carpool-go/carpool/worker/internal/workertest"
)

func TestWarn_OfARedisThatDropsJobsAndADatabaseWithTooFewConnections(t *testing.T) {
	t.Parallel()
	var said strings.Builder
	log := slog.New(slog.NewTextHandler(&said, nil))
	own, err := servers.StartRedis(t.Context(), servers.RedisConfig{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = own.Stop() })
	rdb := workertest.OpenRedis(t, own.URL())
	pool := dbpool.DefaultConfig(testservers.Postgres(t))
	db, err := dbpool.Open(t.Context(), pool)
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()

	warnOfEviction(t.Context(), rdb, log)
	warnOfBudget(t.Context(), db, pool, log)
	if said.Len() > 0 {
		t.Errorf("where all is well it says\n%s", said.String())
	}
	if err := rdb.ConfigSet(t.Context(), "maxmemory-policy", "allkeys-lru").Err(); err != nil {
		t.Fatal(err)
	}
	pool.Size = 400
	warnOfEviction(t.Context(), rdb, log)
	warnOfBudget(t.Context(), db, pool, log)
	for _, want := range []string{"maxmemory_policy=allkeys-lru", "406 connections, and as many again during a deploy, are 812"} {
		if !strings.Contains(said.String(), want) {
			t.Errorf("no %q in\n%s", want, said.String())
		}
	}
}
