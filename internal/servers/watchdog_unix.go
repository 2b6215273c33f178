//go:build unix

package servers

import (
	"fmt"
	"io"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
)

// watchdog is a small shell that outlives us when we are killed with -9: it ends the server, paused or not, and removes
// its temporary folder. It learns of our death from the end of its standard input, so it works on every unix. While we
// live it only keeps what we tell it.
type watchdog struct {
	cmd *exec.Cmd

	mu sync.Mutex
	in io.WriteCloser
}

// The folder to remove is $1 ("" = none), and further arguments are folders to remove after it if they are empty. Each line
// read is one of: "pid N" (0: none runs), "paused N N…", "empty FOLDER", "done".
const watchdogScript = `
trap '' HUP INT TERM
pid=0 paused=
while read -r word rest; do
	case $word in
	pid) pid=$rest ;;
	paused) paused=$rest ;;
	empty) set -- "$@" "$rest" ;;
	done) exit 0 ;;
	esac
done
for signal in INT QUIT KILL; do
	[ "$pid" -gt 0 ] || break
	kill -s $signal "$pid" 2>/dev/null || break
	for p in $pid $paused; do kill -s CONT "$p" 2>/dev/null; done
	n=0
	while [ $n -lt 50 ] && kill -s 0 "$pid" 2>/dev/null; do n=$((n+1)); sleep 0.1; done
done
n=0
while [ -n "$1" ] && [ -e "$1" ] && [ $n -lt 20 ]; do n=$((n+1)); rm -rf -- "$1" 2>/dev/null || sleep 0.1; done
shift
for folder; do rmdir -- "$folder" 2>/dev/null; done
`

func startWatchdog(temporary string) (*watchdog, error) {
	// The script goes through the environment: ps then shows one short line.
	cmd := exec.Command("/bin/sh", "-c", `eval "$CARPOOL_WATCHDOG"`, "carpool-watchdog", temporary)
	cmd.Env = append(os.Environ(), "CARPOOL_WATCHDOG="+watchdogScript)
	cmd.Dir = "/" // must not keep a folder busy that is to be removed
	detach(cmd, 0)
	in, err := cmd.StdinPipe()
	if err != nil {
		return nil, fmt.Errorf("start watchdog: %w", err)
	}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("start watchdog: %w", err)
	}
	return &watchdog{cmd: cmd, in: in}, nil
}

func (w *watchdog) tell(format string, args ...any) {
	w.mu.Lock()
	defer w.mu.Unlock()
	_, _ = fmt.Fprintf(w.in, format+"\n", args...)
}

// watch names the process to end; 0 is none.
func (w *watchdog) watch(pid int) { w.tell("pid %d", pid) }

// paused names the processes that would not hear a signal before they are continued.
func (w *watchdog) paused(pids []int) {
	var b strings.Builder
	for _, pid := range pids {
		b.WriteString(" " + strconv.Itoa(pid))
	}
	w.tell("paused%s", b.String())
}

// removeIfEmpty names folders, the innermost first, to be removed after the temporary one if nothing has come into them.
func (w *watchdog) removeIfEmpty(folders []string) {
	for _, folder := range folders {
		w.tell("empty %s", folder)
	}
}

// stop ends the watchdog; nothing is left for it to do.
func (w *watchdog) stop() {
	w.tell("done")
	_ = w.in.Close()
	_ = w.cmd.Wait()
}
