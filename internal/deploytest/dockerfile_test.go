package deploytest

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"
)

// instruction is one of a Dockerfile: "COPY", "go.mod go.sum ./".
type instruction struct{ name, args string }

// stages are the instructions after each FROM, that one included.
func stages(data string) (all [][]instruction) {
	data = regexp.MustCompile(`(?m)^\s*#.*\n`).ReplaceAllString(data, "")
	data = strings.ReplaceAll(data, "\\\n", " ")
	for line := range strings.Lines(data) {
		name, args, _ := strings.Cut(strings.TrimSpace(line), " ")
		if name == "" {
			continue
		}
		if name == "FROM" {
			all = append(all, nil)
		}
		if len(all) == 0 {
			continue
		}
		all[len(all)-1] = append(all[len(all)-1], instruction{name, strings.Join(strings.Fields(args), " ")})
	}
	return all
}

// the returns the arguments of the last instruction of that name, "" if there is none.
func the(stage []instruction, name string) (args string) {
	for _, i := range stage {
		if i.name == name {
			args = i.args
		}
	}
	return args
}

// checkDockerfile returns all that is wrong with the Dockerfile of a program's repository.
func checkDockerfile(t testing.TB, p program, data string) (faults []string) {
	t.Helper()
	fault := func(format string, args ...any) { faults = append(faults, fmt.Sprintf(format, args...)) }
	all := stages(data)
	if len(all) != 2 {
		return []string{fmt.Sprintf("it has %d stages, not one that builds and one that runs", len(all))}
	}
	build, final := all[0], all[1]

	// The module says which Go it needs at least.
	from := regexp.MustCompile(`^golang:(\d+\.\d+)\.\d+-alpine AS build$`).FindStringSubmatch(the(build, "FROM"))
	goMod := p.read(t, "go.mod")
	needs := regexp.MustCompile(`(?m)^go (\d+\.\d+)`).FindStringSubmatch(goMod)
	if from == nil || needs == nil || from[1] != needs[1] {
		fault("FROM %s, but go.mod wants Go %s, and the same commit the same patch of it", the(build, "FROM"), needs)
	}
	// A change of the source must not download all modules again. Where one of them is a
	// folder outside the image, there is vendor instead.
	var order []string
	for _, i := range build {
		order = append(order, i.name+" "+i.args)
	}
	modules, source := slices.Index(order, "RUN go mod download"), slices.Index(order, "COPY . .")
	vendors := strings.Contains(goMod, "=> ..")
	if vendors && (modules >= 0 || source < 0 || !strings.Contains(data, "go mod vendor")) {
		fault("the modules are not in vendor: %q", order)
	}
	if !vendors && (modules < 0 || source < modules || slices.Index(order[:max(modules, 0)], "COPY go.mod go.sum ./") < 0) {
		fault("the modules are not in a layer of their own: %q", order)
	}
	command := the(build, "RUN")
	if !strings.HasPrefix(command, "CGO_ENABLED=0 go build -trimpath -buildvcs=false ") || !strings.Contains(command, " -o /out/ ./cmd/"+p.program) {
		fault("it builds with %q", command)
	}
	if !setsVersion(p, command, `\$\{VERSION:-\$\{RENDER_GIT_COMMIT:-\w+\}\}`) {
		fault("the program does not learn its version: %q", command)
	}
	for _, arg := range []string{"ARG VERSION", "ARG RENDER_GIT_COMMIT"} {
		if !slices.Contains(order, arg) {
			fault("%s is missing", arg)
		}
	}

	if from := the(final, "FROM"); strings.HasSuffix(from, ":latest") || !strings.Contains(from, ":") {
		fault("the final stage is from %s, which changes by itself", from)
	}
	if user := the(final, "USER"); user == "" || user == "0" || user == "root" {
		fault("it runs as root")
	} else if !strings.Contains(the(final, "RUN"), " -u "+user+" ") {
		fault("nobody has made the user %s", user)
	}
	if final[len(final)-1].name != "CMD" || the(final, "ENTRYPOINT") != "" {
		fault("it must end with CMD and have no ENTRYPOINT, or render.yaml's commands mean something else")
	}
	var words []string
	if err := json.Unmarshal([]byte(the(final, "CMD")), &words); err != nil {
		fault("CMD %s: a shell would stand between the program and its signals", the(final, "CMD"))
	} else if f := checkCommand(p, words); f != "" {
		fault("CMD: %s", f)
	}
	healthcheck := the(final, "HEALTHCHECK")
	var asks []string
	if _, command, _ := strings.Cut(healthcheck, " CMD "); json.Unmarshal([]byte(command), &asks) != nil {
		fault("HEALTHCHECK %s: a shell would run it", healthcheck)
	} else if f := checkHealthcheck(p, asks, strings.Join(words, " "), strings.TrimPrefix(the(final, "ENV"), "HEALTH_ADDR=")); f != "" {
		fault("HEALTHCHECK: %s", f)
	}
	times := make(map[string]time.Duration)
	for _, m := range regexp.MustCompile(`--([a-z-]+)=(\S+)`).FindAllStringSubmatch(healthcheck, -1) {
		times[m[1]], _ = time.ParseDuration(m[2])
	}
	startup, _ := time.ParseDuration(p.commands["run"]["WORKER_STARTUP_TIMEOUT"])
	if times["start-period"] <= startup || times["timeout"] < 6*time.Second || times["interval"] < times["timeout"] {
		fault("HEALTHCHECK: its times are %v: the start takes up to %s, an answer 5s", times, startup)
	}
	if the(final, "STOPSIGNAL") != "SIGTERM" {
		fault("STOPSIGNAL is %q", the(final, "STOPSIGNAL"))
	}
	if !slices.Contains(final, instruction{"COPY", "--from=build /out/" + p.program + " /usr/local/bin/"}) {
		fault("the program is not on the PATH")
	}
	for _, file := range []string{"ca-certificates", "tzdata"} {
		if !strings.Contains(the(final, "RUN"), file) {
			fault("%s are missing", file)
		}
	}
	return faults
}

// setsVersion reports whether a command that builds sets the variable of package cli that
// holds the version. value is a regular expression.
func setsVersion(p program, command, value string) bool {
	set := regexp.MustCompile(`-X github\.com/carpool-go/carpool/worker/cli\.(\w+)=` + value).FindStringSubmatch(command)
	return set != nil && slices.Contains(p.variables, set[1])
}

func TestMakefile_BuildsTheWorkerWithItsVersion(t *testing.T) {
	t.Parallel()
	command := regexp.MustCompile(`(?m)^build:.*\n\t(.* \./cmd/worker)$`).FindStringSubmatch(read(t, "Makefile"))
	if command == nil || !setsVersion(theWorker(t), command[1], `\$\(VERSION\)`) {
		t.Errorf("the worker does not learn its version: %q", command)
	}
}

func TestDockerfile_HoldsTogether(t *testing.T) {
	t.Parallel()
	each(t, func(t *testing.T, p program) {
		for _, f := range checkDockerfile(t, p, p.read(t, "Dockerfile")) {
			t.Error("Dockerfile:", f)
		}
	})
}

func TestDockerfile_FaultsAreFound(t *testing.T) {
	t.Parallel()
	worker := theWorker(t)
	good := worker.read(t, "Dockerfile")
	for _, tc := range []struct{ old, new, want string }{
		{"USER 10001", "", "it runs as root"},
		{"USER 10001", "USER root", "it runs as root"},
		{"USER 10001", "USER 10002", "nobody has made the user"},
		{"FROM alpine:3.22", "", "1 stages"},
		{"FROM alpine:3.22", "FROM alpine", "changes by itself"},
		{"golang:1.26.8-alpine", "golang:1.25.8-alpine", "go.mod wants"},
		{"golang:1.26.8-alpine", "golang:1.26-alpine", "the same patch"},
		{" -trimpath", "", "it builds with"},
		{" -buildvcs=false", "", "it builds with"},
		{`CMD ["worker", "health"]`, `CMD ["worker", "status"]`, `is "worker status", not "worker health"`},
		{`CMD ["worker", "health"]`, `CMD worker health`, "a shell would run it"},
		{`CMD ["worker", "health"]`, `CMD ["worker", "health", "--monitor"]`, `not "worker health"`},
		{"ENV HEALTH_ADDR=127.0.0.1:8081", "", `HEALTH_ADDR is ""`},
		{"ENV HEALTH_ADDR=127.0.0.1:8081", "ENV HEALTH_ADDR=0.0.0.0:8081", "nobody else is to"},
		{"--start-period=70s", "--start-period=30s", "the start takes up to 1m0s"},
		{"--timeout=6s", "--timeout=1s", "an answer 5s"},
		{"RUN go mod download\n", "", "layer of their own"},
		{"./cmd/worker", "./worker", "it builds with"},
		{"cli.buildVersion", "cli.version", "does not learn its version"},
		{"ARG VERSION\n", "", "ARG VERSION is missing"},
		{`CMD ["worker", "run"]`, "CMD worker run", "a shell would stand"},
		{`CMD ["worker", "run"]`, `CMD ["worker", "serve"]`, `"worker serve" is no command`},
		{`CMD ["worker", "run"]`, `ENTRYPOINT ["worker"]`, "no ENTRYPOINT"},
		{"/usr/local/bin/", "/app/", "not on the PATH"},
		{"ca-certificates", "", "ca-certificates are missing"},
	} {
		if strings.Count(good, tc.old) != 1 {
			t.Errorf("the Dockerfile has %q %d times; change this test with it", tc.old, strings.Count(good, tc.old))
			continue
		}
		faults := strings.Join(checkDockerfile(t, worker, strings.Replace(good, tc.old, tc.new, 1)), "\n")
		if !strings.Contains(faults, tc.want) {
			t.Errorf("%q for %q: %q is not among the faults found:\n%s", tc.new, tc.old, tc.want, faults)
		}
	}
}

// What the image is built from must not be among what .dockerignore leaves out.
func TestDockerignore_LeavesOutNothingThatIsBuilt(t *testing.T) {
	t.Parallel()
	each(t, leavesOutNothingThatIsBuilt)
}

// ignored are the patterns of the program's .dockerignore.
func (p program) ignored(t testing.TB) (patterns []string) {
	t.Helper()
	for line := range strings.Lines(p.read(t, ".dockerignore")) {
		if line = strings.TrimSpace(line); line != "" && !strings.HasPrefix(line, "#") {
			patterns = append(patterns, line)
		}
	}
	return patterns
}

func leavesOutNothingThatIsBuilt(t *testing.T, p program) {
	ignored := p.ignored(t)
	for _, secret := range []string{".env", ".env.local", ".git/config"} {
		if !isIgnored(t, ignored, secret) {
			t.Errorf("%s gets into the image's build", secret)
		}
	}
	if isIgnored(t, ignored, "worker/run.go") || !isIgnored(t, ignored, "worker/run_test.go") || !isIgnored(t, ignored, "render.yaml") ||
		p.dir == "." && !isIgnored(t, ignored, "dev/data/x.csv") {
		t.Error("isIgnored itself is wrong")
	}

	dir, err := filepath.Abs(filepath.Join(root, p.dir))
	if err != nil {
		t.Fatal(err)
	}
	list := exec.Command("go", "list", "-deps", "-f",
		`{{if not .Standard}}{{$dir := .Dir}}{{range .GoFiles}}{{$dir}}/{{.}}{{"\n"}}{{end}}{{range .EmbedFiles}}{{$dir}}/{{.}}{{"\n"}}{{end}}{{end}}`,
		"./cmd/"+p.program)
	list.Dir = dir
	list.Env = append(list.Environ(), "CGO_ENABLED=0", "GOOS=linux", "GOWORK=off")
	out, err := list.Output()
	if err != nil {
		t.Fatal(err)
	}
	files := []string{"go.mod", "go.sum"}
	for file := range strings.Lines(string(out)) {
		if rel, err := filepath.Rel(dir, strings.TrimSpace(file)); err == nil && filepath.IsLocal(rel) {
			files = append(files, filepath.ToSlash(rel))
		}
	}
	if !slices.Contains(files, "cmd/"+p.program+"/main.go") || p.dir == "." && !slices.Contains(files, "monitor/monitor.go") {
		t.Fatalf("go list does not name what the program is made of: %q", files)
	}
	for _, stage := range stages(p.read(t, "Dockerfile")) {
		for _, i := range stage {
			if words := strings.Fields(i.args); i.name == "COPY" && !strings.HasPrefix(i.args, "--from=") {
				files = append(files, words[:len(words)-1]...)
			}
		}
	}
	for _, file := range files {
		if isIgnored(t, ignored, file) {
			t.Errorf("%s is left out, but built", file)
		}
		if _, err := os.Stat(filepath.Join(dir, file)); err != nil {
			t.Error(err)
		}
	}
}

// isIgnored knows of .dockerignore's patterns those that ours has: a path that
// may have wildcards, from the root, or after **/ from anywhere.
func isIgnored(t testing.TB, patterns []string, file string) bool {
	t.Helper()
	for _, pattern := range patterns {
		anywhere, isAnywhere := strings.CutPrefix(pattern, "**/")
		if strings.HasPrefix(pattern, "!") || strings.Contains(anywhere, "**") {
			t.Fatalf("pattern %s: change this test with it", pattern)
		}
		for part := file; part != "."; part = path.Dir(part) {
			name, pattern := part, pattern
			if isAnywhere {
				name, pattern = path.Base(part), anywhere
			}
			matched, err := path.Match(pattern, name)
			if err != nil {
				t.Fatalf("pattern %s: %v", pattern, err)
			}
			if matched {
				return true
			}
		}
	}
	return false
}
