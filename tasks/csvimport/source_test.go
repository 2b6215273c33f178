package csvimport

import (
	"bytes"
	"compress/gzip"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"testing"
	"time"

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
	_, err = src.infer(t.Context(), "", func(string, int64, int64) {})
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
				_, err = src.infer(t.Context(), "", func(string, int64, int64) {})
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
	if got, err := src.infer(t.Context(), "", func(string, int64, int64) {}); err != nil || got.rows != 1 {
		t.Errorf("%+v, error %v", got, err)
	}
}
