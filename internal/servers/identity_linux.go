package servers

import (
	"os"
	"os/exec"
	"os/user"
	"strconv"
	"syscall"
)

// identities lists whom Postgres may run as, the best first.
func identities() []identity {
	if os.Geteuid() != 0 {
		return []identity{{name: "as we are"}}
	}
	var ids []identity
	for _, name := range []string{"postgres", "nobody"} {
		uid, gid, ok := lookup(name)
		if !ok {
			continue
		}
		if len(ids) == 0 {
			ids = append(ids, inUserNamespace(name, uid, gid))
		}
		ids = append(ids, asUser(name, uid, gid))
	}
	return ids
}

func lookup(name string) (uid, gid int, ok bool) {
	u, err := user.Lookup(name)
	if err != nil {
		return 0, 0, false
	}
	uid, err = strconv.Atoi(u.Uid)
	if err != nil {
		return 0, 0, false
	}
	gid, err = strconv.Atoi(u.Gid)
	return uid, gid, err == nil
}

// inUserNamespace runs a program as root that believes it is somebody else: root is mapped to uid in a user namespace of
// its own. Files stay root's, so closed folders above it do no harm. uid must be one that /etc/passwd knows (initdb asks).
func inUserNamespace(name string, uid, gid int) identity {
	return identity{
		name: "in a user namespace as " + name,
		apply: func(cmd *exec.Cmd) {
			cmd.SysProcAttr = &syscall.SysProcAttr{
				Cloneflags:  syscall.CLONE_NEWUSER,
				UidMappings: []syscall.SysProcIDMap{{ContainerID: uid, HostID: os.Geteuid(), Size: 1}},
				GidMappings: []syscall.SysProcIDMap{{ContainerID: gid, HostID: os.Getegid(), Size: 1}},
			}
		},
		own: func(path string) error { return os.Lchown(path, os.Geteuid(), os.Getegid()) },
	}
}

// asUser runs a program with the credentials of another user, who must be able to search every folder above its files.
func asUser(name string, uid, gid int) identity {
	return identity{
		name: "as user " + name,
		apply: func(cmd *exec.Cmd) {
			cmd.SysProcAttr = &syscall.SysProcAttr{
				Credential: &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)},
			}
		},
		own: func(path string) error { return os.Lchown(path, uid, gid) },
	}
}
