package csvimport

import (
	"bytes"
	"regexp"
)

// signatures are how files begin that are taken for CSV by mistake, and what they are.
var signatures = []struct{ begins, what string }{
	{"\xff\xfe\x00\x00", "UTF-32; save it as UTF-8"},
	{"\x00\x00\xfe\xff", "UTF-32; save it as UTF-8"},
	{"\xff\xfe", "UTF-16; save it as UTF-8"},
	{"\xfe\xff", "UTF-16; save it as UTF-8"},
	{"PK\x03\x04", "a ZIP archive or an XLSX or ODS workbook; unpack it, or save the sheet as CSV"},
	{"PK\x05\x06", "an empty ZIP archive"},
	{"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an XLS workbook; save the sheet as CSV"},
	{"\x1f\x8b", "gzip; unpack it"},
	{"BZh", "bzip2; unpack it"},
	{"\xfd7zXZ\x00", "xz; unpack it"},
	{"\x28\xb5\x2f\xfd", "Zstandard; unpack it"},
	{"7z\xbc\xaf\x27\x1c", "a 7z archive; unpack it"},
	{"Rar!\x1a\x07", "a RAR archive; unpack it"},
	{"%PDF-", "a PDF"},
	{"{\\rtf", "an RTF document"},
	{"PAR1", "Parquet"},
	{"ARROW1", "an Arrow file"},
	{"SQLite format 3\x00", "an SQLite database"},
	{"PGCOPY\n\xff\r\n\x00", "the binary format of COPY"},
	{"PGDMP", "a dump of pg_dump"},
	{"version https://git-lfs.github.com/spec/", "a pointer of Git LFS; the content is in the LFS store"},
}

// markup and jsonText are matched after white space.
var (
	markup   = regexp.MustCompile(`^<([!?]|/?[A-Za-z])`)
	jsonText = regexp.MustCompile(`^(\{\s*["}]|\[\s*["{\[\]]|[\[{]\s*[\r\n])`)
)

// orQuoted is the way out for a header that begins as these do.
const orQuoted = "; if it is CSV, its first name must be in quotes"

// foreign says what a file is, by its first bytes, if it is nothing that holds CSV in UTF-8.
// It returns "" for everything it doesn't know.
func foreign(head []byte) string {
	for _, s := range signatures {
		if bytes.HasPrefix(head, []byte(s.begins)) {
			return s.what
		}
	}
	text := bytes.TrimLeft(head, " \t\r\n")
	switch {
	case markup.Match(text):
		return "HTML or XML" + orQuoted
	case jsonText.Match(text):
		return "JSON" + orQuoted
	case len(head) >= 4 && (head[0] == 0) != (head[1] == 0) && (head[0] == 0) == (head[2] == 0) && (head[1] == 0) == (head[3] == 0):
		return "UTF-16 without a byte order mark; save it as UTF-8"
	}
	return ""
}
