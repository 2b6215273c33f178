// Shop is a worker with tasks of its own beside the ready-made ones; see `shop --help`.
package main

import (
	"github.com/carpool-go/carpool/tasks/builtin"
	"github.com/carpool-go/carpool/worker/cli"

	"example.com/shop"
)

func main() { cli.Main(&builtin.Tasks{}, &shop.Tasks{}) }
