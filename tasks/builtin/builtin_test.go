package builtin_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/carpool-go/carpool/tasks"
	"github.com/carpool-go/carpool/tasks/builtin"
	"github.com/carpool-go/carpool/tasks/maintenance"
	"github.com/carpool-go/carpool/tasks/taskstest"
)

func TestMain(m *testing.M) { taskstest.Main(m) }

func TestTasks_EveryExampleIsValid(t *testing.T) {
	t.Parallel()
	set, err := tasks.NewSet(new(builtin.Tasks), new(maintenance.Tasks))
	if err != nil {
		t.Fatal(err)
	}
	for _, kind := range set.Kinds() {
		task, err := set.Lookup(kind)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := task.Decode([]byte(task.Example())); err != nil {
			t.Errorf("%s: %s: %v", kind, task.Example(), err)
		}
		for _, f := range task.Fields {
			if f.Doc == "" {
				t.Errorf("%s: field %s has no doc tag", kind, f.Name)
			}
		}
	}
}

func TestTasks_ReadTheirSettingsWhenTheyRun(t *testing.T) {
	t.Parallel()
	kit := taskstest.New(t)
	var group builtin.Tasks
	set, err := tasks.NewSet(&group)
	if err != nil {
		t.Fatal(err)
	}
	task, err := set.Lookup("csv:import")
	if err != nil {
		t.Fatal(err)
	}
	group.ImportDir = t.TempDir() // after it was registered
	if err := os.WriteFile(filepath.Join(group.ImportDir, "x.csv"), []byte("a\n1\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	payload, err := task.Decode([]byte(`{"source": "file:///x.csv", "table": "t", "mode": "replace"}`))
	if err != nil {
		t.Fatal(err)
	}
	result, err := task.Run(t.Context(), &tasks.Job{ID: "one", Kind: task.Kind, DB: kit.DB}, payload)
	if err != nil || !strings.Contains(string(result), `"rows":1`) {
		t.Errorf("result %s, error %v", result, err)
	}
}

func TestTasks_PruneTheTablesOfTheSettingAlone(t *testing.T) {
	t.Parallel()
	kit := taskstest.New(t)
	for _, sql := range []string{
		"CREATE TABLE events (at date)", "INSERT INTO events VALUES ('2000-01-01')",
		`INSERT INTO carpool.kinds VALUES ('old:kind', '[]', '2000-01-01')`,
	} {
		if _, err := kit.DB.Exec(t.Context(), sql); err != nil {
			t.Fatal(err)
		}
	}
	var group builtin.Tasks
	set, err := tasks.NewSet(&group)
	if err != nil {
		t.Fatal(err)
	}
	task, err := set.Lookup("rows:prune")
	if err != nil {
		t.Fatal(err)
	}
	payload, err := task.Decode([]byte(task.Example()))
	if err != nil {
		t.Fatal(err)
	}
	run := func() (string, error) {
		result, err := task.Run(t.Context(), &tasks.Job{ID: "one", Kind: task.Kind, DB: kit.DB}, payload)
		return string(result), err
	}
	if _, err := run(); !tasks.IsPermanent(err) || !strings.Contains(err.Error(), `set PRUNE_ALLOW`) {
		t.Errorf("without PRUNE_ALLOW: %v", err)
	}
	// A program that doesn't check its settings prunes nothing.
	group.PruneAllow = "public.events,carpool.kinds"
	if _, err := run(); !tasks.IsPermanent(err) || !strings.Contains(err.Error(), "PRUNE_ALLOW is wrong") {
		t.Errorf("with a PRUNE_ALLOW that is wrong: %v", err)
	}
	group.PruneAllow = "public.events"
	if result, err := run(); err != nil || !strings.Contains(result, `"deleted":1`) {
		t.Errorf("with PRUNE_ALLOW: result %s, error %v", result, err)
	}
	if _, err := task.Decode([]byte(`{"table": "carpool.kinds", "column": "seen_at", "older_than": "1ns"}`)); err == nil {
		t.Error("a payload that names a table of carpool's is taken")
	}
}

func TestTasks_CheckReportsEveryFaultAtOnceWithoutTheSecret(t *testing.T) {
	t.Parallel()
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, good := range []builtin.Tasks{{}, {ImportDir: t.TempDir(), PruneAllow: "public.events, App.log ins", WebhookSecret: "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"}} {
		if err := good.Check(); err != nil {
			t.Errorf("%+v: %v", good, err)
		}
	}
	err := (&builtin.Tasks{ImportDir: file, PruneAllow: "public.events,kinds,carpool.kinds", WebhookSecret: "whsec_s3cret!"}).Check()
	joined, ok := err.(interface{ Unwrap() []error })
	if !ok || len(joined.Unwrap()) != 3 {
		t.Fatalf("error %v; want three that are joined", err)
	}
	for i, want := range []string{
		"IMPORT_DIR is \"" + file + "\", which is not a folder that can be read; for example IMPORT_DIR=/var/imports",
		`PRUNE_ALLOW is wrong: "kinds" is no schema.table; "carpool.kinds": the schema is carpool's own, ` +
			"whose rows carpool:prune deletes when they are no longer needed; for example PRUNE_ALLOW=public.events,app.logins",
		"WEBHOOK_SECRET is wrong: it must be whsec_ and base64; make one with: echo whsec_$(openssl rand -base64 32); " +
			"for example WEBHOOK_SECRET=whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw",
	} {
		if got := joined.Unwrap()[i].Error(); got != want {
			t.Errorf("fault %d is\n%s, want\n%s", i+1, got, want)
		}
	}
}
