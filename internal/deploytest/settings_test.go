package deploytest

import (
	"maps"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// defaults are the settings of all commands.
func defaults(t testing.TB) settings {
	t.Helper()
	all := make(settings)
	for _, known := range theWorker(t).commands {
		maps.Copy(all, known)
	}
	return all
}

func TestEnvExample_HasEverySettingWithItsDefault(t *testing.T) {
	t.Parallel()
	want, set := defaults(t), []string(nil)
	found := make(map[string]bool)
	for _, m := range regexp.MustCompile(`(?m)^(# )?([A-Z][A-Z_]*)=(.*)$`).FindAllStringSubmatch(read(t, ".env.example"), -1) {
		commented, name, value := m[1] != "", m[2], m[3]
		byDefault, known := want[name]
		switch {
		case !known:
			t.Errorf("%s is no setting", name)
		case found[name]:
			t.Errorf("%s is there twice", name)
		case commented && value != byDefault:
			t.Errorf("%s is %q, but its default is %q", name, value, byDefault)
		case !commented:
			set = append(set, name+"="+value)
		}
		found[name] = true
	}
	for name := range want {
		if !found[name] {
			t.Errorf("%s is missing", name)
		}
	}
	theWorker(t).accepts(t, set)
}

func TestReadme_HasEverySettingWithItsDefault(t *testing.T) {
	t.Parallel()
	want := defaults(t)
	found := make(map[string]bool)
	for line := range strings.Lines(read(t, "README.md")) {
		cells := strings.Split(line, "|")
		if len(cells) != 5 { // nothing, the variable, the default, the meaning, nothing
			continue
		}
		names := regexp.MustCompile("`([A-Z][A-Z_]+)`").FindAllStringSubmatch(cells[1], -1)
		for _, m := range names {
			name := m[1]
			if _, known := want[name]; !known && !strings.HasPrefix(name, "OTEL_") {
				t.Errorf("%s is no setting", name)
			}
			found[name] = true
		}
		if len(names) != 1 {
			continue
		}
		byDefault := strings.Trim(strings.TrimSpace(cells[2]), "`")
		if byDefault == "required" || byDefault == "–" {
			byDefault = ""
		}
		if name := names[0][1]; byDefault != want[name] && name != "REDIS_URL" && name != "DATABASE_URL" {
			t.Errorf("%s: the README says that %q is the default; it is %q", name, byDefault, want[name])
		}
	}
	for _, name := range slices.Sorted(maps.Keys(want)) {
		if !found[name] {
			t.Errorf("%s is missing in the README", name)
		}
	}
}

func TestGitignore_KeepsSecretsOut(t *testing.T) {
	t.Parallel()
	if !slices.Contains(strings.Split(read(t, ".gitignore"), "\n"), ".env") {
		t.Error(".env, which .env.example is to be copied to, is not ignored")
	}
}
