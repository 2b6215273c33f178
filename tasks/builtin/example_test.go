package builtin_test

import (
	"fmt"
	"log"

	"github.com/carpool-go/carpool/tasks"
	"github.com/carpool-go/carpool/tasks/builtin"
)

// A program sets a default in code, which IMPORT_DIR and --import-dir win over. A whole
// worker with the group is cli.Main(group).
func ExampleTasks() {
	group := &builtin.Tasks{ImportDir: "/srv/imports"}
	set, err := tasks.NewSet(group)
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(set.Kinds())
	// Output: [csv:import rows:prune webhook:deliver]
}
