package csvimport

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"hash/maphash"
	"io"
	"strings"
	"unicode/utf8"

	"github.com/carpool-go/carpool/tasks"
)

const (
	bufferSize = 64 << 10
	// maxRecord bounds a record, in bytes, and with it what a quote that is
	// never closed may take of the memory.
	maxRecord = 8 << 20
	// maxColumns is what Postgres allows a table (MaxHeapAttributeNumber).
	maxColumns = 1600
	// headSize is how much of a file is looked at to tell what it is.
	headSize = 512
)

// delimiters are those that a header may show to be the file's.
const delimiters = ",;\t|"

// These say why a record can't be read.
var (
	errRecordLong = fmt.Errorf("the record that begins here is longer than %d MiB; is a quote not closed?", maxRecord>>20)
	errUnclosed   = errors.New("the quote that begins a field here is never closed")
	errBareQuote  = errors.New("a quote in a field that does not begin with one; such a field is put in quotes, and each quote in it written twice")
	errAfterQuote = errors.New("text after a field's closing quote; a quote within a field is written twice")
	errLoneCR     = errors.New("a carriage return outside quotes, in a file whose lines end with a line feed")
	errLoneLF     = errors.New("a line feed outside quotes, in a file whose lines end with a carriage return")
)

// lineEnds is how the lines of a file end. The first that ends shows it.
type lineEnds uint8

const (
	unknown lineEnds = iota
	lf               // LF, CR LF, or CR CR LF, which comes of turning LF into CR LF twice
	cr               // CR alone
)

// reader reads the records of a CSV file as RFC 4180 has them, and refuses what could be
// meant otherwise: a field that begins with a quote ends with one and has all others
// twice, any other field has none. Within quotes everything is data. Every record has as
// many fields as the first, the header. Empty lines are skipped, save where the header has
// one field: there each is an empty field, because COPY writes and reads them so.
type reader struct {
	in input
	// delimiter separates fields. If it was not given it is 0 until the header is read;
	// then shown has those of delimiters that the header has outside quotes, and the header
	// is cut at each of them.
	delimiter byte
	shown     []byte
	// sniffed is true if nothing but the header says what the delimiter is.
	sniffed bool
	// stops are the bytes that may end a field without quotes.
	stops [256]bool

	buf      []byte
	at, end  int // of what is in buf and not yet read
	begun    bool
	lineEnds lineEnds
	width    int // fields of the header, 0 before it
	here     int // the line that is read now
	line     int // the last that was read whole

	// Of the last record. Fields beyond maxColumns are counted, but not kept.
	begin  int    // the line on which it begins
	text   []byte // its fields, one after the other
	ends   []int  // where in text each field ends
	lines  []int  // on which line each begins
	count  int
	quoted bool // the last field is
	fields []string
}

// newReader returns a reader of a file whose fields are separated by delimiter; 0 lets the
// header show it.
func newReader(ctx context.Context, r io.Reader, seed maphash.Seed, delimiter byte) *reader {
	c := &reader{in: input{ctx: ctx, r: r}, delimiter: delimiter, sniffed: delimiter == 0, here: 1}
	c.in.sum.SetSeed(seed)
	return c
}

// next returns the next record, which is valid until the next call; io.EOF after
// the last. An error in the content is permanent and names its line; any other
// says after which line the source failed.
func (r *reader) next() ([]string, error) {
	if !r.begun {
		r.begun = true
		if err := r.beginFile(); err != nil {
			return nil, err
		}
	}
	for {
		if err := r.read(); err != nil {
			return nil, err
		}
		if r.count == 1 && len(r.text) == 0 && !r.quoted && r.width != 1 {
			continue // an empty line
		}
		if r.width == 0 {
			r.header()
		} else if r.count != r.width {
			how := ""
			if r.sniffed && r.delimiter != ',' {
				how = fmt.Sprintf(", separated by %q as it shows; the payload's \"delimiter\" can say otherwise", string(r.delimiter))
			}
			return nil, fault(r.begin, "%d fields, but the header has %d%s", r.count, r.width, how)
		}
		text := string(r.text)
		r.fields = r.fields[:0]
		begin := 0
		for _, end := range r.ends {
			r.fields = append(r.fields, text[begin:end])
			begin = end
		}
		return r.fields, nil
	}
}

// header takes the record that was read for the header.
func (r *reader) header() {
	r.width = r.count
	if r.delimiter == 0 && len(r.shown) <= 1 {
		r.delimiter = ','
		if len(r.shown) == 1 {
			r.delimiter = r.shown[0]
		}
	}
	r.setStops()
}

// setStops is to be called whenever delimiter, sniffed or width have changed.
func (r *reader) setStops() {
	r.stops = [256]bool{'"': true, '\n': true, '\r': true}
	if r.delimiter != 0 {
		r.stops[r.delimiter] = true
	}
	if r.sniffed && r.width <= 1 {
		for _, c := range []byte(delimiters) {
			r.stops[c] = true
		}
	}
}

// beginFile skips what may stand before the header and is no record.
func (r *reader) beginFile() error {
	r.buf = make([]byte, bufferSize)
	r.setStops()
	head := r.ahead(headSize)
	if bom := []byte("\uFEFF"); bytes.HasPrefix(head, bom) {
		r.at += len(bom)
		head = head[len(bom):]
	}
	if what := foreign(head); what != "" {
		return fault(1, "the file is no CSV, but looks like %s", what)
	}
	return r.separatorLine(head)
}

// separatorLine skips a first line such as sep=; by which Excel is told the delimiter.
func (r *reader) separatorLine(head []byte) error {
	n := bytes.IndexAny(head, "\r\n")
	if n < 0 {
		n = len(head)
	}
	said, ok := bytes.CutPrefix(bytes.ToLower(bytes.Trim(head[:n], `"`)), []byte("sep="))
	switch {
	case !ok:
		return nil
	case len(said) == 0 || !isDelimiter(string(said[:1])) || len(bytes.Trim(said, string(said[:1]))) > 0:
		return fault(1, "it begins with sep= as if to name a delimiter, but none that is one ASCII character")
	case r.delimiter != 0 && r.delimiter != said[0]:
		return fault(1, "the file says that its delimiter is %q, and the payload that it is %q", said[:1], string(r.delimiter))
	}
	r.delimiter, r.sniffed = said[0], false
	r.setStops()
	r.at += n
	if !r.more() {
		return nil
	}
	return r.endLine()
}

// isDelimiter reports whether s may be what separates fields.
func isDelimiter(s string) bool {
	if len(s) != 1 {
		return false
	}
	c := s[0]
	return c > 0 && c < utf8.RuneSelf && c != '"' && c != '\r' && c != '\n' &&
		!isDigit(c) && (c|0x20 < 'a' || c|0x20 > 'z')
}

// read reads a record into r.text, an empty line too.
func (r *reader) read() error {
	r.begin, r.count, r.text, r.ends, r.lines = r.here, 0, r.text[:0], r.ends[:0], r.lines[:0]
	if !r.more() {
		return r.ended()
	}
	for {
		if r.count <= maxColumns {
			r.lines = append(r.lines, r.here)
		}
		if err := r.field(); err != nil {
			return err
		}
		if r.count <= maxColumns {
			r.ends = append(r.ends, len(r.text))
		}
		r.count++
		if r.at == r.end { // field has looked for more
			if r.in.err != nil {
				return r.ended()
			}
			r.line = r.here
			return nil
		}
		c := r.buf[r.at]
		switch {
		case c == '\n' || c == '\r':
			return r.endLine()
		case c == r.delimiter:
			r.at++
		case r.delimiter == 0 && strings.IndexByte(delimiters, c) >= 0:
			r.at++
			if bytes.IndexByte(r.shown, c) < 0 {
				r.shown = append(r.shown, c)
			}
		case r.stops[c] && c != '"':
			return fault(r.here, `%q outside quotes, but the header names one column; the payload's "delimiter" can say that it separates fields, or that something else does, such as ","`, string(c))
		case r.quoted:
			return r.fault(errAfterQuote)
		default:
			return r.fault(errBareQuote)
		}
	}
}

// field appends the field that begins here to r.text. It stops at what ended the field, and
// at the end of what there is.
func (r *reader) field() error {
	r.quoted = r.more() && r.buf[r.at] == '"'
	if r.quoted {
		return r.quotedField()
	}
	for r.more() {
		rest := r.buf[r.at:r.end]
		n := 0
		for n < len(rest) && !r.stops[rest[n]] {
			n++
		}
		if err := r.take(n); err != nil {
			return err
		}
		if n < len(rest) {
			return nil
		}
	}
	return nil
}

func (r *reader) quotedField() error {
	line := r.here
	r.at++
	for r.more() {
		rest := r.buf[r.at:r.end]
		n := bytes.IndexByte(rest, '"')
		closed := n >= 0
		if !closed {
			n = len(rest)
		}
		r.here += bytes.Count(rest[:n], []byte{r.newline()})
		if err := r.take(n); err != nil {
			return err
		}
		if !closed {
			continue
		}
		r.at++
		if !r.more() || r.buf[r.at] != '"' {
			return nil
		}
		if err := r.take(1); err != nil {
			return err
		}
	}
	if r.in.err != nil {
		return r.ended()
	}
	return fault(line, "%w", errUnclosed)
}

// newline is what is counted to know the line within quotes.
func (r *reader) newline() byte {
	if r.lineEnds == cr {
		return '\r'
	}
	return '\n'
}

// take moves n bytes to r.text.
func (r *reader) take(n int) error {
	r.text = append(r.text, r.buf[r.at:r.at+n]...)
	r.at += n
	if len(r.text)+r.count > maxRecord {
		return fault(r.begin, "%w", errRecordLong)
	}
	return nil
}

// endLine reads the end of a line.
func (r *reader) endLine() error {
	ends := lf
	n := 1
	if r.buf[r.at] == '\r' {
		next := r.ahead(2)
		if string(next) == "\r\r" {
			next = r.ahead(3)
		}
		switch {
		case string(next) == "\r\n":
			n = 2
		case string(next) == "\r\r\n":
			n = 3
		case len(next) < 3 && len(bytes.Trim(next, "\r")) == 0 && r.in.err != nil:
			return r.ended() // what comes next would decide
		case len(next) == 1 && r.lineEnds == lf: // half of CR LF, where the file ends
		default:
			ends = cr
		}
	}
	switch {
	case r.lineEnds == unknown:
		r.lineEnds = ends
	case r.lineEnds == lf && ends == cr:
		return r.fault(errLoneCR)
	case r.lineEnds == cr && ends == lf:
		return r.fault(errLoneLF)
	}
	r.at += n
	r.line = r.here
	r.here++
	return nil
}

// more reports whether there is a byte to read, r.buf[r.at].
func (r *reader) more() bool {
	return r.at < r.end || len(r.ahead(1)) > 0
}

// ahead returns the next n bytes without reading them, or fewer if there are no more.
func (r *reader) ahead(n int) []byte {
	if r.end-r.at < n {
		r.end = copy(r.buf, r.buf[r.at:r.end])
		r.at = 0
		for r.end < n {
			got, err := r.in.Read(r.buf[r.end:])
			r.end += got
			if err != nil {
				break
			}
		}
	}
	return r.buf[r.at:min(r.at+n, r.end)]
}

// ended is why there is nothing more to read: [io.EOF], or an error of the source.
func (r *reader) ended() error {
	if r.in.err != nil {
		return fmt.Errorf("after line %d: %w", r.line, r.in.err)
	}
	return io.EOF
}

// fault is an error in the line that is read now.
func (r *reader) fault(err error) error {
	if r.here != r.begin {
		return fault(r.here, "%w (in the record that begins on line %d)", err, r.begin)
	}
	return fault(r.here, "%w", err)
}

// fieldLine is the line on which field i of the last record begins.
func (r *reader) fieldLine(i int) int { return r.lines[i] }

// checkText reports what keeps field i of the last record from being text.
func (r *reader) checkText(i int, s string) error {
	if strings.IndexByte(s, 0) < 0 && utf8.ValidString(s) {
		return nil
	}
	line := r.fieldLine(i)
	for at, c := range s {
		switch c {
		case rune(r.newline()):
			line++
		case 0:
			return fault(line, "field %d has a NUL byte, which Postgres can't keep in text", i+1)
		case utf8.RuneError:
			if _, size := utf8.DecodeRuneInString(s[at:]); size == 1 {
				return fault(line, "field %d is not UTF-8; the file may be in Windows-1252 or Latin-1, to be saved as UTF-8 first", i+1)
			}
		}
	}
	return nil
}

func fault(line int, format string, args ...any) error {
	return tasks.Permanent(fmt.Errorf("line %d: %w", line, fmt.Errorf(format, args...)))
}

// input is the source as the reader has it.
type input struct {
	ctx   context.Context
	r     io.Reader
	sum   maphash.Hash // of all bytes
	bytes int64
	// err is the first that is not io.EOF; next is one that came together with
	// bytes, to be returned after those.
	err, next error
}

// maxEmptyReads is how often in a row a source may return nothing and no error.
const maxEmptyReads = 100

func (in *input) Read(p []byte) (int, error) {
	if in.err == nil && in.ctx.Err() != nil {
		in.err = context.Cause(in.ctx)
	}
	if in.err == nil && in.next != nil {
		in.err = in.next
	}
	for range maxEmptyReads {
		if in.err != nil {
			return 0, in.err
		}
		n, err := in.r.Read(p)
		_, _ = in.sum.Write(p[:n])
		in.bytes += int64(n)
		switch {
		case err == nil && n > 0, errors.Is(err, io.EOF):
			return n, err
		case err != nil && n > 0:
			in.next = err
			return n, nil
		}
		in.err = err
	}
	in.err = io.ErrNoProgress
	return 0, in.err
}
