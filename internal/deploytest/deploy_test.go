package deploytest

import (
	"encoding/json"
	"net"
	"net/http"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/carpool-go/carpool/internal/servers"
	"github.com/carpool-go/carpool/internal/testservers"
)

// A deploy is done as Render does it, on servers of this machine: the commands are those of
// render.yaml and the image, with the variables that these give them, and what
// docs/render.md has one type afterwards. Only ports are others.
func TestBlueprint_ADeployRuns(t *testing.T) {
	t.Parallel()
	each(t, func(t *testing.T, p program) {
		path, err := builds[p.program]()
		if err != nil {
			t.Fatal(err)
		}
		b, err := parseBlueprint(p.read(t, "render.yaml"))
		if err != nil {
			t.Fatal(err)
		}
		redis, err := servers.StartRedis(t.Context(), servers.RedisConfig{AppendFsync: "everysec"}) // as a paid Key Value
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = redis.Stop() })
		databaseURL, image := testservers.Postgres(t), stages(p.read(t, "Dockerfile"))[1]
		for _, s := range b.Services {
			env := append(s.environment(databaseURL, redis.URL()), "PATH="+filepath.Dir(path))
			switch s.Type {
			case "worker":
				p.worksOnRender(t, path, image, s, env)
			case "web":
				p.isWatchedOnRender(t, path, s, env)
			}
		}
	})
}

func (p program) worksOnRender(t *testing.T, path string, image []instruction, s service, env []string) {
	t.Helper()
	health, err := freeAddress()
	if err != nil {
		t.Fatal(err)
	}
	name, _, _ := strings.Cut(the(image, "ENV"), "=")
	env = append(env, name+"="+health)
	shell(t, env, s.PreDeployCommand)
	worker := start(t, env, path, words(t, the(image, "CMD"))[1:]...)
	_, check, _ := strings.Cut(the(image, "HEALTHCHECK"), " CMD ")
	ask := strings.Join(words(t, check), " ")
	testservers.Eventually(t, ask+" finds it ready", func() bool {
		out, err := run(".", env, "/bin/sh", "-c", ask)
		return err == nil && out == "ready\n"
	})

	// The page's program is the worker of this repository.
	section, _, _ := strings.Cut(read(t, "docs/render.md"), "\n## Plans")
	typed := regexp.MustCompile("`worker (enqueue [^`]*|doctor[^`]*)`").FindAllStringSubmatch(section, -1)
	for i, want := range []string{`{"checked":`, "postgres tables"} {
		if len(typed) != 2 {
			t.Fatalf("the page has %q", typed)
		}
		if out := shell(t, env, p.program+" "+typed[i][1]); !strings.Contains(out, want) {
			t.Errorf("%s prints %q, want %s", typed[i][1], out, want)
		}
	}
	worker.stops(t, time.Duration(s.MaxShutdownDelaySeconds)*time.Second)
}

func (p program) isWatchedOnRender(t *testing.T, path string, s service, env []string) {
	t.Helper()
	address, err := freeAddress()
	if err != nil {
		t.Fatal(err)
	}
	_, port, err := net.SplitHostPort(address)
	if err != nil {
		t.Fatal(err)
	}
	at := slices.IndexFunc(env, func(v string) bool { return strings.HasPrefix(v, "PORT=") })
	if at < 0 {
		t.Fatal("the monitor's service has no PORT")
	}
	rendersPort := strings.TrimPrefix(env[at], "PORT=")
	for i, v := range env {
		if name, value, _ := strings.Cut(v, "="); name == "PORT" || name == "MONITOR_ADDR" {
			env[i] = name + "=" + strings.ReplaceAll(value, rendersPort, port)
		}
	}
	monitor := start(t, env, path, strings.Fields(s.DockerCommand)[1:]...)
	answers := func(path, user, password string) int {
		req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://127.0.0.1:"+port+path, nil)
		if err != nil {
			t.Fatal(err)
		}
		if user != "" {
			req.SetBasicAuth(user, password)
		}
		client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
		resp, err := client.Do(req)
		if err != nil {
			return 0
		}
		resp.Body.Close()
		return resp.StatusCode
	}
	testservers.Eventually(t, "Render finds the monitor healthy", func() bool { return answers(s.HealthCheckPath, "", "") == http.StatusOK })
	if status := answers("/", "", ""); status != http.StatusUnauthorized {
		t.Errorf("the monitor answers %d without a login", status)
	}
	if status := answers("/api/queues", "carpool", generated); status != http.StatusOK {
		t.Errorf("the monitor answers %d to the login that the page names", status)
	}
	monitor.stops(t, 30*time.Second) // Render's own delay
}

// stops sends SIGTERM, and fails the test unless the program ends well within a time.
func (r *running) stops(t *testing.T, within time.Duration) {
	t.Helper()
	if err := r.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	select {
	case <-r.ended:
		if code := r.cmd.ProcessState.ExitCode(); code != 0 {
			t.Errorf("%q ends with %d", r.cmd.Args, code)
		}
	case <-time.After(within):
		t.Errorf("%q does not end within %s", r.cmd.Args, within)
	}
}

// shell runs a command line as the image's shell would, and returns what it prints.
func shell(t *testing.T, env []string, line string) string {
	t.Helper()
	out, err := run(".", env, "/bin/sh", "-c", line)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// words are those of an instruction that has them as JSON.
func words(t *testing.T, args string) (list []string) {
	t.Helper()
	if err := json.Unmarshal([]byte(args), &list); err != nil {
		t.Fatalf("%s: %v", args, err)
	}
	return list
}
