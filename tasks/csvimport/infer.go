package csvimport

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
)

// sheet is what the first pass learns of a file.
type sheet struct {
	delimiter byte
	columns   []inferredColumn
	rows      int64
	bytes     int64
	sum       uint64
}

// reportRows is how many rows go by between two looks at the clock.
const reportRows = 1000

// infer reads the file once, to its end. An empty delimiter is the one that the header
// shows. Where the header has several, the file is read once with each, and must agree
// with exactly one.
func (s *source) infer(ctx context.Context, delimiter string, report func(phase string, rows, bytes int64)) (*sheet, error) {
	var given byte
	if delimiter != "" {
		given = delimiter[0]
	}
	first := newReader(ctx, s.first, s.seed, given)
	header, err := readHeader(first)
	if err != nil {
		return nil, err
	}
	if first.delimiter != 0 {
		return inferRows(first, header, report)
	}
	// What comes from a URL must be in the file before it is read again.
	if _, err := io.Copy(io.Discard, &first.in); err != nil {
		return nil, first.ended()
	}
	var found []*sheet
	var agree, faults []string
	for _, c := range first.shown {
		r, err := s.again(ctx, c)
		if err != nil {
			return nil, err
		}
		if header, err = readHeader(r); err == nil {
			var read *sheet
			if read, err = inferRows(r, header, report); err == nil {
				found = append(found, read)
				agree = append(agree, fmt.Sprintf("%q", string(c)))
				continue
			}
		}
		if r.in.err != nil {
			return nil, err
		}
		faults = append(faults, fmt.Sprintf("read with %q, %v", string(c), err))
	}
	const choose = `the payload's "delimiter" can say what separates the fields`
	switch len(found) {
	case 0:
		return nil, fault(first.line, "the header shows no one delimiter; %s: %s", choose, strings.Join(faults, "; "))
	case 1:
		return found[0], nil
	default:
		return nil, fault(first.line, "every row agrees with each of the header's delimiters, %s; %s", strings.Join(agree, " and "), choose)
	}
}

// readHeader returns the names of the columns as they stand in the file.
func readHeader(r *reader) ([]string, error) {
	header, err := r.next()
	if errors.Is(err, io.EOF) {
		return nil, fault(1, "the file is empty; its first line must name the columns")
	}
	if err != nil {
		return nil, err
	}
	if r.count > maxColumns {
		return nil, fault(r.line, "%d columns, but Postgres allows a table %d", r.count, maxColumns)
	}
	for i, name := range header {
		if err := r.checkText(i, name); err != nil {
			return nil, err
		}
	}
	return header, nil
}

// inferRows reads what follows the header.
func inferRows(r *reader, header []string, report func(phase string, rows, bytes int64)) (*sheet, error) {
	found := &sheet{delimiter: r.delimiter, columns: make([]inferredColumn, len(header))}
	for i, name := range columnNames(header) {
		found.columns[i] = inferredColumn{name: name, fits: anyType}
	}
	for {
		record, err := r.next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return nil, err
		}
		found.rows++
		if found.rows%reportRows == 0 {
			report("reading", found.rows, r.in.bytes)
		}
		for i, value := range record {
			if value == "" {
				continue
			}
			column := &found.columns[i]
			column.used = true
			var types typeSet
			if column.fits != 0 {
				types = typesOf(value)
				if lost := column.fits &^ types; lost != 0 {
					column.misfit(lost, r.fieldLine(i))
				}
			}
			if types != 0 {
				continue // it is ASCII
			}
			if err := r.checkText(i, value); err != nil {
				return nil, err
			}
		}
	}
	found.bytes, found.sum = r.in.bytes, r.in.sum.Sum64()
	return found, nil
}
