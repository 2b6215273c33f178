package once

import (
	"testing"

	"github.com/carpool-go/carpool/internal/testservers"
)

func TestMain(m *testing.M) { testservers.Main(m) }
