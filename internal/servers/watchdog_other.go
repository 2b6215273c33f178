//go:build !unix

package servers

// watchdog does nothing here: there is no shell to count on. A parent that is killed leaves its servers behind.
type watchdog struct{}

func startWatchdog(string) (*watchdog, error) { return &watchdog{}, nil }

func (*watchdog) watch(int)              {}
func (*watchdog) paused([]int)           {}
func (*watchdog) removeIfEmpty([]string) {}
func (*watchdog) stop()                  {}
