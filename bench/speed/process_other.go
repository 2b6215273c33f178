//go:build !linux

package main

import "time"

// usage tells nothing here.
func usage() (cpu time.Duration, rss int64) { return 0, 0 }

// usageOfGroup tells nothing either.
func usageOfGroup(int) (cpu time.Duration, rss int64) { return 0, 0 }

// sleep is only as exact as the runtime's timers are.
func sleep(d time.Duration) { time.Sleep(d) }
