//go:build long && unix

package worker_test

import (
	"testing"

	"github.com/carpool-go/carpool/internal/schema"
	"github.com/carpool-go/carpool/worker/internal/workertest"
)

// installMigrated is install with carpool's tables.
func installMigrated(t *testing.T, redisURL string) *installation {
	t.Helper()
	l := install(t, redisURL)
	if err := schema.Migrate(t.Context(), l.db.Config().ConnString(), workertest.Discard()); err != nil {
		t.Fatal(err)
	}
	return l
}
