package worker_test

import (
	"os"
	"testing"

	"github.com/carpool-go/carpool/worker/internal/workertest"
)

func TestMain(m *testing.M) {
	if os.Getenv(chaosEnv) != "" {
		os.Exit(chaosWorker())
	}
	workertest.Main(m)
}
