package servers

import (
	"os"
	"syscall"
)

// temporaryRoot is where temporary servers live: in memory where there is plenty, since making a database takes a disk a
// hundred milliseconds or more and memory ten. Who sets TMPDIR has it their way. Empty is the system's own.
func temporaryRoot() string {
	const (
		memory = "/dev/shm"
		tmpfs  = 0x01021994 // TMPFS_MAGIC in linux/magic.h
		plenty = 4 << 30    // bytes; write-ahead log alone may take a quarter of it
	)
	var fs syscall.Statfs_t
	if os.Getenv("TMPDIR") != "" || syscall.Statfs(memory, &fs) != nil ||
		int64(fs.Type) != tmpfs || fs.Bavail*uint64(fs.Bsize) < plenty {
		return ""
	}
	return memory
}
