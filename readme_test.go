package carpool_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/carpool-go/carpool/internal/testservers"
	"github.com/carpool-go/carpool/tasks"
	"github.com/carpool-go/carpool/tasks/builtin"
	"github.com/carpool-go/carpool/worker/cli"
)

func TestMain(m *testing.M) { testservers.Main(m) }

// giveUp bounds what takes seconds when all is well, a first build of everything among it.
const giveUp = 10 * time.Minute

// block is a fenced block of README.md.
type block struct {
	language string
	text     string
	before   string // the paragraph before it
	after    string // the paragraph after it
	tested   bool
}

var fence = regexp.MustCompile("(?ms)^```(\\w*)\n(.*?)^```\n")

// blocksOf returns the fenced blocks of a text in their order.
func blocksOf(markdown string) (blocks []*block) {
	for _, at := range fence.FindAllStringSubmatchIndex(markdown, -1) {
		before := strings.Split(strings.TrimSpace(markdown[:at[0]]), "\n\n")
		after, _, _ := strings.Cut(strings.TrimSpace(markdown[at[1]:]), "\n\n")
		blocks = append(blocks, &block{
			language: markdown[at[2]:at[3]], text: markdown[at[4]:at[5]], before: before[len(before)-1], after: after,
		})
	}
	return blocks
}

// take returns the one block of a language that begins with start, which its caller tests.
func take(t *testing.T, blocks []*block, language, start string) *block {
	t.Helper()
	var found []*block
	for _, b := range blocks {
		if b.language == language && strings.HasPrefix(b.text, start) {
			found = append(found, b)
		}
	}
	if len(found) != 1 {
		t.Fatalf("README.md has %d blocks of %s that begin with %q, want 1; change this test with it", len(found), language, start)
	}
	found[0].tested = true
	return found[0]
}

// untested returns a line for each block that no test has taken.
func untested(blocks []*block) (faults []string) {
	for _, b := range blocks {
		if !b.tested {
			faults = append(faults, fmt.Sprintf("README.md has a block that nobody tests: %s\n%s", b.language, b.text))
		}
	}
	return faults
}

func readme(t *testing.T) string {
	t.Helper()
	text, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

func TestReadme_EachBlockHoldsAsItStands(t *testing.T) {
	t.Parallel()
	blocks := blocksOf(readme(t))
	var (
		tour   = take(t, blocks, "sh", "go run ./dev\n")
		module = take(t, blocks, "sh", "go mod init ")
		main   = take(t, blocks, "go", "package main\n\nimport \"github.com/carpool-go/carpool/worker/cli\"\n")
		task   = take(t, blocks, "go", "package main\n\nimport (\n\t\"context\"\n\t\"errors\"\n")
		start  = take(t, blocks, "sh", "go mod tidy\n")
		shell  = take(t, blocks, "sh", "./shop enqueue ")
		sql    = take(t, blocks, "sql", "")
		inGo   = take(t, blocks, "go", "package main\n\nimport (\n\t\"context\"\n\t\"time\"\n")
		words  = take(t, blocks, "sh", "worker ")
		record = take(t, blocks, "json", "")
		script = take(t, blocks, "sh", "./scripts/")
	)
	for _, fault := range untested(blocks) {
		t.Error(fault)
	}

	t.Run("the tour and its flags", func(t *testing.T) {
		t.Parallel()
		// The tour itself is run by its own tests.
		if tour.text != "go run ./dev\n" {
			t.Errorf("the command is %q", tour.text)
		}
		out, err := exec.CommandContext(t.Context(), "go", "run", "./dev", "-help").CombinedOutput()
		if err != nil {
			t.Fatalf("go run ./dev -help: %v\n%s", err, out)
		}
		flags := regexp.MustCompile("`-([a-z]+)").FindAllStringSubmatch(tour.after, -1)
		if len(flags) < 3 {
			t.Errorf("the paragraph after it names %d flags, want 3 at least:\n%s", len(flags), tour.after)
		}
		for _, flag := range flags {
			if !regexp.MustCompile(`(?m)^  -` + flag[1] + `\b`).Match(out) {
				t.Errorf("-%s is no flag of dev, which has\n%s", flag[1], out)
			}
		}
	})

	t.Run("a program of one's own", func(t *testing.T) {
		t.Parallel()
		shop := newShop(t)
		shop.bash(t, module.text)
		shop.write(t, main)
		shop.write(t, task)
		const run = "./shop run\n"
		build, ends := strings.CutSuffix(start.text, run)
		if !ends {
			t.Fatalf("the program is not started by the last line of\n%s", start.text)
		}
		shop.bash(t, build)
		log := shop.start(t, run)

		if out := shop.bash(t, shell.text); !strings.HasSuffix(out, "\n\"Hello, Ada!\"\n") {
			t.Errorf("%sprints %q, want an id and the greeting", shell.text, out)
		}
		file := filepath.Join(shop.folder, "enqueue.sql")
		if err := os.WriteFile(file, []byte(sql.text), 0o600); err != nil {
			t.Fatal(err)
		}
		shop.bash(t, `psql "$DATABASE_URL" -v ON_ERROR_STOP=1 -f enqueue.sql`)

		shop.write(t, inGo)
		shop.bash(t, "go vet ./...")

		shop.awaitGreetings(t, "Hello, Ada!", "Hello, Grace!")
		checkRecord(t, record.text, log())
	})

	t.Run("the commands", func(t *testing.T) {
		t.Parallel()
		for line := range strings.Lines(words.text) {
			checkCommand(t, line)
		}
	})

	t.Run("the test command", func(t *testing.T) {
		t.Parallel()
		name := strings.TrimSpace(script.text)
		if info, err := os.Stat(name); err != nil || info.Mode()&0o111 != 0o111 {
			t.Fatalf("%s can't be run: %v", name, err)
		}
		for file, calls := range map[string]string{"Makefile": `(?m)^test:.*\n\t` + regexp.QuoteMeta(name) + `$`, ".ci/run": `(?m)^(make test|` + regexp.QuoteMeta(name) + `)$`} {
			text, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			if !regexp.MustCompile(calls).Match(text) {
				t.Errorf("%s doesn't test with %s:\n%s", file, name, text)
			}
		}
	})
}

func TestReadme_ABlockThatNobodyTestsIsNamed(t *testing.T) {
	t.Parallel()
	blocks := blocksOf("Try\nit:\n\n```sh\ngo run ./dev\n```\n\nIt stays.\n\nThe task, `a.go`:\n\n```go\npackage a\n```\n")
	take(t, blocks, "sh", "go run")
	want := []string{"README.md has a block that nobody tests: go\npackage a\n"}
	if got := untested(blocks); !slices.Equal(got, want) {
		t.Errorf("faults %q, want %q", got, want)
	}
	if blocks[0].before != "Try\nit:" || blocks[0].after != "It stays." || blocks[1].before != "The task, `a.go`:" {
		t.Errorf("the paragraphs around the blocks are wrong: %+v, %+v", *blocks[0], *blocks[1])
	}
}

func TestReadme_ItsLinksLeadSomewhere(t *testing.T) {
	t.Parallel()
	for _, link := range regexp.MustCompile(`\]\(([^)]+)\)`).FindAllStringSubmatch(readme(t), -1) {
		if strings.HasPrefix(link[1], "https://") {
			continue
		}
		if _, err := os.Stat(link[1]); err != nil {
			t.Error(err)
		}
	}
}

// shop is the reader's folder: an empty one beside the clone, with servers of its own.
type shop struct {
	folder      string
	databaseURL string
	env         []string
}

func newShop(t *testing.T) *shop {
	t.Helper()
	repository, err := filepath.Abs(".")
	if err != nil {
		t.Fatal(err)
	}
	beside := t.TempDir()
	if err := os.Symlink(repository, filepath.Join(beside, "carpool")); err != nil {
		t.Fatal(err)
	}
	s := &shop{folder: filepath.Join(beside, "shop"), databaseURL: testservers.Postgres(t)}
	if err := os.Mkdir(s.folder, 0o700); err != nil {
		t.Fatal(err)
	}
	s.env = append(os.Environ(),
		"DATABASE_URL="+s.databaseURL, "REDIS_URL="+testservers.Redis(t), "LOG_LEVEL=debug", "SHOP_GREETING=", "PSQLRC="+os.DevNull,
		// So that what is compiled is found again by the next run, whose folder is another.
		"GOWORK=off", "CGO_ENABLED=0", "GOFLAGS="+strings.TrimSpace(os.Getenv("GOFLAGS")+" -trimpath"))
	return s
}

// write writes a block of Go into the file that the paragraph before it names.
func (s *shop) write(t *testing.T, b *block) {
	t.Helper()
	name := regexp.MustCompile("`(\\w+\\.go)`[^`]*$").FindStringSubmatch(b.before)
	if name == nil {
		t.Fatalf("this paragraph doesn't name the file of the block that follows:\n%s", b.before)
	}
	if err := os.WriteFile(filepath.Join(s.folder, name[1]), []byte(b.text), 0o600); err != nil {
		t.Fatal(err)
	}
}

// bash runs commands to their end and returns what they print to standard output.
func (s *shop) bash(t *testing.T, commands string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), giveUp)
	defer cancel()
	cmd := exec.CommandContext(ctx, "bash", "-euo", "pipefail", "-c", commands)
	cmd.Dir, cmd.Env = s.folder, s.env
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	cmd.WaitDelay = 10 * time.Second
	if err := cmd.Run(); err != nil {
		t.Fatalf("%s%v\n%s%s\n(psql missing? Debian has it in postgresql-client; Homebrew in libpq)", commands, errors.Join(err, ctx.Err()), out.String(), errs.String())
	}
	return out.String()
}

// start starts a command that goes on beside the test. The function that it returns sends
// it SIGTERM, and returns all that it has printed; the command must then end with 0.
func (s *shop) start(t *testing.T, command string) (stop func() (printed string)) {
	t.Helper()
	cmd := exec.Command("bash", "-c", "exec "+command)
	cmd.Dir, cmd.Env = s.folder, s.env
	var printed bytes.Buffer
	cmd.Stdout, cmd.Stderr = &printed, &printed
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	stopped := false
	t.Cleanup(func() {
		if !stopped {
			_ = cmd.Process.Kill()
			_ = cmd.Wait()
		}
		if t.Failed() {
			t.Logf("%sprinted\n%s", command, printed.String())
		}
	})
	return func() string {
		t.Helper()
		if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
			t.Fatal(err)
		}
		err := cmd.Wait()
		stopped = true
		if err != nil {
			t.Errorf("after SIGTERM it ends with %v, want 0", err)
		}
		return printed.String()
	}
}

// awaitGreetings waits until each guest has been greeted, once.
func (s *shop) awaitGreetings(t *testing.T, want ...string) {
	t.Helper()
	db, err := pgx.Connect(t.Context(), s.databaseURL)
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close(context.Background())
	var got []string
	for deadline := time.Now().Add(giveUp); len(got) < len(want); time.Sleep(20 * time.Millisecond) {
		rows, err := db.Query(t.Context(), "SELECT text FROM greetings ORDER BY text")
		if err != nil {
			t.Fatal(err)
		}
		if got, err = pgx.CollectRows(rows, pgx.RowTo[string]); err != nil {
			t.Fatal(err)
		}
		if time.Now().After(deadline) {
			break
		}
	}
	if !slices.Equal(got, want) {
		t.Errorf("the table has the greetings %q, want %q", got, want)
	}
}

// checkRecord compares the keys of the record that the README shows with those of each job's in a log.
func checkRecord(t *testing.T, shown, log string) {
	t.Helper()
	want, ok := keysOf(shown)
	if !ok {
		t.Fatalf("this is no JSON:\n%s", shown)
	}
	records := 0
	for line := range strings.Lines(log) {
		if !strings.Contains(line, `"msg":"job"`) || !strings.Contains(line, `"kind":"guest:greet"`) {
			continue
		}
		records++
		if got, _ := keysOf(line); !slices.Equal(got, want) {
			t.Errorf("the keys of a job's record are %q, those that the README shows %q:\n%s", got, want, line)
		}
	}
	if records != 2 {
		t.Errorf("the log has %d records of the two jobs", records)
	}
}

// keysOf returns the keys of a JSON object whose values may be objects: "level", "job.id".
func keysOf(object string) (keys []string, ok bool) {
	var fields map[string]any
	if err := json.Unmarshal([]byte(object), &fields); err != nil {
		return nil, false
	}
	for name, value := range fields {
		group, isGroup := value.(map[string]any)
		if !isGroup {
			keys = append(keys, name)
		}
		for key := range group {
			keys = append(keys, name+"."+key)
		}
	}
	slices.Sort(keys)
	return keys, true
}

// checkCommand checks that the commands which a line shows exist, and so do those and the
// flags that its comment lists after a semicolon: "worker archive ls  # …; show, retry".
func checkCommand(t *testing.T, line string) {
	t.Helper()
	command, comment, _ := strings.Cut(strings.TrimSpace(line), "#")
	words := strings.Fields(command)
	if len(words) < 2 || words[0] != "worker" {
		t.Errorf("%q is no command of the worker", command)
		return
	}
	help := func(args ...string) string {
		t.Helper()
		worker := cli.Program{
			Name: "worker", Groups: []tasks.Group{&builtin.Tasks{}},
			Env: func(string) string { return "" },
		}
		var out, errs bytes.Buffer
		if code := worker.Run(t.Context(), append(args, "--help"), strings.NewReader(""), &out, &errs); code != 0 {
			t.Errorf("worker %s is no command: %s", strings.Join(args, " "), errs.String())
		}
		return out.String()
	}
	of := help(words[1:]...)
	_, list, _ := strings.Cut(comment, ";")
	for item := range strings.SplitSeq(list, ",") {
		switch item = strings.TrimSpace(item); {
		case item == "" || item == "…" || strings.Contains(item, " "): // nothing, or prose
		case strings.HasPrefix(item, "--"):
			if !strings.Contains(of, "  "+item) {
				t.Errorf("%s has no flag %s", command, item)
			}
		default:
			help(words[1], item)
		}
	}
}

// A command beside a figure must measure something, also after a move.
func TestDocs_TheirBenchmarksExist(t *testing.T) {
	t.Parallel()
	pages, err := filepath.Glob("docs/*.md")
	if err != nil || len(pages) == 0 {
		t.Fatalf("there are no docs: %v", err)
	}
	commands := regexp.MustCompile("`(cd bench && )?go (test|run) ([^`]*)`")
	found := 0
	for _, page := range append(pages, "README.md") {
		text, err := os.ReadFile(page)
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range commands.FindAllStringSubmatch(string(text), -1) {
			found++
			dir, words := ".", strings.Fields(m[3])
			if m[1] != "" {
				dir = "bench"
			}
			pkg := "."
			for _, word := range words {
				if strings.HasPrefix(word, "./") {
					pkg = word
				}
			}
			if m[2] == "run" {
				if _, err := os.Stat(filepath.Join(dir, pkg, "main.go")); err != nil {
					t.Errorf("%s: %s: %v", page, m[0], err)
				}
				continue
			}
			at, kind := slices.Index(words, "-bench"), `func Benchmark\w*`
			if at < 0 {
				at, kind = slices.Index(words, "-run"), "func "
			}
			if at < 0 || at+1 == len(words) {
				t.Errorf("%s: %s measures nothing", page, m[0])
				continue
			}
			files, err := filepath.Glob(filepath.Join(dir, pkg, "*_test.go"))
			if err != nil {
				t.Fatal(err)
			}
			exists := regexp.MustCompile(kind + words[at+1])
			if !slices.ContainsFunc(files, func(file string) bool {
				code, err := os.ReadFile(file)
				return err == nil && exists.Match(code)
			}) {
				t.Errorf("%s: %s: there is no such benchmark or test", page, m[0])
			}
		}
	}
	if found < 4 {
		t.Errorf("only %d commands were found", found)
	}
}
