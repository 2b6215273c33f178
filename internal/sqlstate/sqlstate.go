// Package sqlstate tells the classes of Postgres' errors.
package sqlstate

import (
	"slices"
	"strings"

	"github.com/jackc/pgx/v5/pgconn"
)

// HasClass reports whether an error is of one of the classes, each named by any of its
// codes. It goes by the first two characters, which pgerrcode's functions don't, because
// triggers may raise codes of their own in a class.
func HasClass(e *pgconn.PgError, classes ...string) bool {
	return slices.ContainsFunc(classes, func(class string) bool { return strings.HasPrefix(e.Code, class[:2]) })
}
