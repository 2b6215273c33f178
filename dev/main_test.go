//go:build unix

package main

import (
	"bufio"
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// asProgram makes this test program dev itself.
const asProgram = "CARPOOL_DEV_TEST_PROGRAM"

func TestMain(m *testing.M) {
	if os.Getenv(asProgram) != "" {
		main()
	}
	os.Exit(m.Run())
}

func TestDev_BecomesWhatItHasCompiled(t *testing.T) {
	t.Parallel()
	cmd, tmp := newDev(t, `
printf '#!/bin/sh\necho "pid $$, arguments $*"; rm -r "$CARPOOL_DEV_PROGRAMS"; exit 7\n' >"$3tour"
chmod +x "$3tour"`, "-once", "-data", "kept")
	var said bytes.Buffer
	cmd.Stdout, cmd.Stderr = &said, &said
	_ = cmd.Run()
	if code := cmd.ProcessState.ExitCode(); code != 7 || !strings.Contains(said.String(), "arguments -once -data kept\n") {
		t.Errorf("exit %d, %q; want the tour's, and its arguments", code, said.String())
	}
	wantEmpty(t, tmp)
}

func TestDev_AFaultOfTheCompilerIsShown(t *testing.T) {
	t.Parallel()
	cmd, tmp := newDev(t, "echo ./dev/tour: no such thing >&2; exit 1")
	said, _ := cmd.CombinedOutput()
	for _, want := range []string{"./dev/tour: no such thing", "dev: compile the tour and the worker: exit status 1"} {
		if !strings.Contains(string(said), want) {
			t.Errorf("it does not say %q: %s", want, said)
		}
	}
	if code := cmd.ProcessState.ExitCode(); code != 1 {
		t.Errorf("exit %d, want 1", code)
	}
	wantEmpty(t, tmp)
}

func TestDev_SaysWhyOneWaitsAndInterruptedLeavesNothing(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		args []string
		code int
	}{{nil, 0}, {[]string{"-once"}, 1}} {
		cmd, tmp := newDev(t, "exec sleep 600", test.args...)
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		said, err := bufio.NewReader(out).ReadString('\n')
		if err != nil || !strings.Contains(said, "the first time takes a minute or two") {
			t.Errorf("it says %q, %v", said, err)
		}
		if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
			t.Fatal(err)
		}
		_ = cmd.Wait()
		if got := cmd.ProcessState.ExitCode(); got != test.code {
			t.Errorf("%q: exit %d, want %d", test.args, got, test.code)
		}
		wantEmpty(t, tmp)
	}
}

// `go run` says nothing while it compiles this program, so that has to be quick, and nothing may have to be downloaded.
func TestDev_IsMadeOfLittle(t *testing.T) {
	t.Parallel()
	out, err := exec.CommandContext(t.Context(), "go", "list", "-deps", ".").Output()
	if err != nil {
		t.Fatal(err)
	}
	for imported := range strings.FieldsSeq(string(out)) {
		own := strings.HasPrefix(imported, "github.com/carpool-go/carpool/dev")
		first, _, _ := strings.Cut(imported, "/")
		if !own && strings.Contains(first, ".") || first == "net" || first == "crypto" {
			t.Errorf("it imports %s", imported)
		}
	}
}

// newDev is dev in a folder for temporary files of its own, with a compiler that is a script: its arguments are those of
// go build -o FOLDER/.
func newDev(t *testing.T, compiler string, args ...string) (cmd *exec.Cmd, tmp string) {
	t.Helper()
	bin, tmp := t.TempDir(), t.TempDir()
	module, err := filepath.Abs("../go.mod")
	if err != nil {
		t.Fatal(err)
	}
	script := "#!/bin/sh\nif [ $1 = env ]; then echo '" + module + "'; exit; fi\n" + compiler + "\n"
	if err := os.WriteFile(filepath.Join(bin, "go"), []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	cmd = exec.CommandContext(t.Context(), os.Args[0], args...)
	cmd.Env = append(os.Environ(), asProgram+"=1", "TMPDIR="+tmp, "PATH="+bin+":"+os.Getenv("PATH"))
	return cmd, tmp
}

func wantEmpty(t *testing.T, dir string) {
	t.Helper()
	left, err := os.ReadDir(dir)
	if err != nil || len(left) > 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
}
