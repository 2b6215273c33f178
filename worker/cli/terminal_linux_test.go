package cli

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"strings"
	"syscall"
	"testing"
	"unsafe"
)

// onTerminal passes a terminal to use, and returns what was written to it.
func onTerminal(t *testing.T, use func(terminal *os.File)) string {
	t.Helper()
	screen, err := os.OpenFile("/dev/ptmx", os.O_RDWR|syscall.O_NOCTTY, 0)
	if err != nil {
		t.Skip("this machine has no pseudo-terminals:", err)
	}
	defer screen.Close()
	var number, unlock int32
	control(t, screen, syscall.TIOCSPTLCK, &unlock)
	control(t, screen, syscall.TIOCGPTN, &number)
	terminal, err := os.OpenFile(fmt.Sprintf("/dev/pts/%d", number), os.O_RDWR|syscall.O_NOCTTY, 0)
	if err != nil {
		t.Skip("this machine has no pseudo-terminals:", err)
	}
	written := make(chan string)
	go func() {
		var text bytes.Buffer
		_, _ = io.Copy(&text, screen) // ends with an error when the terminal is closed
		written <- text.String()
	}()
	use(terminal)
	_ = terminal.Close()
	return strings.ReplaceAll(<-written, "\r\n", "\n")
}

func control(t *testing.T, file *os.File, request uintptr, value *int32) {
	t.Helper()
	raw, err := file.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	err = raw.Control(func(fd uintptr) {
		if _, _, errno := syscall.Syscall(syscall.SYS_IOCTL, fd, request, uintptr(unsafe.Pointer(value))); errno != 0 {
			t.Error(errno)
		}
	})
	if err != nil {
		t.Fatal(err)
	}
}

func TestStatus_HasColoursOnATerminalUnlessTheyAreNotWanted(t *testing.T) {
	t.Parallel()
	b := setup(t)
	for _, c := range []struct {
		env     string
		colours bool
	}{
		{"TERM=xterm", true},
		{"NO_COLOR=1", false},
		{"TERM=dumb", false},
	} {
		var code int
		got := onTerminal(t, func(terminal *os.File) {
			p := Program{Name: "worker", Env: environment(append([]string{c.env}, b.Env...))}
			code = p.Run(t.Context(), []string{"status"}, strings.NewReader(""), terminal, terminal)
		})
		if code != 0 || strings.Contains(got, string(red)+"no instance is up") != c.colours || strings.Contains(got, "\x1b") != c.colours {
			t.Errorf("%s: exit code %d, want colours: %t, in\n%q", c.env, code, c.colours, got)
		}
	}
	if stdout, stderr, _ := b.run(t, []string{"TERM=xterm"}, "status"); strings.Contains(stdout+stderr, "\x1b") {
		t.Errorf("where there is no terminal, there are colours:\n%q", stdout)
	}
}
