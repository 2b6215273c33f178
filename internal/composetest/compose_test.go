package composetest

import (
	"context"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/compose-spec/compose-go/v2/cli"
	"github.com/compose-spec/compose-go/v2/types"
)

// load reads the file as docker compose does in a folder of its own, with a .env or without
// one, "".
func load(t *testing.T, file, dotEnv string) (*types.Project, error) {
	t.Helper()
	dir := t.TempDir()
	path := filepath.Join(dir, "docker-compose.yml")
	if err := os.WriteFile(path, []byte(file), 0o600); err != nil {
		t.Fatal(err)
	}
	if dotEnv != "" {
		if err := os.WriteFile(filepath.Join(dir, ".env"), []byte(dotEnv), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	options, err := cli.NewProjectOptions([]string{path}, cli.WithWorkingDirectory(dir), cli.WithEnvFiles(), cli.WithDotEnv)
	if err != nil {
		t.Fatal(err)
	}
	return options.LoadProject(context.Background())
}

func read(t *testing.T, name string) string {
	t.Helper()
	data, err := os.ReadFile(filepath.Join("..", "..", name))
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

func TestCompose_IsWhatItSeems(t *testing.T) {
	t.Parallel()
	project, err := load(t, read(t, "docker-compose.yml"), "")
	if err != nil {
		t.Fatal(err)
	}
	if got := slices.Sorted(maps.Keys(project.Services)); !slices.Equal(got, []string{"asynqmon", "migrate", "postgres", "redis", "worker"}) {
		t.Fatalf("the services are %q", got)
	}
	var order []string
	if err := project.ForEachService(nil, func(name string, _ *types.ServiceConfig) error {
		order = append(order, name)
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	worker := project.Services["worker"]
	if slices.Index(order, "postgres") > slices.Index(order, "migrate") || slices.Index(order, "migrate") > slices.Index(order, "worker") {
		t.Errorf("they start in the order %q", order)
	}
	for name, want := range map[string]string{
		"worker": "CMD worker health", "asynqmon": "CMD worker health --monitor",
		"postgres": "CMD pg_isready -h 127.0.0.1 -U carpool -d carpool", "redis": "CMD valkey-cli ping",
	} {
		check := project.Services[name].HealthCheck
		if check == nil || check.Disable || strings.Join(check.Test, " ") != want || check.Interval == nil || check.Retries == nil {
			t.Errorf("%s: its health check is %+v, want %q", name, check, want)
		}
	}
	check := worker.HealthCheck
	if time.Duration(*check.Timeout) < 5*time.Second || time.Duration(*check.StartPeriod) < time.Minute {
		t.Errorf("the worker's health check gives up after %s, and %s for the start", check.Timeout, check.StartPeriod)
	}
	if worker.StopGracePeriod == nil || time.Duration(*worker.StopGracePeriod) != time.Minute {
		t.Errorf("the worker may stop within %v", worker.StopGracePeriod)
	}
	for name, service := range project.Services {
		for _, port := range service.Ports {
			if port.HostIP != "127.0.0.1" {
				t.Errorf("%s: port %s can be reached from other machines", name, port.Published)
			}
		}
		if service.Build != nil && (service.Image != worker.Image || service.Build.Context != worker.Build.Context) {
			t.Errorf("%s: it is built into %s from %s", name, service.Image, service.Build.Context)
		}
	}
	if level := worker.Environment["LOG_LEVEL"]; level == nil || *level != "debug" {
		t.Errorf("LOG_LEVEL is %v", level)
	}
}

// What .env.example says is true: compose reads a copy of it, but for the servers, which it
// brings itself.
func TestCompose_TakesTheSettingsOfDotEnv(t *testing.T) {
	t.Parallel()
	project, err := load(t, read(t, "docker-compose.yml"), read(t, ".env.example")+"\nWORKER_CONCURRENCY=3\nLOG_LEVEL=warn\nMONITOR_PASSWORD=of one's own\n")
	if err != nil {
		t.Fatal(err)
	}
	for service, want := range map[string]map[string]string{
		"worker": {
			"WORKER_CONCURRENCY": "3", "LOG_LEVEL": "warn", "HEALTH_ADDR": "127.0.0.1:8081", "REDIS_URL": "redis://redis:6379/0",
			"DATABASE_URL": "postgres://carpool:carpool@postgres:5432/carpool?sslmode=disable",
		},
		"asynqmon": {"MONITOR_PASSWORD": "of one's own", "MONITOR_ADDR": "0.0.0.0:8080"},
	} {
		for name, value := range want {
			if got := project.Services[service].Environment[name]; got == nil || *got != value {
				t.Errorf("%s: %s is %v, want %q", service, name, got, value)
			}
		}
	}
}

// That the library says no.
func TestCompose_FaultsAreFound(t *testing.T) {
	t.Parallel()
	good := read(t, "docker-compose.yml")
	for _, c := range []struct{ old, new string }{
		{"stop_grace_period: 60s", "stop_grace_periode: 60s"},
		{"stop_grace_period: 60s", "stop_grace_period: a minute"},
		{"start_period: 70s", "start_periode: 70s"},
		{"restart: unless-stopped\n\nvolumes:", "restart: [unless-stopped]\n\nvolumes:"},
		{"condition: service_completed_successfully", "condition: service_complete"},
		{"- redis:/data", "- rediss:/data"},
		{"      migrate:\n        condition", "      migration:\n        condition"},
		{"127.0.0.1:8080:8080", "127.0.0.1:8080:http"},
		{"required: false", "required: true"},
		{"${LOG_LEVEL:-debug}", "${LOG_LEVEL:-debug"},
	} {
		if strings.Count(good, c.old) != 1 {
			t.Errorf("docker-compose.yml has %q %d times; change this test with it", c.old, strings.Count(good, c.old))
			continue
		}
		if _, err := load(t, strings.Replace(good, c.old, c.new, 1), ""); err == nil {
			t.Errorf("%q for %q is taken", c.new, c.old)
		}
	}
}
