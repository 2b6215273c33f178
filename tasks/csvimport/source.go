package csvimport

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"encoding/csv"
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
	"unicode/utf8"

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
func (s *source) again(ctx context.Context) (*reader, error) {
	if _, err := s.file.Seek(0, io.SeekStart); err != nil {
		return nil, fmt.Errorf("read it again: %w", err)
	}
	return newReader(ctx, s.file, s.seed), nil
}

const (
	bufferSize = 64 << 10
	// maxRecord bounds a record, in bytes, and with it what a quote that is
	// never closed may take of the memory.
	maxRecord = 8 << 20
	// maxColumns is what Postgres allows a table (MaxHeapAttributeNumber).
	maxColumns = 1600
)

var (
	errRecordLong = fmt.Errorf("the record that begins here is longer than %d MiB; is a quote not closed?", maxRecord>>20)
	errManyFields = fmt.Errorf("it has more fields than the %d columns that Postgres allows a table", maxColumns)
)

// reader reads the records of a CSV file as RFC 4180 has them. Empty lines
// are skipped, and within quotes a CR before an LF is dropped, as encoding/csv
// does.
type reader struct {
	csv   *csv.Reader
	in    input
	begun bool
	line  int // the last that was read whole
}

func newReader(ctx context.Context, r io.Reader, seed maphash.Seed) *reader {
	c := &reader{in: input{ctx: ctx, r: r}}
	c.in.sum.SetSeed(seed)
	return c
}

// next returns the next record, which is valid until the next call; io.EOF after
// the last. An error in the content is permanent and names its line; any other
// says after which line the source failed.
func (r *reader) next() ([]string, error) {
	r.in.newRecord()
	if !r.begun {
		r.begun = true
		buf := bufio.NewReaderSize(&r.in, bufferSize)
		if bom, _ := buf.Peek(3); string(bom) == "\uFEFF" {
			_, _ = buf.Discard(3)
		}
		r.csv = csv.NewReader(buf) // which takes buf for its own buffer
		r.csv.ReuseRecord = true
	}
	record, err := r.csv.Read()
	if err == nil && r.in.err == nil {
		last := len(record) - 1
		line, _ := r.csv.FieldPos(last)
		r.line = line + strings.Count(record[last], "\n")
		return record, nil
	}
	switch {
	case errors.Is(r.in.err, errRecordLong), errors.Is(r.in.err, errManyFields):
		return nil, fault(r.line+1, "%w", r.in.err)
	case r.in.err != nil:
		// Before what the parser says of a record that was cut short by it.
		return nil, fmt.Errorf("after line %d: %w", r.line, r.in.err)
	case errors.Is(err, io.EOF):
		return nil, io.EOF
	}
	e, ok := errors.AsType[*csv.ParseError](err)
	switch {
	case !ok:
		return nil, fmt.Errorf("after line %d: %w", r.line, err)
	case errors.Is(e.Err, csv.ErrFieldCount):
		return nil, fault(e.Line, "%d fields, but the header has %d", len(record), r.csv.FieldsPerRecord)
	case e.Line != e.StartLine:
		return nil, fault(e.Line, "%w (in the record that begins on line %d)", e.Err, e.StartLine)
	}
	return nil, fault(e.Line, "%w", e.Err)
}

// fieldLine is the line on which field i of the last record begins.
func (r *reader) fieldLine(i int) int {
	line, _ := r.csv.FieldPos(i)
	return line
}

// checkText reports what keeps field i of the last record from being text.
func (r *reader) checkText(i int, s string) error {
	if strings.IndexByte(s, 0) < 0 && utf8.ValidString(s) {
		return nil
	}
	line := r.fieldLine(i)
	for at, c := range s {
		switch c {
		case '\n':
			line++
		case 0:
			return fault(line, "field %d has a NUL byte, which Postgres can't keep in text", i+1)
		case utf8.RuneError:
			if _, size := utf8.DecodeRuneInString(s[at:]); size == 1 {
				return fault(line, "field %d is not UTF-8", i+1)
			}
		}
	}
	return nil
}

func fault(line int, format string, args ...any) error {
	return tasks.Permanent(fmt.Errorf("line %d: %w", line, fmt.Errorf(format, args...)))
}

// input stands between the source and the parser, which has no bounds.
type input struct {
	ctx   context.Context
	r     io.Reader
	sum   maphash.Hash // of all bytes
	bytes int64
	// err is the first that is not io.EOF; next is one that came together with
	// bytes, to be returned after those.
	err, next error

	quoted bool
	// Since the last record was asked for. What the buffer reads ahead is counted
	// to the record before, so both may be off by one buffer.
	recordBytes, recordFields int
}

func (in *input) newRecord() { in.recordBytes, in.recordFields = 0, 0 }

func (in *input) Read(p []byte) (int, error) {
	if in.err == nil && in.ctx.Err() != nil {
		in.err = context.Cause(in.ctx)
	}
	if in.err == nil {
		in.err = in.next
	}
	if in.err != nil {
		return 0, in.err
	}
	n, err := in.r.Read(p)
	p = p[:n]
	_, _ = in.sum.Write(p)
	in.bytes += int64(n)
	in.recordBytes += n
	// Each comma outside quotes costs the parser 40 bytes, so that a line of
	// nothing else must be stopped before it is parsed. Quotes come in pairs, or
	// the parser refuses the record at the first that is alone.
	if in.recordBytes > bufferSize {
		for _, c := range p {
			if c == '"' {
				in.quoted = !in.quoted
			} else if c == ',' && !in.quoted {
				in.recordFields++
			}
		}
	} else if bytes.Count(p, []byte{'"'})%2 == 1 {
		in.quoted = !in.quoted
	}
	switch {
	case in.recordFields > maxColumns+bufferSize:
		in.err = errManyFields
	case in.recordBytes > maxRecord+bufferSize:
		in.err = errRecordLong
	case err != nil && !errors.Is(err, io.EOF):
		if n > 0 {
			in.next = err
			return n, nil
		}
		in.err = err
	default:
		return n, err
	}
	return n, in.err
}
