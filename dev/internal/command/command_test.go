package command

import (
	"bytes"
	"errors"
	"strings"
	"testing"
)

func TestParse_ReadsTheOptions(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		args []string
		want Options
	}{
		{nil, Options{Install: true}},
		{[]string{"-once", "-data", "kept", "-install=false"}, Options{Once: true, Data: "kept"}},
	} {
		var said bytes.Buffer
		got, _, ok := Parse(test.args, &said)
		if !ok || got != test.want || said.Len() > 0 {
			t.Errorf("%q: %+v, %t, %q; want %+v", test.args, got, ok, said.String(), test.want)
		}
	}
}

func TestParse_RefusesWhatItDoesNotUnderstand(t *testing.T) {
	t.Parallel()
	for _, args := range [][]string{{"-twice"}, {"once"}} {
		var said bytes.Buffer
		if _, code, ok := Parse(args, &said); ok || code != 2 || !strings.Contains(said.String(), args[0]) {
			t.Errorf("%q: exit %d, %q; want 2 and its name", args, code, said.String())
		}
	}
	var said bytes.Buffer
	if _, code, ok := Parse([]string{"-help"}, &said); ok || code != 0 || !strings.Contains(said.String(), "DATABASE_URL") {
		t.Errorf("-help: exit %d, %q", code, said.String())
	}
}

func TestExitCode_ToBeStoppedIsAFaultOnlyOfWhatRunsOnce(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		opts Options
		err  error
		want int
	}{
		{Options{}, nil, 0},
		{Options{}, ErrStopped, 0},
		{Options{Once: true}, ErrStopped, 1},
		{Options{}, errors.New("broken"), 1},
		{Options{}, errors.Join(ErrStopped, errors.New("broken")), 1},
	} {
		var said bytes.Buffer
		if got := test.opts.ExitCode(test.err, &said); got != test.want || (said.Len() > 0) != (got != 0) {
			t.Errorf("%+v, %v: exit %d, %q; want %d", test.opts, test.err, got, said.String(), test.want)
		}
	}
}
