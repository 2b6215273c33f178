// Worker runs background jobs from Redis on one shared pool of Postgres connections; see
// `worker --help`. A program with tasks of its own has a main function like this one.
package main

import (
	"github.com/carpool-go/carpool/tasks/builtin"
	"github.com/carpool-go/carpool/worker/cli"
)

func main() { cli.Main(&builtin.Tasks{}) }
