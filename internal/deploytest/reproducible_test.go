package deploytest

import (
	"bytes"
	"io/fs"
	"os"
	"path/filepath"
	"testing"
)

// The same commit makes the same program, wherever it is built. (What the images are made
// of beside it are their bases.) A long run has both programs, and an empty cache.
func TestDockerfile_BuildsTheSameBytesInTwoFolders(t *testing.T) {
	t.Parallel()
	p := theWorker(t)
	one, err := builds[p.program]()
	if err != nil {
		t.Fatal(err)
	}
	sameBytes(t, one, p.buildElsewhere(t))
}

func sameBytes(t *testing.T, one, other string) {
	t.Helper()
	a, err := os.ReadFile(one)
	if err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(other)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(a, b) {
		t.Errorf("%s has %d bytes, %s %d, and they differ", one, len(a), other, len(b))
	}
}

// buildElsewhere builds the program from a copy of what its image is built from, in a
// folder of its own. env are further variables.
func (p program) buildElsewhere(t *testing.T, env ...string) (path string) {
	t.Helper()
	folder := t.TempDir()
	dir := filepath.Join(folder, "source")
	var err error
	if p.dir == own.dir {
		dir, err = p.vendored(folder)
	} else {
		err = p.copyBuilt(t, dir)
	}
	if err != nil {
		t.Fatal(err)
	}
	if path, err = p.build(dir, filepath.Join(folder, "out"), env...); err != nil {
		t.Fatal(err)
	}
	return path
}

// copyBuilt copies the program's repository to a folder, but for what .dockerignore leaves
// out.
func (p program) copyBuilt(t *testing.T, to string) error {
	t.Helper()
	from := filepath.Join(root, p.dir)
	ignored := p.ignored(t)
	if err := os.MkdirAll(to, 0o755); err != nil {
		return err
	}
	err := filepath.WalkDir(from, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(from, path)
		switch {
		case err != nil || rel == ".":
			return err
		case isIgnored(t, ignored, filepath.ToSlash(rel)) && d.IsDir():
			return filepath.SkipDir
		case isIgnored(t, ignored, filepath.ToSlash(rel)):
			return nil
		case d.IsDir():
			return os.MkdirAll(filepath.Join(to, rel), 0o755)
		}
		data, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		return os.WriteFile(filepath.Join(to, rel), data, 0o644)
	})
	if err != nil {
		return err
	}
	dockerfile, err := os.ReadFile(filepath.Join(from, "Dockerfile")) // says how it is built
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(to, "Dockerfile"), dockerfile, 0o644)
}
