package deploytest

import (
	"fmt"
	"maps"
	"net"
	"net/url"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"go.yaml.in/yaml/v3"
)

// composeFile is what our docker-compose.yml makes use of.
type composeFile struct {
	Name     string                    `yaml:"name"`
	Services map[string]composeService `yaml:"services"`
	Volumes  map[string]any            `yaml:"volumes"`
	Common   any                       `yaml:"x-carpool"`
}

type composeService struct {
	Image       string            `yaml:"image"`
	Build       string            `yaml:"build"`
	Command     []string          `yaml:"command"`
	Environment map[string]string `yaml:"environment"`
	EnvFile     []struct {
		Path     string `yaml:"path"`
		Required bool   `yaml:"required"`
	} `yaml:"env_file"`
	DependsOn map[string]struct {
		Condition string `yaml:"condition"`
	} `yaml:"depends_on"`
	Healthcheck *struct {
		Test        []string `yaml:"test"`
		Interval    string   `yaml:"interval"`
		Timeout     string   `yaml:"timeout"`
		StartPeriod string   `yaml:"start_period"`
		Retries     int      `yaml:"retries"`
	} `yaml:"healthcheck"`
	Volumes         []string `yaml:"volumes"`
	Ports           []string `yaml:"ports"`
	Restart         string   `yaml:"restart"`
	StopGracePeriod string   `yaml:"stop_grace_period"`
}

func parseCompose(data string) (composeFile, error) {
	var c composeFile
	dec := yaml.NewDecoder(strings.NewReader(data))
	dec.KnownFields(true)
	return c, dec.Decode(&c)
}

// interpolated puts the defaults in, as compose does without an .env.
func interpolated(value string) string {
	return regexp.MustCompile(`\$\{[A-Z_]+:-([^}]*)\}`).ReplaceAllString(value, "$1")
}

// checkCompose returns all that is wrong.
func checkCompose(t testing.TB, data string) (faults []string) {
	t.Helper()
	fault := func(format string, args ...any) { faults = append(faults, fmt.Sprintf(format, args...)) }
	c, err := parseCompose(data)
	if err != nil {
		return []string{err.Error()}
	}
	worker := theWorker(t)
	for _, name := range slices.Sorted(maps.Keys(c.Services)) {
		s := c.Services[name]
		for _, f := range checkComposeService(c, s) {
			fault("%s: %s", name, f)
		}
		if s.Build == "" {
			continue
		}
		for _, f := range checkOurService(t, worker, c, s) {
			fault("%s: %s", name, f)
		}
	}
	if got := slices.Sorted(maps.Keys(c.Services)); !slices.Equal(got, []string{"asynqmon", "migrate", "postgres", "redis", "worker"}) {
		fault("the services are %q", got)
	}
	redis := strings.Join(c.Services["redis"].Command, " ")
	for _, option := range []string{"--maxmemory-policy noeviction", "--appendonly yes"} {
		if !strings.Contains(redis, option) {
			fault("redis: jobs may be lost without %s", option)
		}
	}
	return faults
}

func checkComposeService(c composeFile, s composeService) (faults []string) {
	fault := func(format string, args ...any) { faults = append(faults, fmt.Sprintf(format, args...)) }
	for name, needs := range s.DependsOn {
		other, ok := c.Services[name]
		switch needs.Condition {
		case "service_healthy":
			if !ok || other.Healthcheck == nil {
				fault("it waits for the health of %s, which nothing checks", name)
			}
		case "service_completed_successfully":
			if !ok || other.Restart != "" {
				fault("it waits for the end of %s, which has none", name)
			}
		default:
			fault("%q is no condition", needs.Condition)
		}
	}
	for _, volume := range s.Volumes {
		source, _, _ := strings.Cut(volume, ":")
		if _, ok := c.Volumes[source]; !ok {
			fault("there is no volume %q", source)
		}
	}
	for _, port := range s.Ports {
		if !strings.HasPrefix(port, "127.0.0.1:") {
			fault("port %s can be reached from other machines", port)
		}
	}
	if h := s.Healthcheck; h != nil {
		if _, err := time.ParseDuration(h.Interval); err != nil || len(h.Test) < 2 || h.Test[0] != "CMD" || h.Retries < 1 {
			fault("healthcheck %+v", *h)
		}
	}
	return faults
}

// checkOurService checks a service that runs our image.
func checkOurService(t testing.TB, worker program, c composeFile, s composeService) (faults []string) {
	t.Helper()
	fault := func(format string, args ...any) { faults = append(faults, fmt.Sprintf(format, args...)) }
	if f := checkCommand(worker, s.Command); f != "" {
		return []string{f}
	}
	command := strings.Join(s.Command, " ")
	required := map[string][]string{
		"worker run": {"DATABASE_URL", "REDIS_URL"}, "worker migrate": {"DATABASE_URL"}, "worker monitor": {"REDIS_URL", "MONITOR_ADDR", "MONITOR_PASSWORD"},
	}[command]
	if required == nil {
		fault("what does %q need?", command)
	}
	for _, f := range checkSettings(worker.commands[s.Command[1]], slices.Sorted(maps.Keys(s.Environment)), required...) {
		fault("%s", f)
	}
	for _, file := range s.EnvFile {
		if file.Required {
			fault("there is no %s in the repository", file.Path)
		}
	}
	for name, service := range map[string]string{"DATABASE_URL": "postgres", "REDIS_URL": "redis"} {
		if value, ok := s.Environment[name]; ok {
			if f := checkServerURL(value, service, c.Services[service]); f != "" {
				fault("%s: %s", name, f)
			}
			if _, waits := s.DependsOn[service]; !waits && command != "worker run" {
				fault("it does not wait for %s", service)
			}
		}
	}
	if command != "worker migrate" { // it ends
		if s.Healthcheck == nil || len(s.Healthcheck.Test) == 0 {
			fault("nothing checks its health")
		} else if f := checkHealthcheck(worker, s.Healthcheck.Test[1:], command, s.Environment["HEALTH_ADDR"]); f != "" {
			fault("%s", f)
		}
	}
	switch command {
	case "worker run":
		if s.DependsOn["migrate"].Condition != "service_completed_successfully" || s.DependsOn["redis"].Condition != "service_healthy" {
			fault("it does not wait for migrate and redis")
		}
		grace, err := time.ParseDuration(s.StopGracePeriod)
		if needs := stopsWithin(t, worker.commands["run"], interpolated(s.Environment["WORKER_SHUTDOWN_TIMEOUT"])); err != nil || grace <= needs {
			fault("stop_grace_period %q must be above %s", s.StopGracePeriod, needs)
		}
	case "worker monitor":
		_, port, err := net.SplitHostPort(s.Environment["MONITOR_ADDR"])
		if err != nil || len(s.Ports) != 1 || !strings.HasSuffix(s.Ports[0], ":"+port) {
			fault("it listens on %s, but %q is published", s.Environment["MONITOR_ADDR"], s.Ports)
		}
	}
	return faults
}

// checkServerURL compares a URL with the service that it leads to.
func checkServerURL(raw, name string, server composeService) (fault string) {
	u, err := url.Parse(raw)
	if err != nil || u.Hostname() != name {
		return "it does not lead to " + name
	}
	if name != "postgres" {
		return ""
	}
	password, _ := u.User.Password()
	got := []string{u.User.Username(), password, strings.TrimPrefix(u.Path, "/")}
	want := []string{server.Environment["POSTGRES_USER"], server.Environment["POSTGRES_PASSWORD"], server.Environment["POSTGRES_DB"]}
	if !slices.Equal(got, want) {
		return fmt.Sprintf("its user, password and database are %q, those of the service %q", got, want)
	}
	return ""
}

func TestCompose_HoldsTogether(t *testing.T) {
	t.Parallel()
	for _, f := range checkCompose(t, read(t, "docker-compose.yml")) {
		t.Error("docker-compose.yml:", f)
	}
}

func TestCompose_IsAcceptedByTheWorker(t *testing.T) {
	t.Parallel()
	c, err := parseCompose(read(t, "docker-compose.yml"))
	if err != nil {
		t.Fatal(err)
	}
	var settings []string
	for name, value := range c.Services["worker"].Environment {
		settings = append(settings, name+"="+interpolated(value))
	}
	theWorker(t).accepts(t, settings)
}

func TestCompose_FaultsAreFound(t *testing.T) {
	t.Parallel()
	good := read(t, "docker-compose.yml")
	for _, tc := range []struct{ old, new, want string }{
		{`command: ["worker", "run"]`, `command: ["worker", "start"]`, `"worker start" is no command`},
		{`command: ["worker", "monitor"]`, `command: ["asynqmon"]`, `"asynqmon" is no program of the image`},
		{`command: ["worker", "monitor"]`, `command: ["monitor"]`, `"monitor" is no program of the image`},
		{`command: ["worker", "monitor"]`, `command: ["worker", "monitor", "serve"]`, `"worker monitor serve" is no command`},
		{"      LOG_LEVEL: ${", "      MONITOR_ADDR: ${", "MONITOR_ADDR is no setting"},
		{"      LOG_LEVEL: ${", "      LOGLEVEL: ${", "LOGLEVEL is no setting"},
		{"MONITOR_PASSWORD: ${MONITOR_PASSWORD:-carpool}", "MONITOR_READ_ONLY: true", "MONITOR_PASSWORD is not set"},
		{"- 127.0.0.1:8080:8080", "- 8080:8080", "can be reached from other machines"},
		{"- 127.0.0.1:8080:8080", "- 127.0.0.1:8080:80", "is published"},
		{"condition: service_completed_successfully", "condition: service_started", "is no condition"},
		{"      migrate:\n        condition: service_completed_successfully\n", "", "does not wait for migrate"},
		{"stop_grace_period: 60s", "stop_grace_period: 30s", "must be above 32s"},
		{"stop_grace_period: 60s", "stop_grace_periode: 60s", "field stop_grace_periode not found"},
		{"stop_grace_period: 60s # more", "#", "must be above 32s"},
		{"POSTGRES_PASSWORD: carpool", "POSTGRES_PASSWORD: other", "its user, password and database"},
		{`"--maxmemory-policy", "noeviction"`, `"--maxmemory-policy", "allkeys-lru"`, "jobs may be lost"},
		{"- redis:/data", "- rediss:/data", `there is no volume "rediss"`},
		{`test: ["CMD", "valkey-cli", "ping"]`, `test: ["valkey-cli", "ping"]`, "healthcheck"},
		{"required: false", "required: true", "there is no .env"},
		{`test: ["CMD", "worker", "health"]`, `test: ["CMD", "curl", "127.0.0.1:8081/readyz"]`, `not "worker health"`},
		{`test: ["CMD", "worker", "health", "--monitor"]`, `test: ["CMD", "worker", "health"]`, `not "worker health --monitor"`},
		{"HEALTH_ADDR: 127.0.0.1:8081", "HEALTH_ADDR: 0.0.0.0:8081", "nobody else is to"},
		{"      HEALTH_ADDR: 127.0.0.1:8081 # in the container only\n", "", `HEALTH_ADDR is ""`},
	} {
		if strings.Count(good, tc.old) != 1 {
			t.Errorf("docker-compose.yml has %q %d times; change this test with it", tc.old, strings.Count(good, tc.old))
			continue
		}
		faults := strings.Join(checkCompose(t, strings.Replace(good, tc.old, tc.new, 1)), "\n")
		if !strings.Contains(faults, tc.want) {
			t.Errorf("%q for %q: %q is not among the faults found:\n%s", tc.new, tc.old, tc.want, faults)
		}
	}
}
