// Package deploytest has no code: its tests check the files that carpool is
// deployed with, and those of examples/own, as far as that goes without an account
// and without Docker. They are checked against Render's schema, against each other,
// and against the program, whose settings and commands are read from its source; and
// their commands are run, as a deploy runs them, on servers of this machine.
package deploytest
