package csvimport

import (
	"bytes"
	"errors"
	"hash/maphash"
	"io"
	"os"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// inferFrom infers a file that comes as from a URL, whose copy is in file.
func inferFrom(t *testing.T, file *os.File, data []byte, delimiter string) (*sheet, error) {
	t.Helper()
	if err := errors.Join(file.Truncate(0), seekToStart(file)); err != nil {
		t.Fatal(err)
	}
	s := &source{first: io.TeeReader(bytes.NewReader(data), file), file: file, seed: maphash.MakeSeed()}
	return s.infer(t.Context(), delimiter, func(string, int64, int64) {})
}

func seekToStart(file *os.File) error {
	_, err := file.Seek(0, io.SeekStart)
	return err
}

// A delimiter that the file has shown is the only one that can be read into columns.
func FuzzInfer_NoOtherDelimiterAgrees(f *testing.F) {
	for _, s := range []string{
		"a,b\n1,2\n", "a;b\n1,5;2\n", "a,b;c\n1,2\n", "a,b;c\n1,2;3\n", "a\n1\n", "a\n1;2\n", "a\tb|c\r1\t2\r", "\"a;b\"\n1\n", "sep=;\na,b;c\n1;2\n", "a;b\n1;\"x\n,\"\n", "\n\n;\n,;\n",
	} {
		f.Add([]byte(s))
	}
	file, err := os.CreateTemp(f.TempDir(), "*.csv")
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() { _ = file.Close() })
	f.Fuzz(func(t *testing.T, data []byte) {
		shown, err := inferFrom(t, file, data, "")
		if err != nil {
			return
		}
		for _, c := range delimiters {
			told, err := inferFrom(t, file, data, string(c))
			switch {
			case byte(c) == shown.delimiter:
				if err != nil {
					t.Fatalf("read with %q as shown; told so: %v", c, err)
				}
				shown.sum, told.sum = 0, 0 // the seeds differ
				if diff := cmp.Diff(shown, told, cmp.AllowUnexported(sheet{}, inferredColumn{})); diff != "" {
					t.Fatalf("read with %q as shown, and told so (-shown +told):\n%s", c, diff)
				}
			case err == nil && len(told.columns) > 1 && !strings.Contains(strings.ToLower(string(data)), "sep="):
				t.Fatalf("read with %q into %d columns, but %q gives %d", shown.delimiter, len(shown.columns), c, len(told.columns))
			}
		}
	})
}
