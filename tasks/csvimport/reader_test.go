package csvimport

import (
	"bytes"
	"context"
	"encoding/csv"
	"errors"
	"hash/maphash"
	"io"
	"slices"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/google/go-cmp/cmp"

	"github.com/carpool-go/carpool/tasks"
)

// reading is what a reader makes of a file.
type reading struct {
	Records [][]string
	Lines   []int // on which they end
	Err     string
}

func readAll(t *testing.T, in io.Reader, delimiter byte) (reading, *reader) {
	t.Helper()
	r := newReader(context.Background(), in, maphash.MakeSeed(), delimiter)
	var got reading
	for {
		record, err := r.next()
		if err == nil {
			got.Records = append(got.Records, slices.Clone(record))
			got.Lines = append(got.Lines, r.line)
			continue
		}
		if !errors.Is(err, io.EOF) {
			got.Err = err.Error()
			if !tasks.IsPermanent(err) {
				t.Errorf("error %v is not permanent", err)
			}
		}
		return got, r
	}
}

// However the bytes come in, the same is read; and of a file that is taken, encoding/csv
// reads the same records.
func FuzzReader(f *testing.F) {
	for _, s := range []string{
		"a,b\n1,2\n", "\uFEFFa\r\n\"x\r\ny\"\r\n", "a,b\n1\n", "a\n\"", "a\n\"x\"y\n", "a\n\n\nb", "a\nx\"y\n", "\r\r\n\"\"\"\"", "a,b\n\"\n\n\",\"\n\"\n",
		"a;b\r1;2\r", "a\r\r\n1\r\r\n", "sep=|\na|b\n", "\"sep=;\"\r\na;b\r\n", "a\n1;2\n", "a,b;c\n", "a\r\"\r\n\"\r", "<html>", "[{", "a\x00b\x00",
	} {
		f.Add([]byte(s), byte(0))
		f.Add([]byte(s), byte(','))
	}
	f.Fuzz(func(t *testing.T, data []byte, delimiter byte) {
		if delimiter != 0 && !isDelimiter(string(delimiter)) {
			return
		}
		want, r := readAll(t, bytes.NewReader(data), delimiter)
		if r.in.bytes > int64(len(data)) {
			t.Errorf("%d bytes were read of %d", r.in.bytes, len(data))
		}
		got, _ := readAll(t, iotest.DataErrReader(iotest.OneByteReader(bytes.NewReader(data))), delimiter)
		if diff := cmp.Diff(want, got); diff != "" {
			t.Fatalf("byte by byte (-want +got):\n%s", diff)
		}
		// encoding/csv takes a CR for data, an empty line for nothing, and a fault on the way
		// for the end of what it has read.
		if want.Err != "" || bytes.IndexByte(data, '\r') >= 0 || r.width == 1 || r.delimiter == 0 || bytes.Contains(bytes.ToLower(data), []byte("sep=")) {
			return
		}
		data = bytes.TrimPrefix(data, []byte("\uFEFF"))
		reference := csv.NewReader(bytes.NewReader(data))
		reference.Comma = rune(r.delimiter)
		for i, record := range want.Records {
			same, err := reference.Read()
			if err != nil || !slices.Equal(same, record) {
				t.Fatalf("record %q; encoding/csv has %q, error %v", record, same, err)
			}
			if end := bytes.Count(data[:reference.InputOffset()], []byte("\n")); want.Lines[i] != end && want.Lines[i] != end+1 {
				t.Fatalf("record %q ends in line %d, counted as %d", record, end, want.Lines[i])
			}
		}
		if _, err := reference.Read(); !errors.Is(err, io.EOF) {
			t.Fatalf("encoding/csv has more: error %v", err)
		}
	})
}

func TestReader_AFailureComesAfterTheRecordsThatWereReadBefore(t *testing.T) {
	t.Parallel()
	away := errors.New("away")
	for _, in := range []io.Reader{
		io.MultiReader(strings.NewReader("a\n1\n2\n\"3"), iotest.ErrReader(away)),
		iotest.OneByteReader(io.MultiReader(strings.NewReader("a\n1\n2\n3"), iotest.ErrReader(away))),
		&bytesAndError{[]byte("a\n1\n2\n3"), away},
		io.MultiReader(strings.NewReader("a\r1\r2\r3"), iotest.ErrReader(away)),
		io.MultiReader(strings.NewReader("a\r\n1\r\n2\r\n\"3\""), iotest.ErrReader(away)),
	} {
		r := newReader(t.Context(), in, maphash.MakeSeed(), ',')
		var read []string
		var err error
		for {
			var record []string
			if record, err = r.next(); err != nil {
				break
			}
			read = append(read, record[0])
		}
		if diff := cmp.Diff([]string{"a", "1", "2"}, read); diff != "" {
			t.Errorf("records (-want +got):\n%s", diff)
		}
		if !errors.Is(err, away) || err.Error() != "after line 3: away" || tasks.IsPermanent(err) {
			t.Errorf("error %v, permanent %t", err, tasks.IsPermanent(err))
		}
	}
}

// bytesAndError returns both in one Read, as a reader may.
type bytesAndError struct {
	data []byte
	err  error
}

func (r *bytesAndError) Read(p []byte) (int, error) {
	n := copy(p, r.data)
	r.data = r.data[n:]
	return n, r.err
}

func TestReader_StopsWhenTheJobIsCancelled(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithCancelCause(t.Context())
	r := newReader(ctx, io.MultiReader(strings.NewReader("a\n"), iotest.OneByteReader(strings.NewReader(strings.Repeat("1\n", headSize)))), maphash.MakeSeed(), ',')
	if _, err := r.next(); err != nil {
		t.Fatal(err)
	}
	shutdown := errors.New("shutting down")
	cancel(shutdown)
	var err error
	for err == nil { // what has been looked at is read
		_, err = r.next()
	}
	if !errors.Is(err, shutdown) || tasks.IsPermanent(err) {
		t.Errorf("error %v, permanent %t", err, tasks.IsPermanent(err))
	}
}
