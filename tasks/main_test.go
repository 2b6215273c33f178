package tasks_test

import (
	"os/exec"
	"slices"
	"strings"
	"testing"

	"github.com/carpool-go/carpool/internal/testservers"
)

func TestMain(m *testing.M) {
	testservers.RunMoreAtOnce()
	testservers.Main(m)
}

// A service that only enqueues pays for what this package imports.
func TestPackage_BringsNoHTTPAlong(t *testing.T) {
	t.Parallel()
	out, err := exec.Command("go", "list", "-deps", ".").Output()
	if err != nil {
		t.Fatal(err)
	}
	if slices.Contains(strings.Fields(string(out)), "net/http") {
		t.Error("package tasks imports net/http, itself or by another package")
	}
}
