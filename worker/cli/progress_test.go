package cli

import (
	"bytes"
	"strings"
	"testing"

	"github.com/carpool-go/carpool/tasks"
)

func TestProgress_OnATerminalIsOneLineThatIsDrawnAnew(t *testing.T) {
	t.Parallel()
	var out bytes.Buffer
	p := &progress{w: &out, width: 40}
	p.show(&tasks.Info{State: tasks.StatePending})
	p.show(&tasks.Info{State: tasks.StateActive, Result: []byte(`{"progress": {"rows": 1234567}}`)})
	p.show(&tasks.Info{State: tasks.StateActive, Result: []byte(`{"progress": "` + strings.Repeat("x", 100) + `"}`)})
	p.end()
	want := "\r\x1b[Kpending\r\x1b[Kactive  rows 1 234 567\r\x1b[Kactive  " + strings.Repeat("x", 32) + "\r\x1b[K"
	if out.String() != want {
		t.Errorf("got  %q\nwant %q", out.String(), want)
	}
}

func TestProgress_ElsewhereIsALineForEachChange(t *testing.T) {
	t.Parallel()
	var out bytes.Buffer
	p := (&invocation{stderr: &out}).newProgress()
	p.show(&tasks.Info{State: tasks.StatePending})
	p.show(&tasks.Info{State: tasks.StateActive, Result: []byte(`{"progress": {"rows": 1234567}}`)})
	p.show(&tasks.Info{State: tasks.StateActive, Result: []byte(`"a result"`)})
	p.end()
	if want := "pending\nactive {\"rows\": 1234567}\nactive\n"; out.String() != want {
		t.Errorf("got  %q\nwant %q", out.String(), want)
	}
}

func TestProgressText_ShowsFieldsInTheirOrderAndABarOfWhatIsKnown(t *testing.T) {
	t.Parallel()
	for progress, want := range map[string]string{
		``:     "",
		`42`:   "  42",
		`"on"`: "  on",
		`{"phase": "loading", "rows": 12000, "bytes": 3500000}`: "  loading  rows 12 000  3.3 MiB",
		`{"sent_bytes": 999, "rate": 0.5, "dry": true}`:         "  999 B sent  rate 0.5  dry true",
		`{"done": 6, "total": 12}`:                              "  ████████████░░░░░░░░░░░░  50%  done 6  total 12",
		`{"rows": 3, "total": 2}`:                               "  ████████████████████████ 100%  rows 3  total 2",
		`{"done": 0, "total": 2}`:                               "  ░░░░░░░░░░░░░░░░░░░░░░░░   0%  done 0  total 2",
		`{"deleted": -1234, "of": {"more": 1}}`:                 "  deleted -1 234",
	} {
		if got := progressText([]byte(progress)); got != want {
			t.Errorf("%s\ngot  %q\nwant %q", progress, got, want)
		}
	}
}

func TestProgress_CanNotMoveTheCursor(t *testing.T) {
	t.Parallel()
	var out bytes.Buffer
	(&progress{w: &out, width: 40}).show(&tasks.Info{State: tasks.StateActive, Result: []byte(`{"progress": "\u001b[2J\n"}`)})
	if got := strings.TrimPrefix(out.String(), eraseLine); strings.ContainsAny(got, "\x1b\n") {
		t.Errorf("it shows %q", got)
	}
}
