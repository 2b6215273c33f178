// Package carpool_test keeps the arrows between the packages one-way.
package carpool_test

import (
	"fmt"
	"maps"
	"os/exec"
	"slices"
	"strings"
	"testing"
)

const module = "github.com/carpool-go/carpool/"

// facts are the packages that each know one fact, so that no other has to. They know
// dbpool and one another, and nothing of jobs.
const facts = "internal/asynqwire internal/httplimit internal/instance internal/limit internal/once internal/outbox internal/pgtext internal/prune " +
	"internal/reason internal/schema internal/sentinel internal/sqlstate internal/startup internal/unique internal/wait"

// arrows says which of carpool's own packages each one may import, apart from its tests.
// A package imports what is below it in the table.
func arrows() map[string]string {
	allowed := map[string]string{
		"cmd/worker": "worker/cli tasks/builtin",
		"worker/cli": "worker worker/internal/doctor admin monitor scheduler tasks outbound dbpool " + facts,
		"worker": "worker/internal/delivery worker/internal/relay worker/internal/fleet worker/internal/health worker/internal/doctor " +
			"admin scheduler tasks tasks/maintenance outbound dbpool " + facts,

		// The inner rooms don't import one another.
		"worker/internal/delivery": "tasks dbpool " + facts,
		"worker/internal/relay":    "tasks dbpool " + facts,
		"worker/internal/fleet":    "admin dbpool " + facts,
		"worker/internal/health":   facts,
		"worker/internal/doctor":   "admin scheduler tasks dbpool " + facts,

		"monitor":   "admin tasks " + facts,
		"admin":     "tasks dbpool " + facts,
		"scheduler": "tasks dbpool " + facts,

		"tasks/builtin":     "tasks tasks/csvimport tasks/rowsprune tasks/webhook",
		"tasks/csvimport":   "tasks outbound " + facts,
		"tasks/rowsprune":   "tasks outbound " + facts,
		"tasks/webhook":     "tasks outbound " + facts,
		"tasks/maintenance": "tasks dbpool " + facts,
		"tasks":             "dbpool " + facts,

		"outbound": "",
		"dbpool":   "",

		// For tests and for people.
		"tasks/taskstest":             "tasks outbound dbpool internal/testservers " + facts,
		"worker/internal/workertest":  "tasks dbpool internal/servers internal/testservers " + facts,
		"internal/asynqwire/wiretest": facts,
		"internal/testservers":        "internal/servers",
		"internal/servers":            "",
		"internal/deploytest":         "",
		"dev":                         "dev/internal/command", // it is to be compiled in seconds
		"dev/internal/command":        "",
		"dev/tour":                    "dev/internal/command dev/data tasks tasks/csvimport tasks/maintenance tasks/webhook internal/servers",
		"dev/data":                    "",
		"examples":                    "",
		"examples/go":                 "tasks",
	}
	for fact := range strings.FieldsSeq(facts) {
		allowed[fact] = "dbpool " + facts
	}
	return allowed
}

// forbidden returns a line for each import of packages that allowed doesn't have, and for
// each package that is in one and not in the other.
func forbidden(packages map[string][]string, allowed map[string]string) (faults []string) {
	for _, from := range slices.Sorted(maps.Keys(packages)) {
		to, known := allowed[from]
		if !known {
			faults = append(faults, fmt.Sprintf("%s is not in the table of arrows; say there what it may import", from))
			continue
		}
		for _, imported := range packages[from] {
			if !slices.Contains(strings.Fields(to), imported) {
				faults = append(faults, fmt.Sprintf("%s → %s is forbidden", from, imported))
			}
		}
	}
	for _, from := range slices.Sorted(maps.Keys(allowed)) {
		if _, is := packages[from]; !is {
			faults = append(faults, fmt.Sprintf("%s is in the table of arrows, but is no package", from))
		}
	}
	return faults
}

func TestArrows_RunOneWay(t *testing.T) {
	t.Parallel()
	out, err := exec.Command("go", "list", "-f", `{{.ImportPath}} {{join .Imports " "}}`, "./...").Output()
	if err != nil {
		t.Fatal(err)
	}
	packages := make(map[string][]string)
	for line := range strings.Lines(string(out)) {
		fields := strings.Fields(line)
		from, below := strings.CutPrefix(fields[0], module)
		if !below {
			continue // this test's own package
		}
		packages[from] = nil
		for _, imported := range fields[1:] {
			if to, own := strings.CutPrefix(imported, module); own {
				packages[from] = append(packages[from], to)
			}
		}
	}
	for _, fault := range forbidden(packages, arrows()) {
		t.Error(fault)
	}
}

func TestArrows_AForbiddenOneIsNamed(t *testing.T) {
	t.Parallel()
	got := forbidden(map[string][]string{
		"tasks":    {"dbpool", "worker/internal/relay"},
		"dbpool":   nil,
		"billing":  {"tasks"},
		"worker":   {"tasks"},
		"outbound": {"tasks"},
	}, map[string]string{"tasks": "dbpool", "dbpool": "", "worker": "tasks dbpool", "outbound": "", "admin": "tasks"})
	want := []string{
		"billing is not in the table of arrows; say there what it may import",
		"outbound → tasks is forbidden",
		"tasks → worker/internal/relay is forbidden",
		"admin is in the table of arrows, but is no package",
	}
	if !slices.Equal(got, want) {
		t.Errorf("faults %q, want %q", got, want)
	}
}
