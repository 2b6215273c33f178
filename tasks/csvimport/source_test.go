package csvimport

import (
	"bytes"
	"compress/gzip"
	"context"
	"encoding/csv"
	"errors"
	"hash/maphash"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"slices"
	"strings"
	"testing"
	"testing/iotest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/carpool-go/carpool/outbound"
	"github.com/carpool-go/carpool/tasks"
)

func TestSource_AServerThatSendsNothingMoreIsGivenUp(t *testing.T) {
	t.Parallel()
	ended := make(chan struct{})
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.WriteString(w, "a,b\n1,2\n3,")
		_ = http.NewResponseController(w).Flush()
		<-r.Context().Done()
		close(ended)
	}))
	defer server.Close()
	guard, err := outbound.New("127.0.0.1")
	if err != nil {
		t.Fatal(err)
	}
	src, err := Importer{stall: 50 * time.Millisecond}.open(outbound.NewContext(t.Context(), guard), server.URL)
	if err != nil {
		t.Fatal(err)
	}
	defer src.close()
	_, err = src.infer(t.Context(), func(string, int64, int64) {})
	if err == nil || err.Error() != "after line 2: the server sent nothing for 50ms" || tasks.IsPermanent(err) {
		t.Errorf("error %v, permanent %t", err, tasks.IsPermanent(err))
	}
	<-ended
}

// An endless answer, and one that is small until it is unpacked.
func TestSource_AFileThatIsTooLargeIsRefusedForGoodAndNothingIsKept(t *testing.T) {
	const most = 1 << 20
	t.Setenv("TMPDIR", t.TempDir())
	for name, answer := range map[string]http.HandlerFunc{
		"endless": func(w http.ResponseWriter, _ *http.Request) {
			_, _ = io.WriteString(w, "a\n")
			for line := bytes.Repeat([]byte("1\n"), 4096); ; {
				if _, err := w.Write(line); err != nil {
					return
				}
			}
		},
		"says so": func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Length", "1048577")
			_, _ = io.WriteString(w, "a\n")
		},
		"gzip": func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Encoding", "gzip")
			packed := gzip.NewWriter(w)
			_, _ = io.WriteString(packed, "a\n")
			_, _ = packed.Write(bytes.Repeat([]byte("1\n"), most))
			_ = packed.Close()
		},
	} {
		t.Run(name, func(t *testing.T) {
			server := httptest.NewServer(answer)
			defer server.Close()
			guard, err := outbound.New("127.0.0.1")
			if err != nil {
				t.Fatal(err)
			}
			src, err := Importer{MaxBytes: most}.open(outbound.NewContext(t.Context(), guard), server.URL)
			if err == nil {
				_, err = src.infer(t.Context(), func(string, int64, int64) {})
				src.close()
			}
			if !tasks.IsPermanent(err) || !strings.Contains(err.Error(), "more than 1048576 bytes") || !strings.Contains(err.Error(), "IMPORT_MAX_MB") {
				t.Errorf("error %v, permanent %t", err, tasks.IsPermanent(err))
			}
			left, err := os.ReadDir(os.TempDir())
			if err != nil || len(left) > 0 {
				t.Errorf("left behind: %v, error %v", left, err)
			}
		})
	}
}

// The bound is the last byte that is taken.
func TestSource_AFileAsLargeAsTheBoundIsTaken(t *testing.T) {
	t.Parallel()
	const file = "a\n1\n"
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, file) }))
	defer server.Close()
	guard, err := outbound.New("127.0.0.1")
	if err != nil {
		t.Fatal(err)
	}
	src, err := Importer{MaxBytes: int64(len(file))}.open(outbound.NewContext(t.Context(), guard), server.URL)
	if err != nil {
		t.Fatal(err)
	}
	defer src.close()
	if got, err := src.infer(t.Context(), func(string, int64, int64) {}); err != nil || got.rows != 1 {
		t.Errorf("%+v, error %v", got, err)
	}
}

// A reader between the source and encoding/csv that bounds it must not change
// what it reads, however the bytes come in.
func FuzzReader(f *testing.F) {
	for _, s := range []string{
		"a,b\n1,2\n", "\uFEFFa\r\n\"x\r\ny\"\r\n", "a,b\n1\n", "a\n\"", "a\n\"x\"y\n", "a\n\n\nb", "a\nx\"y\n", "\r\r\n\"\"\"\"", "a,b\n\"\n\n\",\"\n\"\n",
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		withoutBOM := bytes.TrimPrefix(data, []byte("\uFEFF"))
		for _, in := range []io.Reader{bytes.NewReader(data), iotest.DataErrReader(iotest.OneByteReader(bytes.NewReader(data)))} {
			reference := csv.NewReader(bytes.NewReader(withoutBOM))
			r := newReader(context.Background(), in, maphash.MakeSeed())
			for {
				want, wantErr := reference.Read()
				got, err := r.next()
				if (wantErr == nil) != (err == nil) || errors.Is(wantErr, io.EOF) != errors.Is(err, io.EOF) {
					t.Fatalf("error %v, encoding/csv says %v", err, wantErr)
				}
				if err != nil {
					if !errors.Is(err, io.EOF) && !tasks.IsPermanent(err) {
						t.Errorf("error %v is not permanent", err)
					}
					break
				}
				if !slices.Equal(got, want) {
					t.Fatalf("record %q, encoding/csv has %q", got, want)
				}
				if end := bytes.Count(withoutBOM[:reference.InputOffset()], []byte("\n")); r.line != end && r.line != end+1 {
					t.Fatalf("record %q ends in line %d, counted as %d", got, end, r.line)
				}
			}
			if r.in.bytes > int64(len(data)) {
				t.Errorf("%d bytes were read of %d", r.in.bytes, len(data))
			}
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
	} {
		r := newReader(t.Context(), in, maphash.MakeSeed())
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
	r := newReader(ctx, io.MultiReader(strings.NewReader("a\n"), iotest.OneByteReader(strings.NewReader(strings.Repeat("1\n", 100)))), maphash.MakeSeed())
	if _, err := r.next(); err != nil {
		t.Fatal(err)
	}
	shutdown := errors.New("shutting down")
	cancel(shutdown)
	if _, err := r.next(); !errors.Is(err, shutdown) || tasks.IsPermanent(err) {
		t.Errorf("error %v, permanent %t", err, tasks.IsPermanent(err))
	}
}
