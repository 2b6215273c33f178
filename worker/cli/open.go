package cli

import (
	"context"
	"log/slog"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/carpool-go/carpool/admin"
	"github.com/carpool-go/carpool/dbpool"
	"github.com/carpool-go/carpool/tasks"
)

// open opens Redis for a command, which says itself what is wrong with it.
func (s redisSettings) open(in *invocation) (redis.UniversalClient, error) {
	f := in.faults()
	url := f.redisURL(s.RedisURL)
	if err := f.err(); err != nil {
		return nil, err
	}
	in.process.logRedis(slog.New(slog.DiscardHandler))
	return tasks.OpenRedis(url)
}

// commandTimeout bounds what a command waits for a connection.
const commandTimeout = 10 * time.Second

// open opens a pool of a single connection for a command, which connects when it is used.
func (s databaseSettings) open(in *invocation) (*dbpool.Pool, error) {
	f := in.faults()
	url := f.databaseURL(s.DatabaseURL)
	if err := f.err(); err != nil {
		return nil, err
	}
	cfg := dbpool.DefaultConfig(url)
	cfg.Size, cfg.MaxOverflow, cfg.Timeout = 1, 0, commandTimeout
	cfg.Logger = slog.New(slog.DiscardHandler)
	cfg.ThroughPooler = true // it may be; for a few statements it makes no difference
	return dbpool.Open(context.Background(), cfg)
}

// withAdmin opens both servers for as long as use takes, the database only if it is set.
func (in *invocation) withAdmin(r redisSettings, d databaseSettings, use func(*admin.Admin) error) error {
	f := in.faults()
	f.redisURL(r.RedisURL)
	if d.DatabaseURL != "" {
		f.databaseURL(d.DatabaseURL)
	}
	if err := f.err(); err != nil {
		return err
	}
	rdb, err := r.open(in)
	if err != nil {
		return err
	}
	defer rdb.Close()
	if d.DatabaseURL == "" {
		return use(admin.New(rdb, nil))
	}
	db, err := d.open(in)
	if err != nil {
		return err
	}
	defer db.Close()
	return use(admin.New(rdb, db))
}
