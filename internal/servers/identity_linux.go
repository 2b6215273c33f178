package servers

import (
	"os"
	"os/exec"
	"os/user"
	"slices"
	"strconv"
	"syscall"
)

// identities lists whom Postgres may run as, the best first.
func identities() []identity {
	if os.Geteuid() != 0 {
		return []identity{{name: "as we are"}}
	}
	var inNamespace, asUsers, throughClosed []identity
	for _, name := range []string{"postgres", "nobody"} {
		uid, gid, ok := lookup(name)
		if !ok {
			continue
		}
		if len(inNamespace) == 0 {
			inNamespace = append(inNamespace, inUserNamespace(name, uid, gid))
		}
		asUsers = append(asUsers, asUser(name, uid, gid))
		throughClosed = append(throughClosed, throughClosedFolders(name, uid, gid))
	}
	return slices.Concat(inNamespace, asUsers, throughClosed)
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

// throughClosedFolders is asUser for files below a folder that the user may not enter, such as /root: the program keeps
// root's right to pass by permissions, and no other. A container that forbids user namespaces usually grants it.
func throughClosedFolders(name string, uid, gid int) identity {
	const capDACOverride = 1 // CAP_DAC_OVERRIDE in linux/capability.h
	id := asUser(name, uid, gid)
	id.name = "through closed folders as " + name
	id.apply = func(cmd *exec.Cmd) {
		cmd.SysProcAttr = &syscall.SysProcAttr{
			Credential:  &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)},
			AmbientCaps: []uintptr{capDACOverride},
		}
		// The capability is in effect only once a program has been executed, so a shell is, which enters the folder.
		cmd.Args = append([]string{"sh", "-c", `cd "$0" && exec "$@"`, cmd.Dir, cmd.Path}, cmd.Args[1:]...)
		cmd.Path, cmd.Dir = "/bin/sh", "/"
	}
	return id
}

// ownerOf is whom a file or folder belongs to, for giving other things to the same owner, as only root can.
func ownerOf(path string) (identity, error) {
	if os.Geteuid() != 0 {
		return identity{}, nil
	}
	info, err := os.Lstat(path)
	if err != nil {
		return identity{}, err
	}
	stat := info.Sys().(*syscall.Stat_t)
	return identity{own: func(path string) error { return os.Lchown(path, int(stat.Uid), int(stat.Gid)) }}, nil
}
