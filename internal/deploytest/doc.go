// Package deploytest has no code: its tests check the files that carpool is
// deployed with, as far as that goes without an account and without Docker. They
// are checked against Render's schema, against each other, and against the
// worker, whose settings and commands are read from its source.
package deploytest
