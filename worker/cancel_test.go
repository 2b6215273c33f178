package main

import (
	"context"
	"strings"
	"testing"

	"github.com/jackc/pgx/v5"

	"github.com/carpool-go/carpool/tasks"
)

func TestCancel_CommandSaysWhatThereIsToSay(t *testing.T) {
	t.Parallel()
	b := setup(t)
	info, err := b.client.Enqueue(t.Context(), probe{"x"}, nil)
	if err != nil {
		t.Fatal(err)
	}
	if _, errs, code := run(t, b.worker(t, nil, "cancel", info.ID)); code != 0 {
		t.Errorf("exit code %d: %s", code, errs)
	}
	if _, errs, code := run(t, b.worker(t, nil, "cancel", info.ID)); code != 1 || !strings.Contains(errs, "there is no such job") {
		t.Errorf("cancelled twice: exit code %d: %s", code, errs)
	}

	// One that is still in the outbox.
	conn, err := pgx.Connect(t.Context(), b.databaseURL)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(context.Background())
	set := new(tasks.Set)
	tasks.Register(set, func(context.Context, *tasks.Job, probe) (string, error) { return "", nil })
	if err := tasks.RecordKinds(t.Context(), conn, set); err != nil {
		t.Fatal(err)
	}
	var id string
	if err := conn.QueryRow(t.Context(), `SELECT carpool.enqueue('probe', '{"word": "x"}')`).Scan(&id); err != nil {
		t.Fatal(err)
	}
	if _, errs, code := run(t, b.worker(t, nil, "cancel", id)); code != 0 {
		t.Errorf("in the outbox: exit code %d: %s", code, errs)
	}
	if _, errs, code := run(t, b.worker(t, nil, "cancel", id)); code != 1 || !strings.Contains(errs, "there is no such job") {
		t.Errorf("in the outbox, cancelled twice: exit code %d: %s", code, errs)
	}
}
