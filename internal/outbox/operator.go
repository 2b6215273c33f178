package outbox

import (
	"context"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgtype/zeronull"
)

// Entry is a row as operators see it, which is all but what its job carries.
type Entry struct {
	ID, Kind string
	Queue    string // "" is the kind's own
	// CreatedAt is when the row was put in, and Age how long ago that is by Postgres' clock.
	CreatedAt time.Time
	Age       time.Duration
	// Problem is why it was rejected; "" means that it waits for a relay.
	Problem string
}

// Filter chooses rows. The zero value chooses all.
type Filter struct {
	IDs  []string // only these; nil: any
	Kind string   // only rows of this kind; "": of any
	// Problem chooses rejected rows whose problem has this text in it; "": any.
	Problem string
	// Waiting and Rejected choose the rows that wait for a relay, or those that have a
	// problem; neither, or both, chooses all.
	Waiting, Rejected bool
}

// An infinite time, which only a hand writes, is shown as now.
const listSQL = `SELECT id::text, kind, queue, created_at, extract(epoch FROM clock_timestamp() - created_at)::float8, problem
		FROM (SELECT id, seq, kind, queue, problem, CASE WHEN isfinite(created_at) THEN created_at ELSE clock_timestamp() END AS created_at
			FROM carpool.outbox) AS o
		WHERE ($1::text[] IS NULL OR id = ANY ($1::text[]::uuid[])) AND ($2 = '' OR kind = $2) AND ($3 = '' OR strpos(problem, $3) > 0)
		AND ($4 AND problem IS NULL OR $5 AND problem IS NOT NULL)
		ORDER BY seq LIMIT $6`

// List returns the rows that the filter chooses, in the order in which they were put in,
// limit at most; 0 is no limit. Ids of another form than [IsID]'s are never there.
func List(ctx context.Context, db Queryer, f Filter, limit int) ([]Entry, error) {
	both := f.Waiting == f.Rejected
	entry := func(row pgx.CollectableRow) (e Entry, err error) {
		var age float64
		err = row.Scan(&e.ID, &e.Kind, (*zeronull.Text)(&e.Queue), &e.CreatedAt, &age, (*zeronull.Text)(&e.Problem))
		e.Age = max(0, seconds(age))
		return e, err
	}
	entries, err := collect(ctx, db, entry, listSQL, known(f.IDs), f.Kind, f.Problem, both || f.Waiting, both || f.Rejected, zeronull.Int8(limit))
	if err != nil {
		return nil, fmt.Errorf("look at the outbox: %w", err)
	}
	return entries, nil
}

// A row that a relay has locked is about to be gone. To wait for it would be to wait for
// Redis.
const (
	retrySQL = `WITH chosen AS (SELECT id FROM carpool.outbox WHERE id = ANY ($1::text[]::uuid[]) AND problem IS NOT NULL FOR UPDATE SKIP LOCKED)
		UPDATE carpool.outbox AS o SET problem = NULL FROM chosen WHERE o.id = chosen.id RETURNING o.id::text`
	deleteFreeSQL = `WITH chosen AS (SELECT id FROM carpool.outbox WHERE id = ANY ($1::text[]::uuid[]) FOR UPDATE SKIP LOCKED)
		DELETE FROM carpool.outbox AS o USING chosen WHERE o.id = chosen.id RETURNING o.id::text`
)

// Retry lets rejected rows wait again, which a relay finds by its next look, and returns
// the ids of those that it changed. Rows that wait, or that another transaction has locked,
// are passed over. An id of another form than [IsID]'s is an error of Postgres.
func Retry(ctx context.Context, db Queryer, ids []string) ([]string, error) {
	return changed(ctx, db, retrySQL, ids)
}

// Delete deletes rows, waiting or rejected, and returns the ids of those that it deleted.
// Rows that a relay has locked, because it moves them, are passed over. An id of another
// form than [IsID]'s is an error of Postgres.
func Delete(ctx context.Context, db Queryer, ids []string) ([]string, error) {
	return changed(ctx, db, deleteFreeSQL, ids)
}

func changed(ctx context.Context, db Queryer, sql string, ids []string) ([]string, error) {
	done, err := collect(ctx, db, pgx.RowTo[string], sql, ids)
	if err != nil {
		return nil, fmt.Errorf("change the outbox: %w", err)
	}
	return done, nil
}
