package worker

import (
	"context"
	"errors"
	"fmt"
	"log/slog"

	"github.com/redis/go-redis/v9"

	"github.com/carpool-go/carpool/worker/internal/delivery"
	"github.com/carpool-go/carpool/worker/internal/doctor"
	"github.com/carpool-go/carpool/worker/internal/health"
)

// wellbeing tells over HTTP how the worker is. One without a server tells nobody.
type wellbeing struct{ server *health.Server }

// ListenError is the error of [Run] when it can't listen on [Config.HealthAddr].
type ListenError struct{ Err error }

func (e *ListenError) Error() string { return "worker: HealthAddr: " + e.Err.Error() }
func (e *ListenError) Unwrap() error { return e.Err }

// listenHealth serves the worker's health at an address, "" for nowhere.
func listenHealth(address string, log *slog.Logger) (wellbeing, error) {
	if address == "" {
		return wellbeing{}, nil
	}
	server, err := health.Listen(address, log)
	if err != nil {
		return wellbeing{}, &ListenError{err}
	}
	log.Info("the worker's health is served", "address", server.Addr(), "paths", []string{health.LivePath, health.ReadyPath})
	return wellbeing{server}, nil
}

// Close ends the server, when nothing else of the worker is left.
func (w wellbeing) Close() {
	if w.server != nil {
		w.server.Close()
	}
}

func (w wellbeing) notReady(why string) {
	if w.server != nil {
		w.server.NotReady(why)
	}
}

// awaiting wraps a check of the start, so that the worker tells what it waits for.
func (w wellbeing) awaiting(what string, check func(context.Context) error) func(context.Context) error {
	return func(ctx context.Context) error {
		w.notReady("it starts, and waits for " + what)
		return check(ctx)
	}
}

// ready has the worker ready as long as both servers answer and jobs are fetched.
func (w wellbeing) ready(rdb redis.UniversalClient, jobs *delivery.Delivery) {
	if w.server == nil {
		return
	}
	w.server.Ready(
		health.Check{Name: "redis", Ask: func(ctx context.Context) (string, error) {
			err := doctor.CheckScripts(ctx, rdb)
			if _, refused := errors.AsType[redis.Error](err); refused {
				return "it refuses a command; the log says why", fmt.Errorf("redis: %w", err)
			} else if err != nil {
				return "it does not answer; the log says why", fmt.Errorf("redis: %w", err)
			}
			return "", nil
		}},
		health.Check{Name: "database", Ask: jobs.Breaker.Check},
		health.Check{Name: "fetching", Ask: func(context.Context) (string, error) { return jobs.Servers.Fault(), nil }},
	)
}
