package cli

import (
	"context"
	"log/slog"
	"time"

	"github.com/carpool-go/carpool/admin"
	"github.com/carpool-go/carpool/dbpool"
	"github.com/carpool-go/carpool/internal/startup"
)

// commandTimeout bounds what a command waits for a connection.
const commandTimeout = 10 * time.Second

// open opens a pool of a single connection for a command, which connects when it is used.
// log takes what the pool logs. The URL is one that [faults.databaseURL] finds right.
func (s databaseSettings) open(log *slog.Logger) (*dbpool.Pool, error) {
	cfg := dbpool.DefaultConfig(s.DatabaseURL)
	cfg.Size, cfg.MaxOverflow, cfg.Timeout = 1, 0, commandTimeout
	cfg.Logger = log
	cfg.ThroughPooler = true // it may be; for a few statements it makes no difference
	return dbpool.Open(context.Background(), cfg)
}

// withAdmin opens both servers for as long as use takes, the database only if it is set,
// and explains their errors.
func (in *invocation) withAdmin(r redisSettings, d databaseSettings, use func(*admin.Admin) error) error {
	return in.withServers(r, d, func(a *admin.Admin, explain explainer) error { return explain(use(a)) })
}

// explainer returns an error as it is shown: in terms of the variable of the server that it
// comes of, if that can't be used.
type explainer func(error) error

// withServers opens both servers as [invocation.withAdmin] does, for a use that explains
// errors itself.
func (in *invocation) withServers(r redisSettings, d databaseSettings, use func(*admin.Admin, explainer) error) error {
	f := in.faults()
	f.redisURL(r.RedisURL)
	if d.DatabaseURL != "" {
		f.databaseURL(d.DatabaseURL)
	}
	if err := f.err(); err != nil {
		return err
	}
	rdb, fault, err := r.openWatched(in)
	if err != nil {
		return err
	}
	defer rdb.Close()
	if d.DatabaseURL == "" {
		return use(admin.New(rdb, nil), func(err error) error { return fault.explain(r.RedisURL, err) })
	}
	db, err := d.open(slog.New(slog.DiscardHandler))
	if err != nil {
		return err
	}
	defer db.Close()
	return use(admin.New(rdb, db), func(err error) error {
		err, _ = startup.Explain("DATABASE_URL", d.DatabaseURL, fault.explain(r.RedisURL, err))
		return err
	})
}

// withDatabase opens the database for as long as use takes, and explains its errors.
func (in *invocation) withDatabase(s databaseSettings, use func(*dbpool.Pool) error) error {
	f := in.faults()
	f.databaseURL(s.DatabaseURL)
	if err := f.err(); err != nil {
		return err
	}
	db, err := s.open(slog.New(slog.DiscardHandler))
	if err != nil {
		return err
	}
	defer db.Close()
	err, _ = startup.Explain("DATABASE_URL", s.DatabaseURL, use(db))
	return err
}
