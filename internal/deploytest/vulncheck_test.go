package deploytest

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

func TestVulncheck_FailsForWhatItFindsAndPassesWhereItCanNotLook(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		said string // by go run
		code string
		want string
		fail bool
	}{
		"nothing found":     {"No vulnerabilities found.", "0", "vulncheck: examples/own: no known vulnerability is called", false},
		"found":             {"Vulnerability #1: GO-2099-0001\nexit status 3", "1", "GO-2099-0001", true},
		"no database":       {"govulncheck: fetching vulnerabilities: Get \"https://vuln.go.dev/index/modules.json.gz\": dial tcp: no such host\nexit status 1", "1", "skipped: the database", false},
		"no tool":           {"go: golang.org/x/vuln/cmd/govulncheck@v1.9.0: module lookup disabled by GOPROXY=off", "1", "skipped: the tool", false},
		"no proxy":          {"go: golang.org/x/vuln/cmd/govulncheck@v1.9.0: Get \"http://127.0.0.1:1/\": dial tcp 127.0.0.1:1: connection refused", "1", "skipped: the tool", false},
		"too slow":          {"", "124", "skipped: it did not end", false},
		"does not compile":  {"govulncheck: loading packages: There are errors with the provided package patterns\nexit status 1", "1", "loading packages", true},
		"no such version":   {"go: golang.org/x/vuln/cmd/govulncheck@v1.9.0: invalid version: unknown revision", "1", "unknown revision", true},
		"anything else":     {"", "2", "vulncheck: .: failed", true},
		"fetching, in code": {"Vulnerability #1\n  calls govulncheck: fetching vulnerabilities: \nexit status 3", "1", "Vulnerability #1", true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			if err := os.WriteFile(filepath.Join(dir, "go"), []byte("#!/bin/sh\ncat <<'END' >&2\n"+c.said+"\nEND\nexit "+c.code+"\n"), 0o700); err != nil {
				t.Fatal(err)
			}
			script := exec.Command(filepath.Join(root, "scripts", "vulncheck.sh"))
			script.Env = append(os.Environ(), "PATH="+dir+string(os.PathListSeparator)+os.Getenv("PATH"))
			out, err := script.CombinedOutput()
			if (err != nil) != c.fail || !strings.Contains(string(out), c.want) {
				t.Errorf("error %v, want a failure: %t; it says\n%s\nwant %q in it", err, c.fail, out, c.want)
			}
		})
	}
}
