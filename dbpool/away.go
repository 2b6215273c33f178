package dbpool

import (
	"errors"

	"github.com/jackc/pgerrcode"
	"github.com/jackc/pgx/v5/pgconn"
)

// IsAway reports whether err says that the database is out of reach or does not
// serve. It is true if no connection could be opened or acquired, if the server
// ended the connection (SQLSTATE class 08, 57P01 to 57P03), and if the server has
// no connection left (53300). Such an error is no fault of the statement, so trying
// again later is right. It is false for nil.
//
// It is false for the [TimeoutError] of a caller that holds other connections,
// because that caller may be waiting for itself.
//
// It is false for a mere error of a socket, because that may be any socket's. That a
// connection broke amid a statement shows in [Usage].Died.
func IsAway(err error) bool {
	if e, ok := errors.AsType[*TimeoutError](err); ok {
		return e.Own == 0
	}
	if _, ok := errors.AsType[*pgconn.ConnectError](err); ok {
		return true
	}
	e, ok := errors.AsType[*pgconn.PgError](err)
	return ok && (isDeath(e) || e.Code == pgerrcode.TooManyConnections)
}
