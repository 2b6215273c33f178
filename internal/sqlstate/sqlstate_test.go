package sqlstate

import (
	"testing"

	"github.com/jackc/pgerrcode"
	"github.com/jackc/pgx/v5/pgconn"
)

func TestHasClass_GoesByTheClassOfCodesOfOnesOwnToo(t *testing.T) {
	t.Parallel()
	own := &pgconn.PgError{Code: "23ABC"}
	if !HasClass(own, pgerrcode.DataException, pgerrcode.UniqueViolation) {
		t.Error("23ABC is not of class 23")
	}
	if HasClass(own, pgerrcode.DataException) || HasClass(own) || HasClass(&pgconn.PgError{}, pgerrcode.DataException) {
		t.Error("a code is of a class that it isn't of")
	}
}
