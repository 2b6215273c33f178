// Package outbox knows every statement on carpool.outbox, the table in which jobs
// wait that were enqueued in a transaction, until a relay moves them to Redis. What
// the table means is said where it is made, in internal/schema.
//
// This file is for those who put rows in and look for them, relay.go for the relays,
// stats.go for who watches, and operator.go for who clears up. Unless a function says otherwise, its error is
// Postgres', as pgx returns it.
package outbox

import (
	"context"
	"regexp"
	"slices"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgtype/zeronull"
)

// Row is a job that waits in the outbox. Its optional fields override the kind's own
// settings; their zero values, which the table has as null, don't.
type Row struct {
	// ID is the job's, a UUID; see [IsID].
	ID      string
	Kind    string
	Payload []byte // JSON
	Queue   string
	// UniqueKey is taken when the row is moved.
	UniqueKey string
	// RunAt is zero for a job that is to run at once.
	RunAt time.Time
	// MaxRetry is how often the job is retried: 0 is never, nil is the kind's own.
	MaxRetry           *int
	Timeout, Retention time.Duration
}

// Queryer, Execer and RowQueryer are what pools, connections and transactions have in
// common.
type (
	// Queryer returns rows.
	Queryer interface {
		Query(ctx context.Context, sql string, args ...any) (pgx.Rows, error)
	}
	// RowQueryer returns one row.
	RowQueryer interface {
		QueryRow(ctx context.Context, sql string, args ...any) pgx.Row
	}
	// Execer returns no rows.
	Execer interface {
		Exec(ctx context.Context, sql string, args ...any) (pgconn.CommandTag, error)
	}
)

// MaxRetry turns the option of a job's kind, where 0 is the kind's own and less than 0 is
// no retry, into [Row.MaxRetry].
func MaxRetry(option int) *int {
	if option == 0 {
		return nil
	}
	n := max(option, 0)
	return &n
}

const enqueueSQL = `SELECT carpool.enqueue(kind => $1, payload => $2, queue => $3, run_at => $4, unique_key => $5,
	max_retry => $6, timeout => make_interval(secs => $7), retention => make_interval(secs => $8))`

// Enqueue calls carpool.enqueue, as producers in other languages do, and returns the id
// that it made; the row's own is not used. What the function refuses is a
// [pgconn.PgError] with the code 22023.
func Enqueue(ctx context.Context, tx RowQueryer, r Row) (id string, err error) {
	err = tx.QueryRow(ctx, enqueueSQL, r.Kind, string(r.Payload),
		zeronull.Text(r.Queue), zeronull.Timestamptz(r.RunAt), zeronull.Text(r.UniqueKey),
		r.MaxRetry, zeronull.Float8(r.Timeout.Seconds()), zeronull.Float8(r.Retention.Seconds()),
	).Scan(&id)
	return id, err
}

// Channel is what relays listen on: a transaction that has put rows in notifies it.
const Channel = "carpool_outbox"

const (
	insertSQL = `INSERT INTO carpool.outbox (id, kind, payload, queue, run_at, unique_key, max_retry, timeout, retention)
		VALUES ($1, $2, $3, $4, $5, $6, $7, make_interval(secs => $8), make_interval(secs => $9)) ON CONFLICT (id) DO NOTHING`

	notifySQL = "SELECT pg_notify('" + Channel + "', '')"
)

// Insert adds to b what puts rows with ids of their own into the outbox and wakes the
// relays. It asks carpool.kinds nothing, so the caller must know that the rows are good.
// A row whose id is there already stays as it is.
func Insert(b *pgx.Batch, rows ...Row) {
	if len(rows) == 0 {
		return
	}
	for _, r := range rows {
		b.Queue(insertSQL, r.ID, r.Kind, string(r.Payload),
			zeronull.Text(r.Queue), zeronull.Timestamptz(r.RunAt), zeronull.Text(r.UniqueKey),
			r.MaxRetry, zeronull.Float8(r.Timeout.Seconds()), zeronull.Float8(r.Retention.Seconds()))
	}
	b.Queue(notifySQL)
}

// IsWaiting is the SQL condition that a row waits for a relay, its id being that of the
// SQL expression id. A rejected row doesn't wait.
func IsWaiting(id string) string {
	return "EXISTS (SELECT FROM carpool.outbox AS o WHERE o.id = " + id + " AND o.problem IS NULL)"
}

var uuidForm = regexp.MustCompile(`^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$`)

// IsID reports whether id has the form of those in the outbox: that of a UUID, in lower
// case. Jobs that were enqueued in Redis may have others.
func IsID(id string) bool { return uuidForm.MatchString(id) }

// known returns those of the ids that have the form of [IsID]; nil stays nil, and means any.
func known(ids []string) []string {
	return slices.DeleteFunc(slices.Clone(ids), func(id string) bool { return !IsID(id) })
}

// Present returns which of the ids the outbox has, whether they wait for a relay or are
// rejected. Ids of another form than [IsID]'s are never there.
func Present(ctx context.Context, db Queryer, ids []string) (map[string]bool, error) {
	rows, err := db.Query(ctx, "SELECT id::text FROM carpool.outbox WHERE id = ANY($1::text[]::uuid[])", known(ids))
	if err != nil {
		return nil, err
	}
	present := map[string]bool{}
	var id string
	_, err = pgx.ForEachRow(rows, []any{&id}, func() error {
		present[id] = true
		return nil
	})
	return present, err
}

// collect returns the rows of a query, or its error.
func collect[T any](ctx context.Context, db Queryer, row pgx.RowToFunc[T], sql string, args ...any) ([]T, error) {
	rows, err := db.Query(ctx, sql, args...)
	if err != nil {
		return nil, err
	}
	return pgx.CollectRows(rows, row)
}

// Remove deletes a row, waiting or rejected, and reports whether there was one. It waits
// for a relay that moves the row meanwhile. An id of another form than [IsID]'s is an
// error of Postgres.
func Remove(ctx context.Context, db Execer, id string) (bool, error) {
	tag, err := db.Exec(ctx, "DELETE FROM carpool.outbox WHERE id = $1::text::uuid", id)
	return tag.RowsAffected() > 0, err
}
