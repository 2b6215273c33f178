package deploytest

import (
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// What docs/operate.md says that the log shows, the program has to say.
func TestOperate_QuotesWhatTheProgramSays(t *testing.T) {
	t.Parallel()
	var source strings.Builder
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case d.IsDir() && (d.Name() == ".git" || d.Name() == "node_modules" || d.Name() == "bench"):
			return filepath.SkipDir
		case strings.HasSuffix(path, ".go") && !strings.HasSuffix(path, "_test.go"):
			text, err := os.ReadFile(path)
			source.Write(text)
			return err
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	said := regexp.MustCompile(`" ?\+\s*"`).ReplaceAllString(source.String(), "")
	quoted := 0
	for line := range strings.Lines(read(t, "docs/operate.md")) {
		cells := strings.Split(line, "|")
		if len(cells) != 5 {
			continue
		}
		for _, m := range regexp.MustCompile("`([^`]+)`").FindAllStringSubmatch(cells[1], -1) {
			quoted++
			if !strings.Contains(said, m[1]) {
				t.Errorf("nothing says %q", m[1])
			}
		}
	}
	if quoted < 20 {
		t.Errorf("%d quotations were found", quoted)
	}
}
