package rowsprune_test

import (
	"testing"

	"github.com/carpool-go/carpool/internal/testservers"
)

func TestMain(m *testing.M) {
	testservers.RunMoreAtOnce()
	testservers.Main(m)
}
