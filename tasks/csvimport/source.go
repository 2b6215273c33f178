package csvimport

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"hash/maphash"
	"io"
	"io/fs"
	"net/http"
	"net/url"
	"os"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/carpool-go/carpool/internal/pgtext"
	"github.com/carpool-go/carpool/outbound"
	"github.com/carpool-go/carpool/tasks"
)

// source is a CSV file that can be read twice: once to learn the types of its
// columns, once to load it.
type source struct {
	// name is that of [sourceName].
	name string
	// first is what the first pass reads. Of a file it is the file, of a URL the
	// answer's body, which is written to file on the way: a second request might
	// be refused, or answered with something else.
	first io.Reader
	file  *os.File
	seed  maphash.Seed
	close func()
}

// open opens a source. The caller closes it.
func (i Importer) open(ctx context.Context, from string) (*source, error) {
	u, err := url.Parse(from)
	if err != nil {
		return nil, tasks.Permanent(errSource)
	}
	s := &source{name: sourceName(u), seed: maphash.MakeSeed()}
	if u.Scheme == "file" {
		err = i.openFile(s, u)
	} else {
		err = i.openURL(ctx, s, u)
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w", s.name, err)
	}
	return s, nil
}

// maxName bounds what errors show of a source, in bytes. It is more than a host's name has.
const maxName = 300

// sourceName is what errors call a source: of a URL the scheme and the host, because its path
// and its query may hold a secret, and of a file the path below IMPORT_DIR.
func sourceName(u *url.URL) string {
	shown := url.URL{Scheme: u.Scheme, Host: u.Host}
	if u.Scheme == "file" {
		shown.Path = u.Path
	}
	return pgtext.Cut(shown.String(), maxName)
}

func (i Importer) openFile(s *source, u *url.URL) error {
	if i.Dir == "" {
		return tasks.Permanent(errors.New("this worker reads no files; set IMPORT_DIR to the folder they are in"))
	}
	root, err := os.OpenRoot(i.Dir)
	if err != nil {
		return tasks.Permanent(fmt.Errorf("IMPORT_DIR: %w", err))
	}
	defer func() { _ = root.Close() }()
	// Without O_NONBLOCK, opening a fifo waits for somebody to write to it.
	f, err := root.OpenFile(strings.TrimLeft(u.Path, "/"), os.O_RDONLY|syscall.O_NONBLOCK, 0)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return tasks.Permanent(errors.New("there is no such file below IMPORT_DIR"))
	case errors.Is(err, fs.ErrPermission):
		return tasks.Permanent(errors.New("this worker may not read the file"))
	case err != nil: // os.Root has no error to compare with for what leads outside
		reason := err
		if e, ok := errors.AsType[*fs.PathError](err); ok {
			reason = e.Err
		}
		return tasks.Permanent(fmt.Errorf("it can't be opened below IMPORT_DIR: %w", reason))
	}
	info, err := f.Stat()
	if err == nil && !info.Mode().IsRegular() {
		err = tasks.Permanent(errors.New("it is not a regular file"))
	}
	if err != nil {
		_ = f.Close()
		return err
	}
	s.first, s.file = f, f
	s.close = func() { _ = f.Close() }
	return nil
}

// defaultStall is how long a server may send nothing amid a file.
const defaultStall = time.Minute

func (i Importer) openURL(ctx context.Context, s *source, u *url.URL) (err error) {
	spool, err := os.CreateTemp("", "carpool-import-*.csv")
	if err != nil {
		return spoolError(err)
	}
	// Removed at once where the system allows, so that nothing can leave it behind.
	removed := os.Remove(spool.Name()) == nil
	ctx, cancel := context.WithCancelCause(ctx)
	s.close = func() {
		cancel(nil)
		_ = spool.Close()
		if !removed {
			_ = os.Remove(spool.Name())
		}
	}
	defer func() {
		if err != nil {
			s.close()
		}
	}()

	req, err := http.NewRequestWithContext(ctx, http.MethodGet, u.String(), nil)
	if err != nil {
		return tasks.Permanent(errSource)
	}
	req.Header.Set("Accept", "text/csv, */*")
	req.Header.Set("User-Agent", "carpool")
	resp, err := outbound.Client(ctx).Do(req)
	if err != nil {
		return requestError(ctx, err)
	}
	release := s.close
	s.close = func() {
		_ = resp.Body.Close()
		release()
	}
	switch code := resp.StatusCode; {
	case code == http.StatusOK:
	case code == http.StatusRequestTimeout, code == http.StatusTooEarly, code == http.StatusTooManyRequests, code >= 500:
		return fmt.Errorf("the server answered %d %s", code, http.StatusText(code))
	default:
		return tasks.Permanent(fmt.Errorf("the server answered %d %s", code, http.StatusText(code)))
	}
	stall := i.stall
	if stall == 0 {
		stall = defaultStall
	}
	most := cmp.Or(i.MaxBytes, DefaultMaxBytes)
	tooLarge := tasks.Permanent(fmt.Errorf("the file has more than %d bytes, unpacked, which is as much as this worker takes; IMPORT_MAX_MB changes it", most))
	if resp.ContentLength > most {
		return tooLarge
	}
	s.file = spool
	s.first = io.TeeReader(&boundedReader{left: most, tooLarge: tooLarge, r: &stallReader{
		r: resp.Body, ctx: ctx, after: stall,
		timer: time.AfterFunc(stall, func() { cancel(fmt.Errorf("the server sent nothing for %v", stall)) }),
	}}, spoolWriter{spool})
	return nil
}

// spoolWriter writes the copy of a file from the web to the worker's own disk.
type spoolWriter struct{ file *os.File }

// Write implements [io.Writer].
func (w spoolWriter) Write(p []byte) (int, error) {
	n, err := w.file.Write(p)
	if err != nil {
		err = spoolError(err)
	}
	return n, err
}

// spoolError says why a copy can't be kept. It is permanent where the disk has no room or
// the folder takes no file, because each further try would download the file up to the same
// point. The name of the copy is left out: it is gone by then.
func spoolError(err error) error {
	reason := err
	if e, ok := errors.AsType[*fs.PathError](err); ok {
		reason = e.Err
	}
	full := []error{syscall.ENOSPC, syscall.EDQUOT, syscall.EFBIG}
	unfit := []error{fs.ErrNotExist, fs.ErrPermission, syscall.ENOTDIR, syscall.EROFS}
	switch isReason := func(e error) bool { return errors.Is(reason, e) }; {
	case slices.ContainsFunc(full, isReason):
		return tasks.Permanent(fmt.Errorf("the worker's own disk has no room for a copy of the file in %s: %w; make room there, or set TMPDIR to a folder that has it", os.TempDir(), reason))
	case slices.ContainsFunc(unfit, isReason):
		return tasks.Permanent(fmt.Errorf("the worker can't keep a copy of the file in %s: %w; set TMPDIR to a folder that it may write to", os.TempDir(), reason))
	}
	return fmt.Errorf("keep a copy in %s: %w", os.TempDir(), reason)
}

// boundedReader fails with tooLarge where more than left bytes come. It stands behind the
// unpacking that net/http does, because a small answer may be a large file.
type boundedReader struct {
	r        io.Reader
	left     int64
	tooLarge error
}

func (b *boundedReader) Read(p []byte) (int, error) {
	if int64(len(p)) > b.left+1 {
		p = p[:b.left+1]
	}
	n, err := b.r.Read(p)
	if int64(n) > b.left {
		return 0, b.tooLarge
	}
	b.left -= int64(n)
	return n, err
}

// requestError says why a request failed, or the reading of its answer, as
// [outbound.Reason] does. It doesn't wrap the cause: whoever looks for a lost connection in
// a job's error means the database's.
func requestError(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	err = outbound.Reason(err)
	if _, ok := errors.AsType[*outbound.BlockedError](err); ok {
		return tasks.Permanent(err)
	}
	return errors.New(err.Error())
}

// stallReader reads the body of an answer, and ends a request that makes no
// progress.
type stallReader struct {
	r     io.Reader
	ctx   context.Context
	after time.Duration
	timer *time.Timer
}

func (s *stallReader) Read(p []byte) (int, error) {
	s.timer.Reset(s.after)
	n, err := s.r.Read(p)
	s.timer.Stop()
	switch {
	case err == nil, errors.Is(err, io.EOF):
		return n, err
	case errors.Is(err, io.ErrUnexpectedEOF) && s.ctx.Err() == nil:
		return n, errors.New("the server's answer was cut short")
	}
	return n, requestError(s.ctx, err)
}

// again returns a reader for another pass over the whole file.
func (s *source) again(ctx context.Context, delimiter byte) (*reader, error) {
	if _, err := s.file.Seek(0, io.SeekStart); err != nil {
		return nil, fmt.Errorf("read it again: %w", err)
	}
	return newReader(ctx, s.file, s.seed, delimiter), nil
}
