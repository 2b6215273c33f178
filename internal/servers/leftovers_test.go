//go:build unix

package servers

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
)

// helperEnv makes this test program a parent of servers, for a test to kill.
const helperEnv = "CARPOOL_SERVERS_TEST_PARENT"

func TestMain(m *testing.M) {
	if how := os.Getenv(helperEnv); how != "" {
		if from, cache, download := strings.Cut(how, " into "); download {
			_, _ = postgresDownload{cache: cache, from: from}.fetch(context.Background(), io.Discard)
			os.Exit(1)
		}
		beParent(how)
	}
	goleak.VerifyTestMain(m)
}

// family is what a parent says of its servers.
type family struct {
	PIDs []int    // servers, their sessions, watchdogs
	Dirs []string // temporary folders
}

// beParent starts both servers, tells of them on standard output, and waits to be killed.
func beParent(how string) {
	ctx, cancel := context.WithTimeout(context.Background(), giveUp)
	defer cancel()
	must := func(err error) {
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
	}
	pg, err := StartPostgres(ctx, PostgresConfig{})
	must(err)
	r, err := StartRedis(ctx, RedisConfig{AppendFsync: "always"})
	must(err)
	sessions, err := children(pg.server.pid())
	must(err)
	f := family{
		PIDs: append(sessions, pg.server.pid(), pg.home.dog.cmd.Process.Pid, r.server.pid(), r.home.dog.cmd.Process.Pid),
		Dirs: []string{pg.home.dir, r.home.dir},
	}
	switch how {
	case "paused":
		must(pg.Pause())
		must(r.Pause())
	case "without watchdogs":
		for _, dog := range []*watchdog{pg.home.dog, r.home.dog} {
			must(dog.cmd.Process.Kill())
			_, _ = dog.cmd.Process.Wait()
		}
	}
	must(json.NewEncoder(os.Stdout).Encode(f))
	select {}
}

func TestServers_EndWithFilesAndAllWhenTheirParentIsKilled(t *testing.T) {
	t.Parallel()
	for _, how := range []string{"running", "paused", "without watchdogs"} {
		t.Run(how, func(t *testing.T) {
			t.Parallel()
			parent := exec.Command(os.Args[0])
			parent.Env = append(os.Environ(), helperEnv+"="+how)
			parent.Stderr = os.Stderr
			out, err := parent.StdoutPipe()
			if err != nil {
				t.Fatal(err)
			}
			if err := parent.Start(); err != nil {
				t.Fatal(err)
			}
			line, err := bufio.NewReader(out).ReadBytes('\n')
			if err != nil {
				t.Fatal(err)
			}
			var f family
			if err := json.Unmarshal(line, &f); err != nil {
				t.Fatal(err)
			}
			if len(f.PIDs) < 6 {
				t.Fatalf("processes %v: want two servers, two watchdogs, and Postgres's own", f.PIDs)
			}
			if err := parent.Process.Signal(syscall.SIGKILL); err != nil {
				t.Fatal(err)
			}
			_ = parent.Wait()
			if how == "without watchdogs" {
				waitUntilGone(t, f.PIDs) // by the kernel's death signal alone; it removes no files
				for _, dir := range f.Dirs {
					_ = os.RemoveAll(dir)
				}
				return
			}
			waitUntilGone(t, f.PIDs, f.Dirs...)
		})
	}
}

// pids lists the server's processes and its watchdog.
func (p *Postgres) pids(t *testing.T) []int {
	t.Helper()
	sessions, err := children(p.server.pid())
	if err != nil {
		t.Fatal(err)
	}
	return append(sessions, p.server.pid(), p.home.dog.cmd.Process.Pid)
}

// pids lists the server's process and its watchdog.
func (r *Redis) pids() []int { return []int{r.server.pid(), r.home.dog.cmd.Process.Pid} }

func waitUntilGone(t *testing.T, pids []int, dirs ...string) {
	t.Helper()
	deadline := time.Now().Add(giveUp)
	for _, pid := range pids {
		for alive(pid) {
			if time.Now().After(deadline) {
				t.Errorf("process %d is still there: %s", pid, commandLine(pid))
				break
			}
			time.Sleep(10 * time.Millisecond)
		}
	}
	for _, dir := range dirs {
		for exists(dir) {
			if time.Now().After(deadline) {
				t.Errorf("folder %s is still there", dir)
				break
			}
			time.Sleep(10 * time.Millisecond)
		}
	}
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}

// alive says whether a process runs. One that has ended, but that nobody waited for, does not.
func alive(pid int) bool {
	state, err := exec.Command("ps", "-o", "stat=", "-p", strconv.Itoa(pid)).Output()
	return err == nil && !bytes.HasPrefix(bytes.TrimSpace(state), []byte("Z"))
}

func commandLine(pid int) []byte {
	line, _ := exec.Command("ps", "-o", "stat=,args=", "-p", strconv.Itoa(pid)).CombinedOutput()
	return bytes.TrimSpace(line)
}
