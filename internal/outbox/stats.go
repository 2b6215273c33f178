package outbox

import (
	"context"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"
)

// Stats is how the outbox stands at one moment.
type Stats struct {
	// Waiting is how many rows wait for a relay, and Oldest how long the oldest of
	// them has, by Postgres' clock; 0 if there is none.
	Waiting int
	Oldest  time.Duration
	// Rejected is how many rows have a problem.
	Rejected int
}

const statsSQL = `SELECT count(*) FILTER (WHERE problem IS NULL), count(*) FILTER (WHERE problem IS NOT NULL),
		coalesce(extract(epoch FROM clock_timestamp() - min(created_at) FILTER (WHERE problem IS NULL AND isfinite(created_at))), 0)::float8
		FROM carpool.outbox`

// ReadStats counts the rows.
func ReadStats(ctx context.Context, db RowQueryer) (Stats, error) {
	var s Stats
	var oldest float64
	if err := db.QueryRow(ctx, statsSQL).Scan(&s.Waiting, &s.Rejected, &oldest); err != nil {
		return Stats{}, fmt.Errorf("look at the outbox: %w", err)
	}
	s.Oldest = max(0, seconds(oldest))
	return s, nil
}

// Problem is why rows were rejected, and how many were for this reason.
type Problem struct {
	Problem string
	Rows    int
}

const problemsSQL = `SELECT problem, count(*) FROM carpool.outbox WHERE problem IS NOT NULL
		GROUP BY problem ORDER BY count(*) DESC, problem LIMIT $1`

// Problems returns the most frequent problems, limit at most.
func Problems(ctx context.Context, db Queryer, limit int) ([]Problem, error) {
	problems, err := collect(ctx, db, pgx.RowToStructByPos[Problem], problemsSQL, limit)
	if err != nil {
		return nil, fmt.Errorf("look at the problems of the outbox: %w", err)
	}
	return problems, nil
}
