package csvimport

import (
	"bytes"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/carpool-go/carpool/outbound"
	"github.com/carpool-go/carpool/tasks"
)

// noRoomEnv makes TestNoRoom do something, in a process of its own, whose disk it spoils.
const noRoomEnv = "CARPOOL_CSVIMPORT_NO_ROOM"

// The ways in which a disk may have no room.
const (
	fullDisk   = "a full disk"
	fileLimit  = "a limit on the size of files"
	noFolder   = "no folder"
	isNoFolder = "no folder but a file"
)

// TestNoRoom is what the processes of TestSource_AWorkersDiskWithoutRoom… run.
func TestNoRoom(t *testing.T) {
	const most = 256 << 10
	dir := os.TempDir()
	var err error
	switch os.Getenv(noRoomEnv) {
	case "":
		return
	case fullDisk:
		err = syscall.Mount("tmpfs", dir, "tmpfs", 0, fmt.Sprintf("size=%d", most))
	case fileLimit:
		err = syscall.Setrlimit(syscall.RLIMIT_FSIZE, &syscall.Rlimit{Cur: most, Max: most})
	case noFolder:
		err = os.Remove(dir)
	case isNoFolder:
		if err = os.Remove(dir); err == nil {
			err = os.WriteFile(dir, nil, 0o600)
		}
	}
	if err != nil {
		t.Fatal(err)
	}
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		_, _ = io.WriteString(w, "a\n")
		_, _ = w.Write(bytes.Repeat([]byte("1\n"), most))
	}))
	defer server.Close()
	guard, err := outbound.New("127.0.0.1")
	if err != nil {
		t.Fatal(err)
	}
	src, err := Importer{}.open(outbound.NewContext(t.Context(), guard), server.URL)
	if err == nil {
		_, err = src.infer(t.Context(), "", func(string, int64, int64) {})
		src.close()
	}
	fmt.Printf("permanent %t: %v\n", tasks.IsPermanent(err), err)
	if left, err := os.ReadDir(dir); err == nil {
		fmt.Printf("left behind: %d\n", len(left))
	}
}

func TestSource_AWorkersDiskWithoutRoomIsSaidForGoodAndNothingIsKept(t *testing.T) {
	t.Parallel()
	const noRoom, unfit = "has no room for a copy of the file in %s: %s; make room there, or set TMPDIR", "can't keep a copy of the file in %s: %s; set TMPDIR"
	for how, want := range map[string]struct {
		text   string
		reason syscall.Errno
		kept   bool // whether there is a folder to look at afterwards
	}{
		fullDisk:   {noRoom, syscall.ENOSPC, true},
		fileLimit:  {noRoom, syscall.EFBIG, true},
		noFolder:   {unfit, syscall.ENOENT, false},
		isNoFolder: {unfit, syscall.ENOTDIR, false},
	} {
		t.Run(how, func(t *testing.T) {
			t.Parallel()
			dir := filepath.Join(t.TempDir(), "own")
			if err := os.Mkdir(dir, 0o700); err != nil {
				t.Fatal(err)
			}
			cmd := exec.Command(os.Args[0], "-test.run=^TestNoRoom$")
			cmd.Env = append(os.Environ(), noRoomEnv+"="+how, "TMPDIR="+dir)
			if how == fullDisk {
				cmd.SysProcAttr = &syscall.SysProcAttr{
					Cloneflags:  syscall.CLONE_NEWUSER | syscall.CLONE_NEWNS,
					UidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getuid(), Size: 1}},
					GidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getgid(), Size: 1}},
				}
			}
			var out bytes.Buffer
			cmd.Stdout, cmd.Stderr = &out, &out
			if err := cmd.Start(); err != nil && how == fullDisk {
				t.Skipf("this system allows no file system of one's own: %v", err)
			} else if err != nil {
				t.Fatal(err)
			}
			if err := cmd.Wait(); err != nil {
				t.Fatalf("%v\n%s", err, &out)
			}
			text := fmt.Sprintf(want.text, dir, want.reason.Error())
			if said := out.String(); !strings.Contains(said, "permanent true: ") || !strings.Contains(said, text) ||
				strings.Contains(said, "carpool-import") || want.kept != strings.Contains(said, "left behind: 0\n") {
				t.Errorf("want %q, nothing left behind and no name of the copy in\n%s", text, said)
			}
		})
	}
}

// A quota can't be had without a file system that has them.
func TestSpoolError_AQuotaIsAFullDiskAndATroubledOneIsTriedAgain(t *testing.T) {
	t.Parallel()
	for errno, permanent := range map[syscall.Errno]bool{syscall.EDQUOT: true, syscall.EROFS: true, syscall.EACCES: true, syscall.EIO: false, syscall.EMFILE: false} {
		if err := spoolError(&os.PathError{Op: "write", Path: "/hush", Err: errno}); tasks.IsPermanent(err) != permanent || strings.Contains(err.Error(), "hush") {
			t.Errorf("%v: %v, permanent %t", errno, err, tasks.IsPermanent(err))
		}
	}
}
