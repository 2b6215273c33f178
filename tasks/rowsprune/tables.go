package rowsprune

import (
	"errors"
	"fmt"
	"strings"

	"github.com/carpool-go/carpool/internal/pgtext"
)

// Tables are the tables whose rows may be deleted by rows:prune. The zero value is none.
type Tables struct {
	names map[table]bool
}

// ParseTables reads a list of tables: schema.table, separated by commas, each spelt as in
// the catalog, without quotes; "" is none. It refuses what nobody may prune, which is
// carpool's own tables and those of Postgres. The error names every entry that is wrong.
func ParseTables(list string) (Tables, error) {
	t := Tables{make(map[table]bool)}
	var faults []string
	for entry := range strings.SplitSeq(list, ",") {
		entry = strings.TrimSpace(entry)
		if entry == "" {
			continue
		}
		of, ok := cutTable(entry)
		if !ok {
			faults = append(faults, fmt.Sprintf("%.150q is no schema.table", entry))
			continue
		}
		if err := of.check(); err != nil {
			faults = append(faults, fmt.Sprintf("%.150q: %v", entry, err))
			continue
		}
		t.names[of] = true
	}
	if len(faults) > 0 {
		return Tables{}, errors.New(strings.Join(faults, "; "))
	}
	return t, nil
}

func (t Tables) has(of table) bool { return t.names[of] }

// refusal is the error for a table that t doesn't have. It names the table as PRUNE_ALLOW has
// it; a name that was checked is short.
func (t Tables) refusal(of table) error {
	if len(t.names) == 0 {
		return fmt.Errorf("this worker prunes no tables; set PRUNE_ALLOW to those it may delete rows of, such as %q", of.String())
	}
	return fmt.Errorf("%q is not in PRUNE_ALLOW, the tables that this worker may delete rows of; add it there, spelt the same", of.String())
}

// table names a table as the catalog has it.
type table struct{ schema, name string }

// String is the name as [ParseTables] reads it.
func (t table) String() string { return t.schema + "." + t.name }

// cutTable splits schema.table. A name of three parts has a table with a dot, which check
// refuses.
func cutTable(s string) (t table, ok bool) {
	t.schema, t.name, ok = strings.Cut(s, ".")
	return t, ok
}

// ownSchema has carpool's tables.
const ownSchema = "carpool"

// check returns why nobody may prune a table of this name.
func (t table) check() error {
	switch {
	case !isIdentifier(t.schema) || !isIdentifier(t.name):
		return fmt.Errorf("it must be schema.table, each name at most %d bytes and spelt as in the catalog, "+
			"without quotes, commas, and spaces around it", pgtext.MaxIdentifier)
	case strings.HasPrefix(t.schema, "pg_") || t.schema == "information_schema":
		return errors.New("the schema is Postgres' own, whose rows are not pruned")
	case t.schema == ownSchema:
		return errors.New("the schema is carpool's own, whose rows carpool:prune deletes when they are no longer needed")
	}
	return nil
}

func isIdentifier(s string) bool {
	return s != "" && len(s) <= pgtext.MaxIdentifier && !strings.ContainsAny(s, ".,\"\x00") && strings.TrimSpace(s) == s
}
