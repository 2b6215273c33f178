package deploytest

import (
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"maps"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/carpool-go/carpool/internal/servers"
	"github.com/carpool-go/carpool/internal/testservers"
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

// repository is one whose program is deployed.
type repository struct {
	dir     string   // from the root of carpool's
	program string   // the name of its program, which is that of its folder in cmd
	groups  []string // the folders of the packages whose struct Tasks is a group of the program
}

// carpool is this repository, and own the example of a user's.
var (
	carpool = repository{dir: ".", program: "worker", groups: []string{"tasks/builtin"}}
	own     = repository{dir: "examples/own", program: "shop", groups: []string{"tasks/builtin", "examples/own"}}
)

// each runs a test for each repository.
func each(t *testing.T, test func(*testing.T, program)) {
	t.Helper()
	for _, r := range []repository{carpool, own} {
		t.Run(r.dir, func(t *testing.T) {
			t.Parallel()
			test(t, programOf(t, r))
		})
	}
}

// program is what the source of a program says of its command line.
type program struct {
	repository
	// commands are the settings of each command, by its name.
	commands map[string]settings
	// variables are the string variables of worker/cli without a value, which a
	// build may set.
	variables []string
}

// settings are the variables that a command knows, with their defaults.
type settings map[string]string

// theWorker is the program of this repository.
func theWorker(t testing.TB) program {
	t.Helper()
	return programOf(t, carpool)
}

// programOf reads the source of a program: its commands, and the settings of its groups
// of tasks, which are those of kong.Plugins.
func programOf(t testing.TB, r repository) program {
	t.Helper()
	p := program{repository: r, commands: make(map[string]settings)}
	cli := parse(t, "worker/cli")
	commands := cli.structs["commands"]
	if commands == nil {
		t.Fatal("worker/cli has no struct commands any more: where are its commands?")
	}
	for _, field := range commands.Fields.List {
		if _, ok := tagOf(field).Lookup("cmd"); !ok {
			continue
		}
		known := make(settings)
		cli.addSettings(known, field.Type, func() {
			for _, group := range r.groups {
				parse(t, group).addSettings(known, ast.NewIdent("Tasks"), nil)
			}
		})
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

// read returns a file of the program's repository.
func (p program) read(t testing.TB, name string) string {
	t.Helper()
	return read(t, filepath.Join(p.dir, name))
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
// and of its subcommands; a setting that is hidden has no effect any more. It calls plugins where the struct has a field of kong.Plugins.
func (s source) addSettings(to settings, of ast.Expr, plugins func()) {
	name, ok := of.(*ast.Ident)
	if !ok || s.structs[name.Name] == nil {
		return
	}
	for _, field := range s.structs[name.Name].Fields.List {
		tag := tagOf(field)
		if _, isHidden := tag.Lookup("hidden"); isHidden {
			continue // it has no effect any more, and is taken all the same
		}
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
	case words[0] != p.program:
		return fmt.Sprintf("%q is no program of the image", words[0])
	case len(words) == 2 && p.commands[words[1]] != nil:
		return ""
	}
	return fmt.Sprintf("%q is no command; the commands of %s are %q", strings.Join(words, " "), words[0], slices.Sorted(maps.Keys(p.commands)))
}

// checkHealthcheck returns what is wrong with the words of a health check, which is to run
// in the image beside a command. at is HEALTH_ADDR there.
func checkHealthcheck(p program, words []string, command, at string) (fault string) {
	want := p.program + " health"
	if command == p.program+" monitor" {
		want += " --monitor"
	}
	if got := strings.Join(words, " "); got != want || p.commands["health"] == nil {
		return fmt.Sprintf("the health check of %q is %q, not %q", command, got, want)
	}
	if host, _, err := net.SplitHostPort(at); command == p.program+" run" && (err != nil || host != "127.0.0.1") {
		return fmt.Sprintf("HEALTH_ADDR is %q, but the health check asks there, and nobody else is to", at)
	}
	return ""
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

// buildDir is where programs are built; TestMain removes it.
var buildDir string

func TestMain(m *testing.M) {
	var err error
	if buildDir, err = os.MkdirTemp("", "carpool-deploytest-"); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	testservers.Main(m, func() { _ = os.RemoveAll(buildDir) })
}

// builtVersion is the version of the programs that are built here.
const builtVersion = "v1.2.3"

var builds = map[string]func() (string, error){
	carpool.program: sync.OnceValues(func() (string, error) { return carpool.build(filepath.Join(root, carpool.dir), buildDir) }),
	own.program: sync.OnceValues(func() (string, error) {
		dir, err := own.vendored(buildDir)
		if err != nil {
			return "", err
		}
		return own.build(dir, buildDir)
	}),
}

// build runs the command with which the Dockerfile builds the program, in dir, and returns
// the program's path below another folder. env are further variables.
func (r repository) build(dir, to string, env ...string) (path string, err error) {
	dockerfile, err := os.ReadFile(filepath.Join(dir, "Dockerfile"))
	if err != nil {
		return "", err
	}
	command := the(stages(string(dockerfile))[0], "RUN")
	out := filepath.Join(to, r.program)
	_, err = run(dir, append(env, "VERSION="+builtVersion), "sh", "-euc", strings.ReplaceAll(command, " /out/ ", " '"+out+"/' "))
	return filepath.Join(out, r.program), err
}

// vendored makes a copy of a user's repository in a folder as the image's build sees it:
// with vendor, and without a clone of carpool that go.mod's replace would lead to.
func (r repository) vendored(in string) (dir string, err error) {
	clone, err := filepath.Abs(root)
	if err != nil {
		return "", err
	}
	dir, link := filepath.Join(in, r.program+"-repository"), filepath.Join(in, "carpool")
	if err := os.CopyFS(dir, os.DirFS(filepath.Join(root, r.dir))); err != nil {
		return "", err
	}
	if err := os.Symlink(clone, link); err != nil {
		return "", err
	}
	defer os.Remove(link)
	if _, err := run(dir, nil, "go", "mod", "edit", "-replace", "github.com/carpool-go/carpool=../carpool"); err != nil {
		return "", err
	}
	_, err = run(dir, nil, "go", "mod", "vendor")
	return dir, err
}

// run runs a command in dir and returns what it printed.
func run(dir string, env []string, command string, args ...string) (printed string, err error) {
	cmd := exec.Command(command, args...)
	cmd.Dir, cmd.Env = dir, append(append(os.Environ(), "GOWORK=off"), env...)
	out, err := cmd.CombinedOutput()
	if err != nil {
		err = fmt.Errorf("%s %s: %w\n%s", command, strings.Join(args, " "), err, out)
	}
	return string(out), err
}

func TestDockerfile_BuildsTheProgramWithItsVersion(t *testing.T) {
	t.Parallel()
	each(t, func(t *testing.T, p program) {
		path, err := builds[p.program]()
		if err != nil {
			t.Fatal(err)
		}
		if out, err := run(".", nil, path, "version"); err != nil || !strings.Contains(out, builtVersion) {
			t.Errorf("%s version prints %q, error %v", p.program, out, err)
		}
	})
}

// accepts has the program itself check settings, as NAME=value.
func (p program) accepts(t *testing.T, settings []string) {
	t.Helper()
	path, err := builds[p.program]()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(path, "config")
	cmd.Env = settings
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("%s does not accept %q: %v\n%s", p.program, settings, err, out)
	}
}

// startsMonitor has the program itself start the monitor with settings, as NAME=value, and
// answer its health check, on another port than theirs.
func (p program) startsMonitor(t *testing.T, settings []string) {
	t.Helper()
	path, err := builds[p.program]()
	if err != nil {
		t.Fatal(err)
	}
	address, err := freeAddress()
	if err != nil {
		t.Fatal(err)
	}
	monitor := start(t, settings, path, "monitor", "--addr", address)
	for giveUp := time.Now().Add(time.Minute); ; time.Sleep(50 * time.Millisecond) {
		out, err := run(".", []string{"MONITOR_ADDR=" + address}, path, "health", "--monitor")
		if err == nil && out == "ok\n" {
			return
		}
		select {
		case <-monitor.ended:
			t.Fatalf("%s does not accept %q:\n%s", p.program, settings, &monitor.said)
		default:
		}
		if time.Now().After(giveUp) {
			t.Fatalf("the monitor's health: %v", err)
		}
	}
}

// running is a program in the background.
type running struct {
	cmd   *exec.Cmd
	said  testservers.Log
	ended chan struct{}
}

// start starts a program, which ends with the test at the latest.
func start(t *testing.T, env []string, program string, args ...string) *running {
	t.Helper()
	r := &running{cmd: exec.Command(program, args...), ended: make(chan struct{})}
	r.cmd.Env, r.cmd.Stdout, r.cmd.Stderr = env, &r.said, &r.said
	if err := r.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		defer close(r.ended)
		_ = r.cmd.Wait()
	}()
	t.Cleanup(func() {
		_ = r.cmd.Process.Kill()
		<-r.ended
		if t.Failed() {
			t.Logf("%s %s said:\n%s", filepath.Base(program), strings.Join(args, " "), &r.said)
		}
	})
	return r
}

// freeAddress is one where nobody listens.
func freeAddress() (string, error) {
	port, err := servers.FreePort()
	return net.JoinHostPort("127.0.0.1", strconv.Itoa(port)), err
}
