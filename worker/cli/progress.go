package cli

import (
	"bytes"
	"cmp"
	"encoding/json"
	"fmt"
	"io"
	"strconv"
	"strings"

	"github.com/carpool-go/carpool/tasks"
)

// progress shows the states of a job that is waited for, and what the job shows of its
// progress: on a terminal in one line that is drawn anew, elsewhere in a line for each
// change.
type progress struct {
	w io.Writer
	// width is how many runes fit into the line of a terminal; 0 for what is none.
	width int
}

const (
	eraseLine   = "\r\x1b[K"
	usualWidth  = 80
	barLength   = 24
	barDone     = "█"
	barUndone   = "░"
	progressKey = "progress" // as tasks.Job.Progress writes it
)

func (in *invocation) newProgress() *progress {
	p := &progress{w: in.stderr}
	if isTerminal(in.stderr) {
		columns, err := strconv.Atoi(in.Env("COLUMNS"))
		if err != nil || columns < 2 {
			columns = usualWidth
		}
		p.width = columns - 1 // in the last column the cursor would go to the next line
	}
	return p
}

// show shows how a job stands. It is called whenever that changes.
func (p *progress) show(job *tasks.Info) {
	var result map[string]json.RawMessage
	_ = json.Unmarshal(job.Result, &result) // what is no object shows no progress
	shown, has := result[progressKey]
	switch {
	case p.width > 0:
		text := []rune(printable(string(job.State) + progressText(shown)))
		fmt.Fprintf(p.w, "%s%s", eraseLine, string(text[:min(len(text), p.width)]))
	case has:
		fmt.Fprintf(p.w, "%s %s\n", job.State, shown)
	default:
		fmt.Fprintln(p.w, job.State)
	}
}

// end makes room for what is printed when the job has ended.
func (p *progress) end() {
	if p.width > 0 {
		fmt.Fprint(p.w, eraseLine)
	}
}

// progressText is a progress for people: its fields in their order, with a bar before them
// if one is the total of another. It is "" if there is none.
func progressText(data json.RawMessage) string {
	names, values, ok := fieldsInOrder(data)
	if !ok {
		if len(data) == 0 {
			return ""
		}
		return "  " + strings.Trim(string(data), `"`)
	}
	var text strings.Builder
	done, total := share(names, values)
	if total > 0 {
		part := min(max(done/total, 0), 1)
		n := int(part * barLength)
		fmt.Fprintf(&text, "  %s%s %3.0f%%", strings.Repeat(barDone, n), strings.Repeat(barUndone, barLength-n), 100*part)
	}
	for i, name := range names {
		fmt.Fprintf(&text, "  %s", fieldText(name, values[i]))
	}
	return text.String()
}

// share returns the numbers that make a bar: what a field called total, or all or of, says,
// and how much of it is done. total is 0 if there is none.
func share(names []string, values []any) (done, total float64) {
	number := func(called ...string) float64 {
		for i, name := range names {
			for _, c := range called {
				if name == c {
					n, _ := values[i].(json.Number)
					f, _ := n.Float64()
					return f
				}
			}
		}
		return 0
	}
	total = number("total", "all", "of")
	return cmp.Or(number("done", "current", "processed", "completed"), number("rows", "bytes")), total
}

func fieldText(name string, value any) string {
	switch v := value.(type) {
	case json.Number:
		if n, err := v.Int64(); err == nil && (name == "bytes" || strings.HasSuffix(name, "_bytes")) {
			return strings.TrimRight(byteText(n)+" "+strings.TrimSuffix(name, "bytes"), " _")
		}
		return name + " " + groupDigits(v.String())
	case string:
		return v
	}
	return fmt.Sprintf("%s %v", name, value)
}

// fieldsInOrder are the fields of a JSON object whose values are numbers, texts or booleans.
// ok is false if it is no object.
func fieldsInOrder(data json.RawMessage) (names []string, values []any, ok bool) {
	dec := json.NewDecoder(bytes.NewReader(data))
	dec.UseNumber()
	if t, err := dec.Token(); err != nil || t != json.Delim('{') {
		return nil, nil, false
	}
	for dec.More() {
		key, err := dec.Token()
		if err != nil {
			break
		}
		var value any
		if err := dec.Decode(&value); err != nil {
			break
		}
		switch value.(type) {
		case json.Number, string, bool:
			names, values = append(names, key.(string)), append(values, value)
		}
	}
	return names, values, true
}

// groupDigits is a whole number with a space between thousands.
func groupDigits(n string) string {
	if strings.ContainsAny(n, ".eE") {
		return n
	}
	for i := len(n) - 3; i > 0 && n[i-1] != '-'; i -= 3 {
		n = n[:i] + " " + n[i:]
	}
	return n
}

func byteText(n int64) string {
	const unit = 1024
	if n < unit {
		return fmt.Sprintf("%d B", n)
	}
	size, units := float64(n)/unit, "KMGTPE"
	for size >= unit && len(units) > 1 {
		size, units = size/unit, units[1:]
	}
	return fmt.Sprintf("%.1f %ciB", size, units[0])
}
