// Package limit knows the limit on what a job carries and what its handler returns: what
// it is, what is said of something above it, and where the database has it.
package limit

import (
	"context"
	"fmt"

	"github.com/jackc/pgx/v5/pgconn"
)

// Default is the limit in bytes where nothing else is said, as in the migration that makes
// carpool.settings.
const Default = 1 << 20

// Error is the error for something that has more bytes than the limit.
type Error struct {
	// Size and Most are bytes.
	Size, Most int
}

// Error says what carpool.limit_payload says in the database.
func (e *Error) Error() string {
	return fmt.Sprintf("%d bytes are more than the limit of %d, which MAX_PAYLOAD sets", e.Size, e.Most)
}

// Check returns an [Error] if size is more than most, in bytes; a most of 0 is [Default].
func Check(size, most int) error {
	if most == 0 {
		most = Default
	}
	if size > most {
		return &Error{size, most}
	}
	return nil
}

// SQL is the limit as an expression of SQL, a bigint of bytes. It is null, with which
// nothing is above it, if somebody has deleted the row.
const SQL = "(SELECT value FROM carpool.settings WHERE name = 'max_payload')"

const recordSQL = `INSERT INTO carpool.settings AS s (name, value) VALUES ('max_payload', $1)
	ON CONFLICT (name) DO UPDATE SET value = excluded.value WHERE s.value <> excluded.value`

// Record writes the limit to the database, by which carpool.enqueue, the relays and the
// schedulers go from then on, whoever has written another one before. The error is the
// database's.
func Record(ctx context.Context, db interface {
	Exec(ctx context.Context, sql string, args ...any) (pgconn.CommandTag, error)
}, most int,
) error {
	if _, err := db.Exec(ctx, recordSQL, most); err != nil {
		return fmt.Errorf("write MAX_PAYLOAD to carpool.settings: %w", err)
	}
	return nil
}
