package volume

import (
	"fmt"
	"io/fs"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/husk-containers/husk/virtcontainers/spec"
)

// A Kind is the way by which a volume reaches the guest.
type Kind int

// The kinds.
const (
	// Shared by virtio-fs: live, in both directions.
	Shared Kind = iota + 1
	// Copied into the guest's memory, and kept there as it is on the host.
	Copied
	// Memory: a tmpfs of the guest in place of an empty one of the host.
	Memory
	// HugePages: a hugetlbfs of the guest in place of the host's.
	HugePages
	// Device: the guest's device node of the same number.
	Device
	// Devices: a directory of the guest's device nodes.
	Devices
	// Socket: one of the guest's whose connections are carried to the host's.
	Socket
)

// facts are what a source is. They, not its name, decide what becomes of it.
type facts struct {
	mode fs.FileMode
	// rdev of a device.
	major, minor uint32
	// fstype is statfs's f_type.
	fstype int64
	// devtmpfs has the f_type of tmpfs.
	devtmpfs bool
	// fresh: it is a tmpfs that somebody has made for others to fill.
	fresh bool
	// atomic: it has the layout that the kubelet's atomic writer leaves.
	atomic bool
}

// sizeless are the file systems whose files tell no size, so that a guest reads them
// as empty.
var sizeless = map[int64]string{
	unix.PROC_SUPER_MAGIC: "proc", unix.CGROUP_SUPER_MAGIC: "cgroup", unix.CGROUP2_SUPER_MAGIC: "cgroup2",
	unix.DEBUGFS_MAGIC: "debugfs", unix.TRACEFS_MAGIC: "tracefs", unix.SECURITYFS_MAGIC: "securityfs", unix.BPF_FS_MAGIC: "bpf",
}

// anyones is the mode of a directory in which everybody may make files. The kernel
// gives it to the root of a tmpfs.
const anyones = 0o777

// hostsOwn are directories of the host that may be such a tmpfs, and are the host's.
var hostsOwn = []string{"/dev/shm", "/run", "/tmp", "/var/tmp"}

// kindOf decides. Its errors say what the source is.
func kindOf(b *spec.Bind, f facts) (Kind, error) {
	if b.Socket && f.mode&fs.ModeSocket == 0 {
		return 0, fmt.Errorf("is not a unix socket, as the mount's type uds wants it: %w", errdefs.ErrInvalidArgument)
	}
	switch {
	case f.mode&fs.ModeSocket != 0:
		return Socket, nil
	case f.mode&fs.ModeNamedPipe != 0:
		return 0, fmt.Errorf("is a fifo, which connects no process of a guest with one of the host: use a unix socket: %w", errdefs.ErrNotImplemented)
	case f.mode&fs.ModeCharDevice != 0:
		if !spec.StaticChar(int64(f.major), int64(f.minor)) {
			return 0, fmt.Errorf("is the host's character device %d:%d, which a guest does not have: %w", f.major, f.minor, errdefs.ErrNotImplemented)
		}
		return Device, nil
	case f.mode&fs.ModeDevice != 0:
		return 0, fmt.Errorf("is the host's block device %d:%d, which a guest does not have: %w", f.major, f.minor, errdefs.ErrNotImplemented)
	case f.mode.IsRegular():
		if b.Role != spec.Volume {
			return Copied, nil
		}
		return Shared, nil
	case !f.mode.IsDir():
		return 0, fmt.Errorf("is neither a directory nor a file (%s): %w", f.mode, errdefs.ErrInvalidArgument)
	}
	switch {
	case f.devtmpfs:
		return Devices, nil
	case f.fstype == unix.HUGETLBFS_MAGIC:
		return HugePages, nil
	case f.fresh:
		return Memory, nil
	}
	if name, ok := sizeless[f.fstype]; ok {
		return 0, fmt.Errorf("is a %s file system of the host, whose files cannot be shared with a guest: %w", name, errdefs.ErrNotImplemented)
	}
	if b.ReadOnly && f.atomic {
		return Copied, nil
	}
	return Shared, nil
}
