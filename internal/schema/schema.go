// Package schema holds carpool's own tables in Postgres, as migrations.
package schema

import (
	"context"
	"database/sql"
	"embed"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"time"

	"github.com/jackc/pgerrcode"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/jackc/pgx/v5/stdlib"
	"github.com/pressly/goose/v3"
	"github.com/pressly/goose/v3/database"
	"github.com/pressly/goose/v3/lock"

	"github.com/carpool-go/carpool/dbpool"
)

//go:embed migrations/*.sql
var migrations embed.FS

// versionTable is goose's own.
const versionTable = "carpool.schema_version"

// makeSchema comes before the first migration, since goose's table needs the
// schema. IF NOT EXISTS alone fails when two run at once, and needs the right to create
// schemas also where this one is there. The lock's number is "carpool" in ASCII.
const makeSchema = `DO $$ BEGIN
	PERFORM pg_advisory_xact_lock(27973166834872172);
	IF to_regnamespace('carpool') IS NULL THEN CREATE SCHEMA carpool; END IF;
END $$`

// errNoVersions is returned for a database that has carpool's tables and doesn't say of which
// version.
var errNoVersions = errors.New("schema: migrate: " + versionTable + " is empty although carpool's tables are there, as after a restore of the schema alone: " +
	"copy its rows too (pg_dump --data-only --table=" + versionTable + "), or DROP SCHEMA carpool CASCADE, if nothing in it is needed, and migrate again")

// Migrate brings the database at url up to date and logs each migration it
// applies. Several may run at once: an advisory lock lets one work and the
// others wait.
func Migrate(ctx context.Context, url string, log *slog.Logger) error {
	db, provider, err := open(url)
	if err != nil {
		return err
	}
	defer db.Close()
	if _, err := db.ExecContext(ctx, makeSchema); err != nil {
		return fmt.Errorf("schema: migrate: %w", err)
	}
	if err := checkVersions(ctx, db); err != nil {
		return err
	}
	results, err := provider.Up(ctx)
	for _, r := range results {
		log.Info("migration applied", "version", r.Source.Version, "took_ms", r.Duration.Milliseconds())
	}
	if err != nil {
		return fmt.Errorf("schema: migrate: %w", err)
	}
	if len(results) == 0 {
		log.Info("the database is up to date")
	}
	return nil
}

// checkVersions returns errNoVersions if the table of versions is there and empty, which goose
// calls a "missing zero version migration".
func checkVersions(ctx context.Context, db *sql.DB) error {
	var there, any bool
	err := db.QueryRowContext(ctx, "SELECT to_regclass($1) IS NOT NULL", versionTable).Scan(&there)
	if err == nil && there {
		err = db.QueryRowContext(ctx, "SELECT EXISTS (SELECT FROM "+versionTable+")").Scan(&any)
	}
	if err != nil {
		return fmt.Errorf("schema: migrate: %w", err)
	}
	if there && !any {
		return errNoVersions
	}
	return nil
}

// ErrBehind is wrapped by [Check]'s error for a database that lacks migrations.
var ErrBehind = errors.New("the database lacks carpool's tables, or their newest form; run the command migrate")

// Check reports whether the database has every migration this
// program was built with; if not, the error wraps [ErrBehind]. One that has newer ones is fine: it is a deploy's
// next version that has migrated already.
func Check(ctx context.Context, db interface {
	QueryRow(ctx context.Context, sql string, args ...any) pgx.Row
},
) error {
	var have int64
	err := db.QueryRow(ctx, "SELECT coalesce(max(version_id), 0) FROM "+versionTable+" WHERE is_applied").Scan(&have)
	if e, ok := errors.AsType[*pgconn.PgError](err); ok && e.Code == pgerrcode.UndefinedTable {
		return ErrBehind
	}
	if err != nil {
		return fmt.Errorf("schema: check: %w", err)
	}
	if have < newest() {
		return ErrBehind
	}
	return nil
}

func newest() int64 {
	names, err := fs.Glob(migrations, "migrations/*.sql")
	if err != nil || len(names) == 0 {
		panic("schema: no migrations are embedded")
	}
	v, err := goose.NumericComponent(names[len(names)-1])
	if err != nil {
		panic(err)
	}
	return v
}

// connectTimeout bounds each attempt to connect, unless the URL says otherwise.
const connectTimeout = 5 * time.Second

func open(url string) (*sql.DB, *goose.Provider, error) {
	if err := dbpool.DefaultConfig(url).Validate(); err != nil { // which doesn't show the URL, as pgx does
		return nil, nil, fmt.Errorf("schema: %w", err)
	}
	cfg, err := pgxpool.ParseConfig(url) // it takes the settings of a pool out of the URL, which Postgres doesn't know
	if err != nil {
		return nil, nil, fmt.Errorf("schema: %w", err)
	}
	if cfg.ConnConfig.ConnectTimeout <= 0 {
		cfg.ConnConfig.ConnectTimeout = connectTimeout // of each host, of which one may be silent
	}
	cfg.ConnConfig.RuntimeParams["client_encoding"] = "UTF8"
	db := stdlib.OpenDB(*cfg.ConnConfig)
	locker, err := lock.NewPostgresSessionLocker()
	if err != nil {
		return nil, nil, errors.Join(fmt.Errorf("schema: %w", err), db.Close())
	}
	store, err := database.NewStore(database.DialectPostgres, versionTable)
	if err != nil {
		return nil, nil, errors.Join(fmt.Errorf("schema: %w", err), db.Close())
	}
	dir, err := fs.Sub(migrations, "migrations")
	if err != nil {
		return nil, nil, errors.Join(fmt.Errorf("schema: %w", err), db.Close())
	}
	provider, err := goose.NewProvider("", db, dir, goose.WithStore(store), goose.WithSessionLocker(locker))
	if err != nil {
		return nil, nil, errors.Join(fmt.Errorf("schema: %w", err), db.Close())
	}
	return db, provider, nil
}
