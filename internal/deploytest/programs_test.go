package deploytest

import (
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
)

const root = "../.."

func read(t testing.TB, name string) string {
	t.Helper()
	data, err := os.ReadFile(filepath.Join(root, name))
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

// program is what the source of a binary says of its command line.
type program struct {
	// settings are the variables it knows, with their defaults.
	settings map[string]string
	commands []string
	source   string
}

// programs reads the source of worker and monitor.
func programs(t testing.TB) map[string]program {
	t.Helper()
	all := make(map[string]program)
	for _, name := range []string{"worker", "monitor"} {
		p := program{settings: make(map[string]string)}
		files, err := filepath.Glob(filepath.Join(root, name, "*.go"))
		if err != nil {
			t.Fatal(err)
		}
		for _, file := range files {
			if strings.HasSuffix(file, "_test.go") {
				continue
			}
			data, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			p.source += string(data)
			parsed, err := parser.ParseFile(token.NewFileSet(), file, data, 0)
			if err != nil {
				t.Fatal(err)
			}
			p.readTags(parsed)
		}
		if len(p.settings) == 0 {
			t.Fatalf("%s has no field with the tag env", name)
		}
		all[name] = p
	}
	if !slices.Contains(all["worker"].commands, "run") {
		t.Fatalf("the worker's commands are %q: no field has the tag cmd", all["worker"].commands)
	}
	return all
}

// readTags looks for kong's tags env, default and cmd.
func (p *program) readTags(file *ast.File) {
	ast.Inspect(file, func(n ast.Node) bool {
		field, ok := n.(*ast.Field)
		if !ok || field.Tag == nil {
			return true
		}
		text, err := strconv.Unquote(field.Tag.Value)
		if err != nil {
			return true
		}
		tag := reflect.StructTag(text)
		if name := tag.Get("env"); name != "" {
			p.settings[name] = tag.Get("default")
			if typ, ok := field.Type.(*ast.Ident); ok && typ.Name == "bool" && p.settings[name] == "" {
				p.settings[name] = "false"
			}
		}
		if _, ok := tag.Lookup("cmd"); ok {
			p.commands = append(p.commands, strings.ToLower(field.Names[0].Name))
		}
		return true
	})
}

// checkCommand returns what is wrong with the words of a command, which is to
// run in the image.
func checkCommand(all map[string]program, words []string) (fault string) {
	if len(words) == 0 {
		return "there is no command"
	}
	p, ok := all[words[0]]
	switch {
	case !ok:
		return fmt.Sprintf("%q is no program of the image", words[0])
	case len(p.commands) == 0 && len(words) == 1:
		return ""
	case len(p.commands) > 0 && len(words) == 2 && slices.Contains(p.commands, words[1]):
		return ""
	}
	return fmt.Sprintf("%q is no command; the commands of %s are %q", strings.Join(words, " "), words[0], p.commands)
}

// checkSettings returns what is wrong with the names of variables that the
// program is given.
func checkSettings(p program, names []string, required ...string) (faults []string) {
	for _, name := range names {
		if _, ok := p.settings[name]; !ok {
			faults = append(faults, fmt.Sprintf("%s is no setting", name))
		}
	}
	for _, name := range required {
		if !slices.Contains(names, name) {
			faults = append(faults, fmt.Sprintf("%s is not set", name))
		}
	}
	return faults
}

// stopsWithin is how long after SIGTERM the worker has ended at the latest, with
// the given WORKER_SHUTDOWN_TIMEOUT; "" means its default.
func stopsWithin(t testing.TB, worker program, timeout string) time.Duration {
	t.Helper()
	if timeout == "" {
		timeout = worker.settings["WORKER_SHUTDOWN_TIMEOUT"]
	}
	total, err := time.ParseDuration(timeout)
	if err != nil {
		t.Fatalf("WORKER_SHUTDOWN_TIMEOUT: %v", err)
	}
	for _, name := range []string{"endingGrace", "stopGrace"} {
		found := regexp.MustCompile(`\b` + name + `\s*=\s*(\d+) \* time\.Second`).FindStringSubmatch(worker.source)
		if found == nil {
			t.Fatalf("the worker has no constant %s, in seconds, any more: what does its end take now?", name)
		}
		seconds, _ := strconv.Atoi(found[1])
		total += time.Duration(seconds) * time.Second
	}
	return total
}

// buildDir is where buildWorker builds; TestMain removes it.
var buildDir string

var buildWorker = sync.OnceValues(func() (path string, err error) {
	path = filepath.Join(buildDir, "worker")
	if runtime.GOOS == "windows" {
		path += ".exe"
	}
	cmd := exec.Command("go", "build", "-o", path, "./worker")
	cmd.Dir = root
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build the worker: %w\n%s", err, out)
	}
	return path, nil
})

func TestMain(m *testing.M) {
	var err error
	if buildDir, err = os.MkdirTemp("", "carpool-deploytest-"); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	code := m.Run()
	_ = os.RemoveAll(buildDir)
	os.Exit(code)
}

// acceptedByTheWorker has the worker itself check settings, as NAME=value.
func acceptedByTheWorker(t *testing.T, settings []string) {
	t.Helper()
	path, err := buildWorker()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(path, "config")
	cmd.Env = settings
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("the worker does not accept %q: %v\n%s", settings, err, out)
	}
}
