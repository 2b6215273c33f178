package cli

import (
	"os/exec"
	"slices"
	"strings"
	"testing"

	"github.com/carpool-go/carpool/tasks/builtin"
	"github.com/carpool-go/carpool/worker/internal/workertest"
)

func TestCompletion_WordsAreWhatALineMayGoOnWith(t *testing.T) {
	t.Parallel()
	p := shop(nil, new(orders), new(builtin.Tasks))
	p.Commands = []any{new(shopCommands)}
	for line, want := range map[string]string{
		"shop en":                               "enqueue",
		"shop do":                               "doctor",
		"shop doctor --ki":                      "--kill-after",
		"shop st":                               "status stock",
		"shop stock ":                           "count",
		"shop schedule ru":                      "run-now",
		"shop completion ":                      "bash zsh fish",
		"shop enqueue shop:":                    "shop:order",
		"shop enqueue 'shop:or":                 "shop:order",
		"shop kinds w":                          "webhook:deliver",
		"shop schedule add n '9 9 * * *' shop:": "shop:order",
		"shop archive ls --kind shop":           "shop:order",
		"shop archive ls --kind=shop":           "--kind=shop:order",
		"shop enqueue --ti":                     "--timeout",
		"shop enqueue --queue low shop:":        "shop:order",
		"shop enqueue shop:order '{}' --wa":     "--wait",
		"shop schedule add --missed ":           "skip once all",
		"shop schedule add --missed=o":          "--missed=once",
		"shop --orders-l":                       "--orders-limit",
		"shop run --burst --orders-l":           "--orders-limit",
		"shop run -- --orders-l":                "",
		"shop reindex --f":                      "--full",
		"shop enqueue shop:order ":              "",
		"shop frobnicate ":                      "",
		"shop completion wo":                    "",
	} {
		stdout, stderr, code := p.run(t, "completion", "words", "--", line)
		if got := strings.Join(strings.Fields(stdout), " "); code != 0 || stderr != "" || got != want {
			t.Errorf("%s| exit code %d, %q, want %q\n%s", line, code, got, want, stderr)
		}
	}
	if stdout, _, _ := p.run(t, "completion", "words", "--describe", "--", "shop re"); stdout != "resume\tLet workers fetch jobs of a paused queue again.\nreindex\tMake the index anew.\n" {
		t.Errorf("with their help: %q", stdout)
	}
}

func TestCompletion_InBash(t *testing.T) {
	t.Parallel()
	bash, err := exec.LookPath("bash")
	if err != nil {
		t.Skip("there is no bash")
	}
	b := &bundle{new(workertest.Bundle)}
	program := b.Worker(t, nil).Path
	script, _, _ := b.run(t, nil, "completion", "bash")
	for line, want := range map[string][]string{
		"worker arch":                     {"archive"},
		"worker enqueue csv:i":            {"import"}, // bash replaces what follows the colon
		"worker enqueue ":                 {"carpool:prune", "csv:import", "pool:validate", "rows:prune", "webhook:deliver"},
		"worker schedule add --missed=on": {"once"},
		"worker status --js":              {"--json"},
		"worker enqueue pool:validate '{": {},
	} {
		cmd := exec.Command(bash, "--norc", "-c", script+`
COMP_LINE=$2 COMP_POINT=${#2}
_worker "$1"
printf '%s\n' "${COMPREPLY[@]}"
complete -p worker`, "bash", program, line)
		stdout, stderr, code := workertest.Run(t, cmd)
		got := strings.Split(strings.TrimSuffix(stdout, "\n"), "\n")
		registered := got[len(got)-1]
		got = slices.DeleteFunc(got[:len(got)-1], func(s string) bool { return s == "" })
		if code != 0 || stderr != "" || !slices.Equal(got, want) || !strings.Contains(registered, "-F _worker worker") {
			t.Errorf("%s| exit code %d, %q, want %q\n%s", line, code, got, want, stderr)
		}
	}
}

func TestCompletion_ScriptsAreTheProgramsOwn(t *testing.T) {
	t.Parallel()
	for _, shell := range []string{"bash", "zsh", "fish"} {
		p := shop(nil)
		p.Name = "my-shop"
		stdout, _, code := p.run(t, "completion", shell)
		if code != 0 || !strings.Contains(stdout, "my-shop") || strings.Contains(stdout, "PROGRAM") || strings.Contains(stdout, "FUNCTION") || strings.Contains(stdout, "_my-shop") {
			t.Errorf("%s: exit code %d\n%s", shell, code, stdout)
		}
	}
}
