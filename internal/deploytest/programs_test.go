package deploytest

import (
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/carpool-go/carpool/worker"
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

// program is what the source of the worker says of its command line.
type program struct {
	// commands are the settings of each command, by its name.
	commands map[string]settings
	// variables are the package's string variables without a value, which a
	// build may set.
	variables []string
}

// settings are the variables that a command knows, with their defaults.
type settings map[string]string

// theWorker reads the source of the worker: its commands, and the settings of the
// ready-made tasks, which are those of kong.Plugins.
func theWorker(t testing.TB) program {
	t.Helper()
	p := program{commands: make(map[string]settings)}
	cli, builtin := parse(t, "worker/cli"), parse(t, "tasks/builtin")
	commands := cli.structs["commands"]
	if commands == nil {
		t.Fatal("worker/cli has no struct commands any more: where are its commands?")
	}
	for _, field := range commands.Fields.List {
		if _, ok := tagOf(field).Lookup("cmd"); !ok {
			continue
		}
		known := make(settings)
		cli.addSettings(known, field.Type, func() { builtin.addSettings(known, ast.NewIdent("Tasks"), nil) })
		p.commands[strings.ToLower(field.Names[0].Name)] = known
	}
	for command, setting := range map[string]string{"run": "IMPORT_DIR", "migrate": "DATABASE_URL", "monitor": "MONITOR_ADDR"} {
		if _, ok := p.commands[command][setting]; !ok {
			t.Fatalf("the worker's commands are %q: %s has no setting %s", p.commands, command, setting)
		}
	}
	p.variables = cli.variables
	return p
}

// source is one package's: its structs by name, and its variables as [program] has them.
type source struct {
	structs   map[string]*ast.StructType
	variables []string
}

func parse(t testing.TB, dir string) source {
	t.Helper()
	s := source{structs: make(map[string]*ast.StructType)}
	files, err := filepath.Glob(filepath.Join(root, dir, "*.go"))
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range files {
		if strings.HasSuffix(file, "_test.go") {
			continue
		}
		parsed, err := parser.ParseFile(token.NewFileSet(), file, nil, 0)
		if err != nil {
			t.Fatal(err)
		}
		ast.Inspect(parsed, func(n ast.Node) bool {
			switch n := n.(type) {
			case *ast.FuncDecl:
				return false
			case *ast.TypeSpec:
				if of, ok := n.Type.(*ast.StructType); ok {
					s.structs[n.Name.Name] = of
				}
			case *ast.ValueSpec:
				if typ, ok := n.Type.(*ast.Ident); ok && typ.Name == "string" && n.Values == nil {
					s.variables = append(s.variables, n.Names[0].Name)
				}
			}
			return true
		})
	}
	return s
}

// addSettings looks for the tags env and default of a struct, of those embedded in it,
// and of its subcommands. It calls plugins where the struct has a field of kong.Plugins.
func (s source) addSettings(to settings, of ast.Expr, plugins func()) {
	name, ok := of.(*ast.Ident)
	if !ok || s.structs[name.Name] == nil {
		return
	}
	for _, field := range s.structs[name.Name].Fields.List {
		tag := tagOf(field)
		if name := tag.Get("env"); name != "" {
			to[name] = tag.Get("default")
			if typ, ok := field.Type.(*ast.Ident); ok && (typ.Name == "bool" || typ.Name == "onOff") && to[name] == "" {
				to[name] = "false"
			}
			continue
		}
		_, isCommand := tag.Lookup("cmd")
		_, isEmbedded := tag.Lookup("embed")
		if !isCommand && !isEmbedded && len(field.Names) > 0 {
			continue
		}
		if typ, ok := field.Type.(*ast.SelectorExpr); ok && typ.Sel.Name == "Plugins" && plugins != nil {
			plugins()
		}
		s.addSettings(to, field.Type, plugins)
	}
}

func tagOf(field *ast.Field) reflect.StructTag {
	if field.Tag == nil {
		return ""
	}
	text, err := strconv.Unquote(field.Tag.Value)
	if err != nil {
		return ""
	}
	return reflect.StructTag(text)
}

// checkCommand returns what is wrong with the words of a command, which is to
// run in the image.
func checkCommand(p program, words []string) (fault string) {
	switch {
	case len(words) == 0:
		return "there is no command"
	case words[0] != "worker":
		return fmt.Sprintf("%q is no program of the image", words[0])
	case len(words) == 2 && p.commands[words[1]] != nil:
		return ""
	}
	return fmt.Sprintf("%q is no command; the commands of %s are %q", strings.Join(words, " "), words[0], slices.Sorted(maps.Keys(p.commands)))
}

// checkSettings returns what is wrong with the names of variables that a
// command is given.
func checkSettings(known settings, names []string, required ...string) (faults []string) {
	for _, name := range names {
		if _, ok := known[name]; !ok {
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
func stopsWithin(t testing.TB, known settings, timeout string) time.Duration {
	t.Helper()
	if timeout == "" {
		timeout = known["WORKER_SHUTDOWN_TIMEOUT"]
	}
	d, err := time.ParseDuration(timeout)
	if err != nil {
		t.Fatalf("WORKER_SHUTDOWN_TIMEOUT: %v", err)
	}
	if d == 0 {
		d = -1 // none, in worker.Config
	}
	return worker.Config{ShutdownTimeout: d}.StopsWithin()
}

// buildDir is where buildWorker builds; TestMain removes it.
var buildDir string

var buildWorker = sync.OnceValues(func() (path string, err error) {
	path = filepath.Join(buildDir, "worker")
	if runtime.GOOS == "windows" {
		path += ".exe"
	}
	cmd := exec.Command("go", "build", "-o", path, "./cmd/worker")
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
