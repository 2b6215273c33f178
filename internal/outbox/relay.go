package outbox

import (
	"context"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgtype/zeronull"

	"github.com/carpool-go/carpool/internal/limit"
)

const (
	beginSQL = "BEGIN ISOLATION LEVEL READ COMMITTED; SET LOCAL idle_in_transaction_session_timeout = '15s'"

	// takeSQL chooses rows by the sizes of their payloads, and reads a payload, and makes it
	// text, as the last step and for those rows alone. ORDER BY and OFFSET keep that step
	// apart from the sorts before it.
	//
	// What a row that is not to become a job holds is not read, since it may be of any size.
	takeSQL = `WITH locked AS MATERIALIZED (
			SELECT seq, id, kind, payload, payload_size, queue, unique_key, run_at, max_retry, timeout, retention,
				CASE
				WHEN payload_size > ` + limit.SQL + ` THEN ''
				WHEN run_at = 'infinity' THEN 'run_at: is infinity, a time that never comes'
				WHEN octet_length(queue) > 100 THEN 'queue: has more than 100 bytes'
				WHEN octet_length(unique_key) > 1000 THEN 'unique_key: has more than 1000 bytes'
				END AS wrong
			FROM carpool.outbox
			WHERE problem IS NULL AND kind = ANY ($1) AND id <> ALL ($2::text[]::uuid[]) AND ($3::text = '' OR id = nullif($3, '')::uuid)
			ORDER BY seq LIMIT $4 FOR UPDATE SKIP LOCKED),
		sized AS (
			SELECT *, count(*) OVER () AS locked,
				seq = min(seq) FILTER (WHERE wrong IS NULL) OVER () AS oldest,
				sum(payload_size) FILTER (WHERE wrong IS NULL) OVER (ORDER BY payload_size, seq) AS total
			FROM locked),
		chosen AS (SELECT * FROM sized WHERE wrong IS NOT NULL OR oldest OR total <= $5 ORDER BY seq OFFSET 0)
		SELECT locked, wrong, payload_size, coalesce(` + limit.SQL + `, 0), id::text, kind,
			CASE WHEN wrong IS NULL THEN payload::text END,
			CASE WHEN wrong IS NULL THEN queue END,
			CASE WHEN wrong IS NULL THEN unique_key END,
			CASE WHEN isfinite(run_at) THEN run_at END, max_retry,
			extract(epoch FROM timeout)::float8, extract(epoch FROM retention)::float8
		FROM chosen`

	deleteSQL = `DELETE FROM carpool.outbox WHERE id = ANY ($1::text[]::uuid[])`

	rejectSQL = `UPDATE carpool.outbox AS o SET problem = p.problem
		FROM unnest($1::text[], $2::text[]) AS p(id, problem) WHERE o.id = p.id::uuid`
)

// Begin begins a transaction in which rows are moved. Postgres ends it when it has been
// idle for 15 s, which frees the rows of a worker that hangs, or was put to sleep.
func Begin(ctx context.Context, conn *pgx.Conn) (pgx.Tx, error) {
	return conn.BeginTx(ctx, pgx.TxOptions{BeginQuery: beginSQL})
}

// Choice says which of the rows that wait are taken.
type Choice struct {
	Kinds []string // of these kinds
	// Except are ids of rows to be left alone. Only, if it isn't "", is the id of the one row
	// to be taken.
	Except []string
	Only   string
	// Limit is how many rows are locked at most, the first ones. Of these the smallest are
	// taken until their payloads have Bytes together, and the oldest in any case.
	Limit, Bytes int
}

// Taken is a row that a relay has locked.
type Taken struct {
	Row
	// Size is how many bytes the payload has, as Postgres writes it.
	Size int
	// Problem is why the row can't become a job, whatever its kind: it is above the limit of
	// package limit, or has an option that makes no sense. Then its payload, queue and
	// unique key were not read. "" is none.
	Problem string
}

// Take locks rows that wait, and passes each to use while it reads them, so that only those
// are in memory that use still works on. Rows that another relay has locked are passed over.
// It reports whether there may be more rows of the same choice.
func Take(ctx context.Context, tx pgx.Tx, c Choice, use func(Taken)) (more bool, err error) {
	rows, err := tx.Query(ctx, takeSQL, c.Kinds, append([]string{}, c.Except...), c.Only, c.Limit, c.Bytes)
	if err != nil {
		return false, err
	}
	defer rows.Close()
	taken, locked := 0, 0
	for rows.Next() {
		var r Taken
		var wrong *string
		var most int
		var timeout, retention zeronull.Float8
		if err := rows.Scan(&locked, &wrong, &r.Size, &most, &r.ID, &r.Kind, &r.Payload, (*zeronull.Text)(&r.Queue), (*zeronull.Text)(&r.UniqueKey),
			(*zeronull.Timestamptz)(&r.RunAt), &r.MaxRetry, &timeout, &retention); err != nil {
			return false, err
		}
		r.Timeout, r.Retention = seconds(float64(timeout)), seconds(float64(retention))
		switch {
		case wrong == nil:
		case *wrong != "":
			r.Problem = *wrong
		default:
			r.Problem = fmt.Sprintf("%s payload: %v", r.Kind, &limit.Error{Size: r.Size, Most: most})
		}
		taken++
		use(r)
	}
	return taken < locked || locked == c.Limit, rows.Err()
}

// seconds is a number of seconds of Postgres', of which an interval may have more than a
// [time.Duration], or infinitely many: then it is 31 years.
func seconds(s float64) time.Duration {
	const most = 1e9
	return time.Duration(max(-most, min(s, most)) * float64(time.Second))
}

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
