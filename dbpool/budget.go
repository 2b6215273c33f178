package dbpool

import (
	"context"
	"fmt"
)

// Budget is what a server's limit on connections means to a fleet of pools.
type Budget struct {
	// MaxConnections is the server's limit, Reserved what it keeps for
	// superusers, InUse what was open, by anybody, when it was asked.
	MaxConnections, Reserved, InUse int
	// RoleLimit and DatabaseLimit are the limits on the pool's role and database,
	// -1 for none.
	RoleLimit, DatabaseLimit int
	// PerInstance is Size + MaxOverflow.
	PerInstance int
}

// Budget asks the server for its limits.
func (p *Pool) Budget(ctx context.Context) (Budget, error) {
	b := Budget{PerInstance: p.cfg.Size + p.cfg.MaxOverflow}
	// reserved_connections is there from Postgres 16 on.
	err := p.QueryRow(ctx, `
		SELECT current_setting('max_connections')::int,
		       current_setting('superuser_reserved_connections')::int
		         + coalesce(current_setting('reserved_connections', true)::int, 0),
		       (SELECT coalesce(sum(numbackends), 0) FROM pg_stat_database)::int,
		       (SELECT rolconnlimit FROM pg_roles WHERE rolname = current_user),
		       (SELECT datconnlimit FROM pg_database WHERE datname = current_database())`).
		Scan(&b.MaxConnections, &b.Reserved, &b.InUse, &b.RoleLimit, &b.DatabaseLimit)
	if err != nil {
		return b, fmt.Errorf("dbpool: budget: %w", err)
	}
	return b, nil
}

// Usable is how many connections the pools may have together.
func (b Budget) Usable() int {
	n := b.MaxConnections - b.Reserved
	for _, limit := range []int{b.RoleLimit, b.DatabaseLimit} {
		if limit >= 0 {
			n = min(n, limit)
		}
	}
	return n
}

// Warning says what to set if the server can't hold this many instances twice,
// as it must during a deploy that runs old and new ones side by side; "" if it
// can.
func (b Budget) Warning(instances int) string {
	need := 2 * instances * b.PerInstance
	if need <= b.Usable() {
		return ""
	}
	fits := b.Usable() / (2 * instances)
	if fits < 1 {
		return fmt.Sprintf("%d instances, and as many again during a deploy, don't fit into the server's %d connections at all; run fewer, or put a pooler between",
			instances, b.Usable())
	}
	return fmt.Sprintf("%d instances of %d connections, and as many again during a deploy, are %d, but the server has %d; set DB_POOL_SIZE and DB_MAX_OVERFLOW to %d together",
		instances, b.PerInstance, need, b.Usable(), fits)
}
