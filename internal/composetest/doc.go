// Package composetest has no code: its tests read docker-compose.yml as docker compose
// does, by its own library. It is a module of its own, so that the library is no dependency
// of carpool's. What the file means to the worker, package deploytest checks.
package composetest
