package cli

import (
	"context"
	"log/slog"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/carpool-go/carpool/admin"
	"github.com/carpool-go/carpool/dbpool"
	"github.com/carpool-go/carpool/internal/startup"
)

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
	return in.withRedis(r, func(rdb redis.UniversalClient) error {
		if d.DatabaseURL == "" {
			return use(admin.New(rdb, nil))
		}
		return in.withDatabase(d, func(db *dbpool.Pool) error { return use(admin.New(rdb, db)) })
	})
}

// withDatabase opens the database for as long as use takes, and explains its errors.
func (in *invocation) withDatabase(s databaseSettings, use func(*dbpool.Pool) error) error {
	db, err := s.open(in)
	if err != nil {
		return err
	}
	defer db.Close()
	err, _ = startup.Explain("DATABASE_URL", s.DatabaseURL, use(db))
	return err
}
