package dbpool

import (
	"context"
	"fmt"
)

// Budget is the number of connections that a server allows, and how many of them one
// pool may take. It is for programs of which several instances, each with a pool of
// the same size, share a server.
type Budget struct {
	// MaxConnections is the server's max_connections.
	MaxConnections int
	// Reserved is how many of them the server keeps for superusers and for roles
	// with pg_use_reserved_connections.
	Reserved int
	// InUse is how many were open, by anybody, when the server was asked.
	InUse int
	// RoleLimit is the limit on the pool's role, -1 for none.
	RoleLimit int
	// DatabaseLimit is the limit on the pool's database, -1 for none.
	DatabaseLimit int
	// PerInstance is how many the pool may open: its Size and MaxOverflow together.
	PerInstance int
}

// Budget asks the server for its limits, on a connection of the pool. Its errors are
// those of [Pool.Acquire] and of the statement.
func (p *Pool) Budget(ctx context.Context) (Budget, error) {
	b := Budget{PerInstance: p.cfg.Size + p.cfg.MaxOverflow}
	// Servers before Postgres 16 have no reserved_connections.
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

// Usable returns how many connections all pools may have together: MaxConnections
// less Reserved, or RoleLimit or DatabaseLimit if that is less.
func (b Budget) Usable() int {
	n := b.MaxConnections - b.Reserved
	for _, limit := range []int{b.RoleLimit, b.DatabaseLimit} {
		if limit >= 0 {
			n = min(n, limit)
		}
	}
	return n
}

// Warning returns what to set if the server has too few connections for twice this
// many instances, and "" if it has enough. It counts them twice because a deploy runs
// old and new ones side by side. The text names a carpool worker's settings,
// DB_POOL_SIZE and DB_MAX_OVERFLOW, which are Config's Size and MaxOverflow.
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
