package testservers

import (
	"log"
	"testing"
)

// Example is the [testing.TB] for [Postgres] and [Redis] in examples, which get none. What it is given stays until the
// package's servers are stopped.
type Example struct{ testing.TB }

// Helper does nothing.
func (Example) Helper() {}

// Cleanup does nothing.
func (Example) Cleanup(func()) {}

// Fatal ends the program.
func (Example) Fatal(args ...any) { log.Fatal(args...) }

// Fatalf ends the program.
func (Example) Fatalf(format string, args ...any) { log.Fatalf(format, args...) }
