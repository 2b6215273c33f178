package asynqwire

import (
	"encoding/json"
	"go/ast"
	"go/parser"
	"go/token"
	"go/types"
	"maps"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestServerScripts_AreAllThatAServerOfAsynqsRuns(t *testing.T) {
	t.Parallel()
	a := readAsynq(t)
	want := make(map[string]ServerScript)
	for _, name := range a.scriptsOf(t, serverFiles...) {
		want[ScriptHash(a.scripts[name])] = ServerScript(name)
	}
	if diff := cmp.Diff(want, serverScripts); diff != "" {
		t.Errorf("the table has other scripts than asynq's servers (-asynq +table):\n%s", diff)
	}
	for hash, name := range want {
		if got, ok := ServerScriptOf(hash); !ok || got != name {
			t.Errorf("the script %s is %q, %v; want %q", hash, got, ok, name)
		}
	}
}

func TestServerScriptOf_KnowsNoneThatOthersThanServersRun(t *testing.T) {
	t.Parallel()
	a := readAsynq(t)
	others := a.scriptsOf(t, "client.go", "inspector.go", "scheduler.go", "aggregator.go")
	for _, name := range []string{"enqueueCmd", "enqueueUniqueCmd", "runTaskCmd", "deleteTaskCmd", "writeSchedulerEntriesCmd", "aggregationCheckCmd"} {
		if !slices.Contains(others, name) {
			t.Errorf("%s is not among the scripts of others, %v: the test doesn't find all", name, others)
		}
	}
	servers := a.scriptsOf(t, serverFiles...)
	for name, text := range a.scripts {
		if slices.Contains(servers, name) {
			continue
		}
		if got, ok := ServerScriptOf(ScriptHash(text)); ok {
			t.Errorf("%s is taken for a server's %s", name, got)
		}
	}
	for _, text := range []string{"", "return 1", a.scripts["dequeueCmd"] + "\n"} {
		if got, ok := ServerScriptOf(ScriptHash(text)); ok {
			t.Errorf("%.20q is taken for a server's %s", text, got)
		}
	}
	for _, name := range others {
		if name != string(ScriptListLeaseExpired) && slices.Contains(servers, name) { // which the inspector only reads with
			t.Errorf("%s is a server's and another's", name)
		}
	}
}

// What a server asks without a script is answered by a client's own methods, or may go to
// Redis as it is: it moves no job.
func TestServers_RunNoOtherPlainCommandsThanTheClientOfTheDeliveryExpects(t *testing.T) {
	t.Parallel()
	a := readAsynq(t)
	want := []string{
		"Close",     // not of a client that it was given
		"HSet",      // writes a result
		"Ping",      // the health check
		"Subscribe", // to who is to be cancelled
		"ZAdd",      // lists a server
		"ZAddXX",    // extends leases
		"ZRem",      // a server that ends
	}
	if diff := cmp.Diff(want, a.commandsOf(t, append([]string{"asynq.go"}, serverFiles...)...)); diff != "" {
		t.Errorf("asynq's servers run other commands (-want +got):\n%s", diff)
	}
}

func TestTestedAsynq_HasTheVersionOfThisModule(t *testing.T) {
	t.Parallel()
	if version := asynqModule(t).Version; !slices.Contains(TestedAsynq, version) {
		t.Errorf("asynq is %s, and its scripts are known of %s", version, strings.Join(TestedAsynq, ", "))
	}
}

// serverFiles are the files of asynq's that have what a server does, without a
// GroupAggregator.
var serverFiles = []string{
	"server.go", "processor.go", "heartbeat.go", "forwarder.go", "recoverer.go",
	"janitor.go", "syncer.go", "subscriber.go", "healthcheck.go",
}

type module struct {
	Version, Dir string
	Replace      *module
}

func asynqModule(t *testing.T) module {
	t.Helper()
	out, err := exec.Command("go", "list", "-m", "-json", "github.com/hibiken/asynq").Output()
	if err != nil {
		t.Fatalf("go list: %v", err)
	}
	var m module
	if err := json.Unmarshal(out, &m); err != nil {
		t.Fatal(err)
	}
	if m.Replace != nil {
		return *m.Replace
	}
	return m
}

// asynqSource is what asynq's source says of its use of Redis.
type asynqSource struct {
	dir     string
	scripts map[string]string // their texts, by the names of their variables
	// of the methods of its internal/rdb, by their names: the identifiers that one uses, the
	// methods that it calls itself, and those that it calls on the Redis client
	uses, calls, commands map[string][]string
}

func readAsynq(t *testing.T) asynqSource {
	t.Helper()
	a := asynqSource{
		asynqModule(t).Dir, make(map[string]string),
		make(map[string][]string), make(map[string][]string), make(map[string][]string),
	}
	for _, file := range []string{"rdb.go", "inspect.go"} {
		for _, decl := range parse(t, filepath.Join(a.dir, "internal", "rdb", file)).Decls {
			switch d := decl.(type) {
			case *ast.GenDecl:
				a.addScripts(t, d)
			case *ast.FuncDecl:
				a.uses[d.Name.Name] = append(a.uses[d.Name.Name], identifiers(d)...)
				a.calls[d.Name.Name] = append(a.calls[d.Name.Name], calledOn(d, "=r")...)
				a.commands[d.Name.Name] = append(a.commands[d.Name.Name], calledOn(d, "=r.client")...)
			}
		}
	}
	if len(a.scripts) < 40 {
		t.Fatalf("there are only %d scripts in %s", len(a.scripts), a.dir)
	}
	return a
}

func parse(t *testing.T, path string) *ast.File {
	t.Helper()
	file, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.SkipObjectResolution)
	if err != nil {
		t.Fatal(err)
	}
	return file
}

// addScripts adds the variables of a declaration that are redis.NewScript of a text.
func (a asynqSource) addScripts(t *testing.T, d *ast.GenDecl) {
	t.Helper()
	for _, spec := range d.Specs {
		v, ok := spec.(*ast.ValueSpec)
		if !ok {
			continue
		}
		for i, value := range v.Values {
			call, ok := value.(*ast.CallExpr)
			if !ok {
				continue
			}
			if f, ok := call.Fun.(*ast.SelectorExpr); !ok || f.Sel.Name != "NewScript" {
				continue
			}
			text, ok := call.Args[0].(*ast.BasicLit)
			if !ok {
				t.Fatalf("the script %s is no literal", v.Names[i].Name)
			}
			script, err := strconv.Unquote(text.Value)
			if err != nil {
				t.Fatal(err)
			}
			a.scripts[v.Names[i].Name] = script
		}
	}
}

func identifiers(in ast.Node) (names []string) {
	ast.Inspect(in, func(n ast.Node) bool {
		if id, ok := n.(*ast.Ident); ok {
			names = append(names, id.Name)
		}
		return true
	})
	return names
}

// calledOn are the methods that are called, or taken, of an expression that ends so.
func calledOn(in ast.Node, suffixes ...string) (names []string) {
	ast.Inspect(in, func(n ast.Node) bool {
		if s, ok := n.(*ast.SelectorExpr); ok {
			of := "=" + types.ExprString(s.X)
			if slices.ContainsFunc(suffixes, func(suffix string) bool { return strings.HasSuffix(of, suffix) }) {
				names = append(names, s.Sel.Name)
			}
		}
		return true
	})
	return names
}

// methodsOf are the methods of asynq's internal/rdb that some of its files call, and those
// that these call.
func (a asynqSource) methodsOf(t *testing.T, files ...string) map[string]bool {
	t.Helper()
	found := make(map[string]bool)
	var follow func(method string)
	follow = func(method string) {
		if found[method] {
			return
		}
		found[method] = true
		for _, name := range a.calls[method] {
			if a.uses[name] != nil {
				follow(name)
			}
		}
	}
	for _, file := range files {
		for _, method := range calledOn(parse(t, filepath.Join(a.dir, file)), ".broker", ".rdb") {
			if a.uses[method] == nil {
				t.Fatalf("%s calls %s, which is no method of internal/rdb", file, method)
			}
			follow(method)
		}
	}
	return found
}

// scriptsOf are the scripts that some of its files run, sorted.
func (a asynqSource) scriptsOf(t *testing.T, files ...string) []string {
	t.Helper()
	found := make(map[string]bool)
	for method := range a.methodsOf(t, files...) {
		for _, name := range a.uses[method] {
			if _, ok := a.scripts[name]; ok {
				found[name] = true
			}
		}
	}
	return slices.Sorted(maps.Keys(found))
}

// commandsOf are the methods of the Redis client that some of its files call, sorted.
func (a asynqSource) commandsOf(t *testing.T, files ...string) []string {
	t.Helper()
	found := make(map[string]bool)
	for method := range a.methodsOf(t, files...) {
		for _, name := range a.commands[method] {
			found[name] = true
		}
	}
	return slices.Sorted(maps.Keys(found))
}
