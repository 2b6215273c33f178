package doctor

import (
	"testing"

	"github.com/carpool-go/carpool/worker/internal/workertest"
)

func TestMain(m *testing.M) { workertest.Main(m) }
