package relay

import (
	"testing"

	"github.com/carpool-go/carpool/internal/testservers"
)

func TestRelay_WorksThroughPgBouncerInTransactionMode(t *testing.T) {
	t.Parallel()
	o := setupOutbox(t)
	url := testservers.PgBouncer(t, o.databaseURL)
	o.relay(t, func(cfg *Config) { cfg.DB.URL, cfg.DB.ThroughPooler = url, true })
	ids := o.enqueue(t, 1200)
	o.requireMoved(t, ids)
	o.requireMoved(t, append(ids, o.enqueue(t, 3)...))
}
