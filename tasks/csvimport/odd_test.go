package csvimport_test

import (
	"strings"
	"testing"

	"github.com/carpool-go/carpool/tasks"
	"github.com/carpool-go/carpool/tasks/csvimport"
)

// oddFile is a file as people have them, and the one right thing that comes of it.
type oddFile struct {
	name, content string
	delimiter     string
	allowEmpty    bool
	// wanted is the table: its columns, then its rows in the file's order, or error the
	// end of the error. An empty string in a row is shown as it is, NULL as NULL.
	wanted []string
	error  string
}

func TestImport_OddFiles(t *testing.T) {
	t.Parallel()
	for subject, files := range oddFiles() {
		t.Run(subject, func(t *testing.T) {
			t.Parallel()
			i := newImports(t)
			for _, file := range files {
				t.Run(file.name, func(t *testing.T) { i.checkOdd(t, file) })
			}
		})
	}
}

// checkOdd imports a file in the place of a table, which stays if the file is refused.
func (i *imports) checkOdd(t *testing.T, file oddFile) {
	i.exec(t, "DROP TABLE IF EXISTS imports.t")
	i.exec(t, "CREATE TABLE imports.t AS SELECT 'good' AS old")
	before := i.table(t)
	result, err := i.runWith(t, csvimport.Import{Mode: "replace", Delimiter: file.delimiter, AllowEmpty: file.allowEmpty}, file.content)
	if file.error != "" {
		if err == nil || err.Error() != "file:///t.csv: "+file.error || !tasks.IsPermanent(err) {
			t.Errorf("error %v, permanent %t; want a permanent one:\nfile:///t.csv: %s", err, tasks.IsPermanent(err), file.error)
		}
		want(t, "table", i.table(t), before)
		return
	}
	if err != nil {
		t.Fatal(err)
	}
	got := append([]string{types(result)}, i.rows(t, "SELECT * FROM imports.t ORDER BY ctid")...)
	want(t, "table", got, file.wanted)
}

// oddFiles are files by what is odd about them.
func oddFiles() map[string][]oddFile {
	return map[string][]oddFile{
		"line ends": {
			{name: "LF", content: "a,b\n1,x\n2,y\n", wanted: []string{"a bigint, b text", "1|x", "2|y"}},
			{name: "CR LF", content: "a,b\r\n1,x\r\n2,y\r\n", wanted: []string{"a bigint, b text", "1|x", "2|y"}},
			{name: "CR", content: "a,b\r1,x\r2,y\r", wanted: []string{"a bigint, b text", "1|x", "2|y"}},
			{name: "CR, none at the end", content: "a,b\r1,x\r2,y", wanted: []string{"a bigint, b text", "1|x", "2|y"}},
			{name: "CR, empty lines", content: "\r\ra,b\r\r1,x\r\r", wanted: []string{"a bigint, b text", "1|x"}},
			{name: "CR CR LF, of turning LF into CR LF twice", content: "a,b\r\r\n1,x\r\r\n", wanted: []string{"a bigint, b text", "1|x"}},
			{name: "LF and CR LF", content: "a,b\n1,x\r\n2,y\n", wanted: []string{"a bigint, b text", "1|x", "2|y"}},
			{name: "none at the end", content: "a,b\n1,x", wanted: []string{"a bigint, b text", "1|x"}},
			{name: "none at the end, after a delimiter", content: "a,b\n1,", wanted: []string{"a bigint, b text", "1|NULL"}},
			{name: "cut amid CR LF", content: "a,b\r\n1,x\r", wanted: []string{"a bigint, b text", "1|x"}},
			{name: "LF, then CR", content: "a,b\n1,x\r2,y\n", error: "line 2: a carriage return outside quotes, in a file whose lines end with a line feed"},
			{name: "CR LF, then CR", content: "a,b\r\n1,x\r2,y\r\n", error: "line 2: a carriage return outside quotes, in a file whose lines end with a line feed"},
			{name: "CR, then LF", content: "a,b\r1,x\n2,y\r", error: "line 2: a line feed outside quotes, in a file whose lines end with a carriage return"},
			{name: "CR, then CR LF", content: "a,b\r1,x\r\n", error: "line 2: a line feed outside quotes, in a file whose lines end with a carriage return"},
			{name: "CR within a field", content: "a,b\n1,x\ry\n", error: "line 2: a carriage return outside quotes, in a file whose lines end with a line feed"},
			{name: "CR in quotes, LF", content: "a,b\n1,\"x\ry\"\n", wanted: []string{"a bigint, b text", "1|x\ry"}},
			{name: "CR LF in quotes, LF", content: "a,b\n1,\"x\r\ny\"\n", wanted: []string{"a bigint, b text", "1|x\r\ny"}},
			{name: "LF in quotes, CR LF", content: "a,b\r\n1,\"x\ny\"\r\n", wanted: []string{"a bigint, b text", "1|x\ny"}},
			{name: "LF and CR LF in quotes, CR", content: "a,b\r1,\"x\ny\r\nz\"\r", wanted: []string{"a bigint, b text", "1|x\ny\r\nz"}},
			{name: "CR in the quotes of the header, LF", content: "\"a\rz\",b\n1,x\n", wanted: []string{"a_z bigint, b text", "1|x"}},
			{name: "CR and LF in the quotes of the header, CR", content: "\"a\r\nz\",b\r1,x\r", wanted: []string{"a_z bigint, b text", "1|x"}},
			{name: "the line of a fault, CR", content: "a,b\r1,\"x\ry\"\r2\r", error: "line 4: 1 fields, but the header has 2"},
			{name: "a form feed, a vertical tab, NEL, LS", content: "a\n1\f2\v3\u00854\u20285\n", wanted: []string{"a text", "1\f2\v3\u00854\u20285"}},
		},
		"empty lines": {
			{name: "before, amid and after", content: "\n\r\na,b\n\n1,x\n\r\n2,y\n\n", wanted: []string{"a bigint, b text", "1|x", "2|y"}},
			{name: "of one column are empty fields, as COPY has them", content: "a\n1\n\n2\n", wanted: []string{"a bigint", "1", "NULL", "2"}},
			{name: "of one column, quoted", content: "a\n1\n\"\"\n2\n", wanted: []string{"a bigint", "1", "NULL", "2"}},
			{name: "of blanks, one column", content: "a\n1\n  \n", wanted: []string{"a text", "1", "  "}},
			{name: "of blanks", content: "a,b\n1,x\n  \n", error: "line 3: 1 fields, but the header has 2"},
			{name: "of delimiters", content: "a,b\n1,x\n,\n", wanted: []string{"a bigint, b text", "1|x", "NULL|NULL"}},
		},
		"encodings": {
			{name: "UTF-8", content: "naïve,名\n1,Grüße 世界 😀\n", wanted: []string{"naïve bigint, 名 text", "1|Grüße 世界 😀"}},
			{name: "UTF-8 with a BOM", content: "\uFEFFid,b\n1,x\n", wanted: []string{"id bigint, b text", "1|x"}},
			{name: "a BOM before a quote", content: "\uFEFF\"id\",\"b\"\n1,x\n", wanted: []string{"id bigint, b text", "1|x"}},
			{name: "two BOMs", content: "\uFEFF\uFEFFid,b\n1,x\n", wanted: []string{"id bigint, b text", "1|x"}},
			{name: "a BOM and nothing else", content: "\uFEFF", error: "line 1: the file is empty; its first line must name the columns"},
			{name: "a BOM amid, of files put together", content: "a\n1\n\uFEFFa\n2\n", wanted: []string{"a text", "1", "\uFEFFa", "2"}},
			{name: "UTF-16, little end first", content: "\xff\xfea\x00,\x00b\x00\n\x00", error: "line 1: the file is no CSV, but looks like UTF-16; save it as UTF-8"},
			{name: "UTF-16, big end first", content: "\xfe\xff\x00a\x00,\x00b\x00\n", error: "line 1: the file is no CSV, but looks like UTF-16; save it as UTF-8"},
			{name: "UTF-16 without a BOM", content: "a\x00,\x00b\x00\n\x00", error: "line 1: the file is no CSV, but looks like UTF-16 without a byte order mark; save it as UTF-8"},
			{name: "UTF-16 without a BOM, big end first", content: "\x00a\x00,\x00b\x00\n", error: "line 1: the file is no CSV, but looks like UTF-16 without a byte order mark; save it as UTF-8"},
			{name: "UTF-32", content: "\xff\xfe\x00\x00a\x00\x00\x00", error: "line 1: the file is no CSV, but looks like UTF-32; save it as UTF-8"},
			{name: "Latin-1", content: "city,n\nM\xfcnchen,1\n", error: "line 2: field 1 is not UTF-8; the file may be in Windows-1252 or Latin-1, to be saved as UTF-8 first"},
			{name: "Latin-1 in the header", content: "gr\xf6\xdfe,n\nx,1\n", error: "line 1: field 1 is not UTF-8; the file may be in Windows-1252 or Latin-1, to be saved as UTF-8 first"},
			{name: "Latin-1 after the first thousand rows", content: "a,b\n" + strings.Repeat("1,x\n", 1000) + "1,\x80\n", error: "line 1002: field 2 is not UTF-8; the file may be in Windows-1252 or Latin-1, to be saved as UTF-8 first"},
			{name: "Latin-1 within quotes, CR", content: "a,b\r1,\"x\r\ny\r\x80\"\r", error: "line 4: field 2 is not UTF-8; the file may be in Windows-1252 or Latin-1, to be saved as UTF-8 first"},
			{name: "a surrogate in UTF-8", content: "a\n\xed\xa0\x80\n", error: "line 2: field 1 is not UTF-8; the file may be in Windows-1252 or Latin-1, to be saved as UTF-8 first"},
			{name: "U+FFFD, the loss of another program", content: "a\nM\uFFFDnchen\n", wanted: []string{"a text", "M\uFFFDnchen"}},
			{name: "a NUL byte", content: "a,b\n1,x\n2,y\x00\n", error: "line 3: field 2 has a NUL byte, which Postgres can't keep in text"},
			{name: "NUL bytes after the end, of a full disk", content: "a,b\n1,x\n\x00\x00\x00\x00", error: "line 3: 1 fields, but the header has 2"},
			{name: "the end of a file of DOS", content: "a,b\r\n1,x\r\n\x1a", error: "line 3: 1 fields, but the header has 2"},
			{name: "a non-breaking space", content: "a\n1\u00a0000\n", wanted: []string{"a text", "1\u00a0000"}},
		},
		"quotes": {
			{name: "everywhere", content: "\"a\",\"b\"\n\"1\",\"x\"\n", wanted: []string{"a bigint, b text", "1|x"}},
			{name: "twice, delimiters, line ends", content: "a,b\n1,\"say \"\"hi\"\", now\nthen\"\n", wanted: []string{"a bigint, b text", "1|say \"hi\", now\nthen"}},
			{name: "nothing but a quote", content: "a,b\n1,\"\"\"\"\n", wanted: []string{"a bigint, b text", "1|\""}},
			{name: "empty", content: "a,b\n1,\"\"\n", wanted: []string{"a bigint, b text", "1|NULL"}},
			{name: "amid a field", content: "a,b\n1,12\" pipe\n", error: "line 2: a quote in a field that does not begin with one; such a field is put in quotes, and each quote in it written twice"},
			{name: "after a blank", content: "a, b\n1, \"x\"\n", error: "line 2: a quote in a field that does not begin with one; such a field is put in quotes, and each quote in it written twice"},
			{name: "before a blank", content: "a,b\n\"1\" ,x\n", error: "line 2: text after a field's closing quote; a quote within a field is written twice"},
			{name: "after a backslash, as MySQL writes them", content: "a,b\n1,\"say \\\"hi\\\"\"\n", error: "line 2: text after a field's closing quote; a quote within a field is written twice"},
			{name: "never closed", content: "a,b\n1,x\n2,\"y\n3,z\n", error: "line 3: the quote that begins a field here is never closed"},
			{name: "never closed, in the header", content: "a,\"b\n1,x\n", error: "line 1: the quote that begins a field here is never closed"},
			{name: "closed by that of another line", content: "a,b\n1,\"x\n2,y\n3,\"z\"\n", error: "line 4: text after a field's closing quote; a quote within a field is written twice (in the record that begins on line 2)"},
			{name: "single", content: "'a','b'\n'1','x, y'\n", error: "line 2: 3 fields, but the header has 2"},
			{name: "typographic", content: "a,b\n1,“x”\n", wanted: []string{"a bigint, b text", "1|“x”"}},
			{name: "backslashes are data", content: "a,b\n\\N,C:\\new\\t\n\\.,\\\\\n", wanted: []string{"a text, b text", "\\N|C:\\new\\t", "\\.|\\\\"}},
			{name: "the end of COPY's data is data", content: "a\n\\.\nx\n", wanted: []string{"a text", "\\.", "x"}},
			{name: "a backslash before the last", content: "a,b\n1,\"C:\\dir\\\"\n", wanted: []string{"a bigint, b text", "1|C:\\dir\\"}},
			{name: "too many", content: "a,b\n1,\"\"x\"\"\n", error: "line 2: text after a field's closing quote; a quote within a field is written twice"},
			{name: "apostrophes", content: "a,b\nthe 'x' of y,it's\n", wanted: []string{"a text, b text", "the 'x' of y|it's"}},
			{name: "around much", content: "a,b\n1,\"" + strings.Repeat("x,\n", 50_000) + "\"\n", wanted: []string{"a bigint, b text", "1|" + strings.Repeat("x,\n", 50_000)}},
			{name: "blanks stay", content: "a,b\n1, x \n2,\" y \"\n", wanted: []string{"a bigint, b text", "1| x ", "2| y "}},
		},
		"delimiters": {
			{name: "semicolons", content: "a;b;c\n1;2,5;x\n", wanted: []string{"a bigint, b text, c text", "1|2,5|x"}},
			{name: "tabs", content: "a\tb\n1\tx, y; z\n", wanted: []string{"a bigint, b text", "1|x, y; z"}},
			{name: "pipes", content: "a|b\n1|x,y\n", wanted: []string{"a bigint, b text", "1|x,y"}},
			{name: "pipes, CR", content: "a|b\r1|x\r", wanted: []string{"a bigint, b text", "1|x"}},
			{name: "semicolons and quotes", content: "\"a\";\"b, c\"\n\"1\";\"x;y\"\n", wanted: []string{"a bigint, b_c text", "1|x;y"}},
			{name: "sep=", content: "sep=;\na;b\n1;x\n", wanted: []string{"a bigint, b text", "1|x"}},
			{name: "sep= in quotes, CR LF, a BOM", content: "\uFEFF\"SEP=|\"\r\na|b\r\n1|x\r\n", wanted: []string{"a bigint, b text", "1|x"}},
			{name: "sep=, as long as the table is wide", content: "sep=,,,\na,b,c\n1,2,3\n", wanted: []string{"a bigint, b bigint, c bigint", "1|2|3"}},
			{name: "sep= decides what the header leaves open", content: "sep=,\na,b;c\n1,2;3\n", wanted: []string{"a bigint, b_c text", "1|2;3"}},
			{name: "sep= and a fault", content: "sep=;\na;b\n1\n", error: "line 3: 1 fields, but the header has 2"},
			{name: "sep= against the payload", content: "sep=;\na;b\n1;x\n", delimiter: ",", error: `line 1: the file says that its delimiter is ";", and the payload that it is ","`},
			{name: "sep= of nothing", content: "sep=\na,b\n1,x\n", error: "line 1: it begins with sep= as if to name a delimiter, but none that is one ASCII character"},
			{name: "sep= of a word", content: "sep=tab\na,b\n1,x\n", error: "line 1: it begins with sep= as if to name a delimiter, but none that is one ASCII character"},
			{name: "the payload's", content: "a^b\n1^x\n", delimiter: "^", wanted: []string{"a bigint, b text", "1|x"}},
			{name: "the payload's, against the header", content: "a;b\n1;x\n", delimiter: ",", wanted: []string{"a_b text", "1;x"}},
			{name: "Hive's", content: "a\x01b\n1\x01x\n", delimiter: "\x01", wanted: []string{"a bigint, b text", "1|x"}},
			{name: "blanks", content: "a b\n1 x\n", delimiter: " ", wanted: []string{"a bigint, b text", "1|x"}},
			{name: "two in the header, one in the rows", content: "id;name, first\n1;Ada\n2;Bob\n", wanted: []string{"id bigint, name_first text", "1|Ada", "2|Bob"}},
			{name: "two in the header, the other in the rows", content: "size (m|l),n\nx,1\n", wanted: []string{"size_m_l text, n bigint", "x|1"}},
			{name: "two in all rows", content: "Betrag, EUR;Datum\n1,50;2024-01-01\n", error: `line 1: every row agrees with each of the header's delimiters, "," and ";"; the payload's "delimiter" can say what separates the fields`},
			{name: "two in the header, the payload's", content: "Betrag, EUR;Datum\n1,50;2024-01-01\n", delimiter: ";", wanted: []string{"betrag_eur text, datum date", "1,50|2024-01-01"}},
			{name: "two in the header, neither in all rows", content: "a,b;c\n1,2;3\n1\n", error: `line 1: the header shows no one delimiter; the payload's "delimiter" can say what separates the fields: read with ",", line 3: 1 fields, but the header has 2; read with ";", line 3: 1 fields, but the header has 2`},
			{name: "another in the rows than in the header", content: "a,b\n1;x\n", error: "line 2: 1 fields, but the header has 2"},
			{name: "not in all rows", content: "a;b\n1;x\n2,y\n", error: `line 3: 1 fields, but the header has 2, separated by ";" as it shows; the payload's "delimiter" can say otherwise`},
			{name: "one column and a semicolon", content: "note\nx\ny; z\n", error: `line 3: ";" outside quotes, but the header names one column; the payload's "delimiter" can say that it separates fields, or that something else does, such as ","`},
			{name: "one column and a semicolon after quotes", content: "note\n\"x\";\"y\"\n", error: `line 2: ";" outside quotes, but the header names one column; the payload's "delimiter" can say that it separates fields, or that something else does, such as ","`},
			{name: "one column and a comma", content: "note\nx\ny, z\n", error: "line 3: 2 fields, but the header has 1"},
			{name: "one column and a semicolon, the payload's", content: "note\nx\ny; z\n", delimiter: ",", wanted: []string{"note text", "x", "y; z"}},
			{name: "one column and a semicolon in quotes", content: "note\nx\n\"y; z\"\n", wanted: []string{"note text", "x", "y; z"}},
			{name: "after a backslash", content: "a|b\n1|x \\| y\n", error: `line 2: 3 fields, but the header has 2, separated by "|" as it shows; the payload's "delimiter" can say otherwise`},
			{name: "a title above", content: "Report of 2024\n\na;b;c\n1;2;3\n", error: `line 3: ";" outside quotes, but the header names one column; the payload's "delimiter" can say that it separates fields, or that something else does, such as ","`},
			{name: "a title above, commas", content: "Report of 2024\n\na,b,c\n1,2,3\n", error: "line 3: 3 fields, but the header has 1"},
			{name: "a line of dashes below the header", content: "a | b\n--+--\n1 | x\n", error: `line 2: 1 fields, but the header has 2, separated by "|" as it shows; the payload's "delimiter" can say otherwise`},
		},
		"what is no CSV": {
			{name: "HTML", content: "<!DOCTYPE html>\n<html><body>Please sign in</body></html>\n", error: "line 1: the file is no CSV, but looks like HTML or XML; if it is CSV, its first name must be in quotes"},
			{name: "HTML after blanks and a BOM", content: "\uFEFF\r\n  <HTML>\n", error: "line 1: the file is no CSV, but looks like HTML or XML; if it is CSV, its first name must be in quotes"},
			{name: "XML", content: "<?xml version=\"1.0\"?>\n<Error><Code>AccessDenied</Code></Error>\n", error: "line 1: the file is no CSV, but looks like HTML or XML; if it is CSV, its first name must be in quotes"},
			{name: "JSON", content: "{\"error\": \"no such file\"}\n", error: "line 1: the file is no CSV, but looks like JSON; if it is CSV, its first name must be in quotes"},
			{name: "JSON, indented", content: "{\n  \"a\": 1\n}\n", error: "line 1: the file is no CSV, but looks like JSON; if it is CSV, its first name must be in quotes"},
			{name: "an array", content: "[{\"a\": 1}]\n", error: "line 1: the file is no CSV, but looks like JSON; if it is CSV, its first name must be in quotes"},
			{name: "an empty array", content: "[]", error: "line 1: the file is no CSV, but looks like JSON; if it is CSV, its first name must be in quotes"},
			{name: "XLSX", content: "PK\x03\x04\x14\x00", error: "line 1: the file is no CSV, but looks like a ZIP archive or an XLSX or ODS workbook; unpack it, or save the sheet as CSV"},
			{name: "XLS", content: "\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1\x00", error: "line 1: the file is no CSV, but looks like an XLS workbook; save the sheet as CSV"},
			{name: "gzip", content: "\x1f\x8b\x08\x00", error: "line 1: the file is no CSV, but looks like gzip; unpack it"},
			{name: "PDF", content: "%PDF-1.7\n1,2\n", error: "line 1: the file is no CSV, but looks like a PDF"},
			{name: "Parquet", content: "PAR1\x15\x04", error: "line 1: the file is no CSV, but looks like Parquet"},
			{name: "a pointer of Git LFS", content: "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n", error: "line 1: the file is no CSV, but looks like a pointer of Git LFS; the content is in the LFS store"},
			{name: "names with < in a header", content: "< 5 um,\"<b>\",<=9\n1,2,3\n", wanted: []string{"_5_um bigint, b bigint, _9 bigint", "1|2|3"}},
			{name: "names like markup, in quotes", content: "\"<a>\",\"{\"\"b\"\"}\"\n1,x\n", wanted: []string{"a bigint, b text", "1|x"}},
			{name: "names in brackets", content: "[id],{name}\n1,x\n", wanted: []string{"id bigint, name text", "1|x"}},
			{name: "names like signatures", content: "BM,PK,GIF\n1,2,3\n", wanted: []string{"bm bigint, pk bigint, gif bigint", "1|2|3"}},
			{name: "markup in a field", content: "a,b\n1,<b>x</b>\n", wanted: []string{"a bigint, b text", "1|<b>x</b>"}},
		},
		"nothing": {
			{name: "at all", content: "", error: "line 1: the file is empty; its first line must name the columns"},
			{name: "but empty lines", content: "\n\n\r\n", error: "line 1: the file is empty; its first line must name the columns"},
			{name: "but a header", content: "a,b\n", error: `the file has a header and no rows; the payload's "allow_empty" takes it all the same`},
			{name: "but a header, and empty lines", content: "a,b\n\n\n", error: `the file has a header and no rows; the payload's "allow_empty" takes it all the same`},
			{name: "but a line of an error", content: "Service Unavailable", error: `the file has a header and no rows; the payload's "allow_empty" takes it all the same`},
			{name: "but sep=", content: "sep=;\n", error: "line 1: the file is empty; its first line must name the columns"},
			{name: "but a header, and that may be", content: "a,b\n", allowEmpty: true, wanted: []string{"a text, b text"}},
			{name: "but a header without a line end, and that may be", content: "a", allowEmpty: true, wanted: []string{"a text"}},
		},
		"headers": {
			{name: "twice the same", content: "id,id,ID\n1,2,3\n", wanted: []string{"id bigint, id_2 bigint, id_3 bigint", "1|2|3"}},
			{name: "twice the same, and the next name is there", content: "a,a,a_2\n1,2,3\n", wanted: []string{"a bigint, a_3 bigint, a_2 bigint", "1|2|3"}},
			{name: "without names", content: ",x,\n1,2,3\n", wanted: []string{"column_1 bigint, x bigint, column_3 bigint", "1|2|3"}},
			{name: "blanks and signs", content: "First Name, Price (€) ,%,a/b\nx,1,2,3\n", wanted: []string{"first_name text, price bigint, column_3 bigint, a_b bigint", "x|1|2|3"}},
			{name: "numbers", content: "2020,2021\n1,2\n", wanted: []string{"_2020 bigint, _2021 bigint", "1|2"}},
			{name: "words of SQL", content: "select,order,user,table\n1,2,3,4\n", wanted: []string{"select bigint, order bigint, user bigint, table bigint", "1|2|3|4"}},
			{name: "Postgres' own names", content: "ctid,xmin,oid\n1,2,3\n", wanted: []string{"ctid_2 bigint, xmin_2 bigint, oid bigint", "1|2|3"}},
			{name: "too long", content: strings.Repeat("x", 70) + "," + strings.Repeat("x", 80) + "\n1,2\n", wanted: []string{strings.Repeat("x", 63) + " bigint, " + strings.Repeat("x", 61) + "_2 bigint", "1|2"}},
			{name: "line ends", content: "\"first\nname\",b\n1,x\n", wanted: []string{"first_name bigint, b text", "1|x"}},
			{name: "an attempt", content: "\"a\"\"; DROP TABLE t; --\",b\n1,x\n", wanted: []string{"a_drop_table_t bigint, b text", "1|x"}},
			{name: "a comment", content: "# id,b\n1,x\n", wanted: []string{"id bigint, b text", "1|x"}},
		},
		"widths": {
			{name: "too short", content: "a,b\n1,x\n2\n", error: "line 3: 1 fields, but the header has 2"},
			{name: "too long", content: "a,b\n1,x\n2,y,z\n", error: "line 3: 3 fields, but the header has 2"},
			{name: "a comma at the end of each row, not of the header", content: "a,b\n1,x,\n", error: "line 2: 3 fields, but the header has 2"},
			{name: "a comma at the end of each line", content: "a,b,\n1,x,\n", wanted: []string{"a bigint, b text, column_3 text", "1|x|NULL"}},
			{name: "a comma at the end of the header", content: "a,b,\n1,x\n", error: "line 2: 2 fields, but the header has 3"},
			{name: "a comma at the end of the first row alone", content: "a,b\n1,x,\n2,y\n", error: "line 2: 3 fields, but the header has 2"},
			{name: "an index without a name", content: ",a\n0,x\n1,y\n", wanted: []string{"column_1 bigint, a text", "0|x", "1|y"}},
			{name: "a total below", content: "a,b\n1,x\nTotal: 1\n", error: "line 3: 1 fields, but the header has 2"},
			{name: "cut amid a row", content: "a,b,c\n1,x,y\n2,", error: "line 3: 2 fields, but the header has 3"},
			{name: "cut amid quotes", content: "a,b\n1,\"x", error: "line 2: the quote that begins a field here is never closed"},
		},
		"values": {
			{name: "thousands separators", content: "a,b\n\"1,234\",1 234\n\"2,345.50\",2'345\n", wanted: []string{"a text, b text", "1,234|1 234", "2,345.50|2'345"}},
			{name: "decimal commas", content: "a;b\n1,5;2\n", wanted: []string{"a text, b bigint", "1,5|2"}},
			{name: "currency, percent, accounting's minus", content: "a,b,c\n$1.50,50%,(3)\n", wanted: []string{"a text, b text, c text", "$1.50|50%|(3)"}},
			{name: "leading zeros, a plus, blanks", content: "zip,phone,n\n00501,+49123, 7\n", wanted: []string{"zip text, phone text, n text", "00501|+49123| 7"}},
			{name: "integers beyond a double, and a fraction", content: "id\n9007199254740993\n1.5\n", wanted: []string{"id text", "9007199254740993", "1.5"}},
			{name: "integers beyond a bigint", content: "id\n9223372036854775808\n", wanted: []string{"id text", "9223372036854775808"}},
			{name: "more digits than a double has", content: "x\n3.14159265358979323846\n", wanted: []string{"x text", "3.14159265358979323846"}},
			{name: "exponents", content: "x,gene\n1e-7,2E5\n2.5,MARCH1\n", wanted: []string{"x double precision, gene text", "1e-07|2E5", "2.5|MARCH1"}},
			{name: "NaN, inf", content: "x\n1.5\nNaN\ninf\n", wanted: []string{"x text", "1.5", "NaN", "inf"}},
			{name: "words for nothing", content: "a,b,c,d\nNULL,NA,n/a,-\n", wanted: []string{"a text, b text, c text, d text", "NULL|NA|n/a|-"}},
			{name: "booleans", content: "a,b,c,d\ntrue,TRUE,yes,1\nfalse,False,no,0\n", wanted: []string{"a boolean, b boolean, c text, d bigint", "t|t|yes|1", "f|f|no|0"}},
			{name: "dates", content: "a,b,c,d\n2024-02-29,02/03/2024,29.02.2024,2024-02-30\n", wanted: []string{"a date, b text, c text, d text", "2024-02-29|02/03/2024|29.02.2024|2024-02-30"}},
			{name: "times without a zone", content: "a,b\n2024-02-29 10:00:00,10:00\n", wanted: []string{"a text, b text", "2024-02-29 10:00:00|10:00"}},
			{name: "a date that Excel has no day for", content: "a,b\n1900-02-29,0000-00-00\n", wanted: []string{"a text, b text", "1900-02-29|0000-00-00"}},
			{name: "formulas", content: "a,b\n=1+1,@x\n", wanted: []string{"a text, b text", "=1+1|@x"}},
			{name: "JSON in a field", content: "a,b\n1,\"{\"\"x\"\": [1, 2]}\"\n", wanted: []string{"a bigint, b text", `1|{"x": [1, 2]}`}},
			{name: "the last row decides", content: "a\n" + strings.Repeat("1\n", 3000) + "x\n", wanted: append(append([]string{"a text"}, strings.Split(strings.TrimSuffix(strings.Repeat("1\n", 3000), "\n"), "\n")...), "x")},
			{name: "files put together, headers and all", content: "a,b\n1,x\na,b\n2,y\n", wanted: []string{"a text, b text", "1|x", "a|b", "2|y"}},
		},
	}
}
