package delivery

import (
	"testing"

	"github.com/carpool-go/carpool/worker/internal/workertest"
)

func TestMain(m *testing.M) { workertest.Main(m) }

// bundle is what a test works with: servers of its own, and a worker to run on them.
type bundle struct{ *workertest.Bundle }

func setup(t *testing.T) *bundle {
	t.Helper()
	return &bundle{workertest.Setup(t)}
}
