package outbox

import (
	"context"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgtype/zeronull"
)

const (
	beginSQL = "BEGIN ISOLATION LEVEL READ COMMITTED; SET LOCAL idle_in_transaction_session_timeout = '15s'"

	takeSQL = `SELECT id::text, kind, payload::text, queue, unique_key, run_at, max_retry,
			extract(epoch FROM timeout)::float8, extract(epoch FROM retention)::float8
		FROM carpool.outbox WHERE problem IS NULL AND kind = ANY ($1) ORDER BY seq LIMIT $2 FOR UPDATE SKIP LOCKED`

	deleteSQL = `DELETE FROM carpool.outbox WHERE id = ANY ($1::text[]::uuid[])`

	rejectSQL = `UPDATE carpool.outbox AS o SET problem = p.problem
		FROM unnest($1::text[], $2::text[]) AS p(id, problem) WHERE o.id = p.id::uuid`
)

// Begin begins a transaction in which rows are moved. Postgres ends it when it has been
// idle for 15 s, which frees the rows of a worker that hangs, or was put to sleep.
func Begin(ctx context.Context, conn *pgx.Conn) (pgx.Tx, error) {
	return conn.BeginTx(ctx, pgx.TxOptions{BeginQuery: beginSQL})
}

// Take locks the first rows that wait, limit at most, of the given kinds, and passes each
// to use while it reads them, so that only those are in memory that use still works on.
// Rows that another relay has locked are passed over.
func Take(ctx context.Context, tx pgx.Tx, kinds []string, limit int, use func(Row)) error {
	rows, err := tx.Query(ctx, takeSQL, kinds, limit)
	if err != nil {
		return err
	}
	defer rows.Close()
	for rows.Next() {
		var r Row
		var timeout, retention zeronull.Float8
		if err := rows.Scan(&r.ID, &r.Kind, &r.Payload, (*zeronull.Text)(&r.Queue), (*zeronull.Text)(&r.UniqueKey),
			(*zeronull.Timestamptz)(&r.RunAt), &r.MaxRetry, &timeout, &retention); err != nil {
			return err
		}
		r.Timeout, r.Retention = seconds(float64(timeout)), seconds(float64(retention))
		use(r)
	}
	return rows.Err()
}

func seconds(s float64) time.Duration { return time.Duration(s * float64(time.Second)) }

// Rejection is a row that can't become a job, and why.
type Rejection struct {
	ID string
	// Problem is text as Postgres takes it.
	Problem string
}

// Finish deletes the rows whose jobs Redis has, or need not have, and marks those as
// rejected that can't become jobs: no relay takes them until their problem is null again.
func Finish(ctx context.Context, tx pgx.Tx, moved []string, rejected []Rejection) error {
	ids, problems := make([]string, len(rejected)), make([]string, len(rejected))
	for i, r := range rejected {
		ids[i], problems[i] = r.ID, r.Problem
	}
	changes := new(pgx.Batch)
	changes.Queue(deleteSQL, moved)
	changes.Queue(rejectSQL, ids, problems)
	return tx.SendBatch(ctx, changes).Close()
}

// UnknownKind begins the problem of rows whose kind no worker knows; the kind follows.
const UnknownKind = "no worker knows the kind "

const (
	readmitSQL = `UPDATE carpool.outbox SET problem = NULL WHERE problem = $2 || kind AND kind = ANY ($1)`

	rejectUnknownSQL = `WITH rejected AS (
			UPDATE carpool.outbox SET problem = $2 || kind WHERE id IN (
				SELECT id FROM carpool.outbox WHERE problem IS NULL AND kind <> ALL ($1)
				AND created_at < now() - interval '10 minutes' FOR UPDATE SKIP LOCKED)
			RETURNING kind)
		SELECT kind, count(*) FROM rejected GROUP BY kind ORDER BY kind`
)

// Readmit lets the rows wait again that were rejected because no worker knew their kind,
// if it is one of kinds: a worker that knows it may have come with the latest deploy.
func Readmit(ctx context.Context, db Execer, kinds []string) error {
	if _, err := db.Exec(ctx, readmitSQL, kinds, UnknownKind); err != nil {
		return fmt.Errorf("take up rows of the outbox that were set aside: %w", err)
	}
	return nil
}

// KindCount is how many rows of one kind there are.
type KindCount struct {
	Kind string
	Rows int
}

// RejectUnknown rejects the rows that have waited for ten minutes and are of none of
// kinds, and returns how many they were, by kind. A worker that knew a kind would have
// moved them by then.
func RejectUnknown(ctx context.Context, db Queryer, kinds []string) ([]KindCount, error) {
	rejected, err := collect(ctx, db, pgx.RowToStructByPos[KindCount], rejectUnknownSQL, kinds, UnknownKind)
	if err != nil {
		return nil, fmt.Errorf("set rows of the outbox aside: %w", err)
	}
	return rejected, nil
}

const unknownSQL = `SELECT kind, count(*) FROM carpool.outbox WHERE problem IS NULL AND kind <> ALL ($1)
		AND created_at <= clock_timestamp() - make_interval(secs => $2) GROUP BY kind ORDER BY kind`

// Unknown counts the rows, by kind, that wait and are of none of kinds, and have waited for
// at least as long.
func Unknown(ctx context.Context, db Queryer, kinds []string, waited time.Duration) ([]KindCount, error) {
	unknown, err := collect(ctx, db, pgx.RowToStructByPos[KindCount], unknownSQL, kinds, waited.Seconds())
	if err != nil {
		return nil, fmt.Errorf("look at the kinds of the outbox: %w", err)
	}
	return unknown, nil
}

// MuteLock is the advisory lock that carpool.enqueue looks for: while a relay has it,
// producers don't notify. Its number is "relay" in ASCII.
const MuteLock = 491327873401

// Mute asks producers not to notify, because each transaction that does waits for the one
// before it, and a busy relay looks by itself. It takes [MuteLock] if no other relay has it,
// and reports whether conn has it now. The lock ends with the connection.
func Mute(ctx context.Context, conn *pgx.Conn) (held bool, err error) {
	err = conn.QueryRow(ctx, "SELECT pg_try_advisory_lock($1)", int64(MuteLock)).Scan(&held)
	return held, err
}

// Unmute gives up the lock that [Mute] took, and reports whether conn has it nevertheless.
func Unmute(ctx context.Context, conn *pgx.Conn) (held bool, err error) {
	err = conn.QueryRow(ctx, "SELECT NOT pg_advisory_unlock($1)", int64(MuteLock)).Scan(&held)
	return held, err
}
