package doctor

import (
	"testing"

	"github.com/carpool-go/carpool/internal/testservers"
)

func TestExamine_FindsAPoolerAndComparesItWithTheSetting(t *testing.T) {
	t.Parallel()
	direct := testservers.Postgres(t)
	migrate(t, direct)
	byTransaction, bySession := testservers.PgBouncer(t, direct), testservers.PgBouncer(t, direct, "pool_mode = session")
	for name, c := range map[string]struct {
		url          string
		set          bool
		result       Result
		says, wayOut string
	}{
		"none":                     {direct, false, OK, "none", ""},
		"none, but set":            {direct, true, Warning, "there is no pooler between", "unset DB_POOLER"},
		"of transactions, not set": {byTransaction, false, Failure, "a pooler in transaction mode is between, and DB_POOLER is not set", "set DB_POOLER=true"},
		"of transactions, set":     {byTransaction, true, OK, "one in transaction mode, and DB_POOLER is true", ""},
		"of sessions":              {bySession, false, OK, "one in session mode", ""},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			cfg := databaseOnly(t, c.url)
			cfg.Pool.ThroughPooler = c.set
			findings := examine(t, cfg)
			require(t, findings, "postgres pooler", c.result, c.says, c.wayOut)
			if c.url != direct {
				require(t, findings, "postgres connections", OK, "max_client_conn must allow 11 for each instance", "")
			}
			requireOK(t, findings, "postgres tables", "postgres grants")
		})
	}
}
