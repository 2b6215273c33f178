package dbpool

import (
	"errors"

	"github.com/jackc/pgx/v5/pgconn"
)

// IsAway reports whether err says that the database could not be reached or would
// not serve: no connection could be made or lent, the server ended it (see
// https://www.postgresql.org/docs/current/errcodes-appendix.html, classes 08 and
// 57P), or has no connection left. It says nothing about the statement, so trying
// again later is right.
//
// A [TimeoutError] of somebody who holds other connections is no sign of it: who
// acquires several at once may be waiting for itself.
//
// A connection that broke amid a statement shows best in [Usage.Died]; its error
// alone may be that of any socket.
func IsAway(err error) bool {
	if e, ok := errors.AsType[*TimeoutError](err); ok {
		return e.Own == 0
	}
	if _, ok := errors.AsType[*pgconn.ConnectError](err); ok {
		return true
	}
	e, ok := errors.AsType[*pgconn.PgError](err)
	return ok && (isDeath(e) || e.Code == "53300") // too_many_connections
}
