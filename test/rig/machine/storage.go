package machine

import (
	"context"
	"fmt"
	"net"
	"os"

	"golang.org/x/sys/unix"
)

// scratchSize in bytes, of which the host holds what is written.
const scratchSize = 16 << 30

// newScratch returns a disk with an empty ext4: a sparse file that has no name
// any more.
func newScratch(ctx context.Context, mkfs string) (*os.File, error) {
	f, err := os.CreateTemp("", "husk-rig-scratch-")
	if err != nil {
		return nil, fmt.Errorf("create scratch disk: %w", err)
	}
	err = os.Remove(f.Name())
	if err == nil {
		err = f.Truncate(scratchSize)
	}
	if err == nil {
		err = run(ctx, command{
			path: mkfs,
			// The file reads as zeroes: nothing needs to be written over.
			args:  []string{"-q", "-F", "-m", "0", "-E", "nodiscard,lazy_itable_init=1,lazy_journal_init=1", fdPath(3)},
			files: []*os.File{f},
		})
	}
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("make scratch disk in %s: %w", os.TempDir(), err)
	}
	return f, nil
}

// A share is a host directory that the machine sees by virtio-fs.
type share struct {
	dir string
	// readOnly holds whatever the machine does: the file systems are read-only
	// for the process that serves them.
	readOnly bool
}

// serve starts virtiofsd and returns the other end of its socket, for QEMU.
func (s share) serve(virtiofsd string) (*process, *os.File, error) {
	listener, client, err := vhostUserSocket()
	if err != nil {
		return nil, nil, err
	}
	defer listener.Close()
	c := command{path: virtiofsd, files: []*os.File{listener}}
	if c.args, err = s.arguments(); err == nil {
		if s.readOnly {
			c.prepare = makeReadOnly
		}
		var p *process
		if p, err = start(c); err == nil {
			return p, client, nil
		}
	}
	client.Close()
	return nil, nil, fmt.Errorf("share %s: %w", s.dir, err)
}

// arguments of virtiofsd. Both the C and the Rust one know these. Without
// namespaces it is a single process; seeing all of / there is nothing to lock it
// out of. Files that the host changes meanwhile are seen late or never.
func (s share) arguments() ([]string, error) {
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		return nil, fmt.Errorf("look up limit of open files: %w", err)
	}
	cache := "auto"
	if s.readOnly {
		cache = "always"
	}
	return []string{
		"--fd=3",
		// It holds a descriptor for each file that the machine remembers, and may
		// not be allowed to raise the hard limit.
		fmt.Sprintf("--rlimit-nofile=%d", min(limit.Max, 1<<20)),
		"-o", "source=" + s.dir, "-o", "cache=" + cache, "-o", "sandbox=chroot",
	}, nil
}

// makeReadOnly gives the thread a mount namespace of its own where everything is
// read-only.
func makeReadOnly() error {
	if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
		return fmt.Errorf("make mount namespace: %w", err)
	}
	attr := unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY}
	if err := unix.MountSetattr(unix.AT_FDCWD, "/", unix.AT_RECURSIVE, &attr); err != nil {
		return fmt.Errorf("make mounts read-only: %w", err)
	}
	return nil
}

// vhostUserSocket returns a listening socket with a connection to it waiting to
// be accepted. Its address is abstract and leaves no file; with a backlog of 0
// there is room for that one connection only.
func vhostUserSocket() (listener, client *os.File, err error) {
	var files [2]*os.File
	for i := range files {
		fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return nil, nil, fmt.Errorf("open socket: %w", err)
		}
		files[i] = os.NewFile(uintptr(fd), "vhost-user")
	}
	listener, client = files[0], files[1]
	defer func() {
		if err != nil {
			listener.Close()
			client.Close()
		}
	}()
	fd := int(listener.Fd())
	if err := unix.Bind(fd, &unix.SockaddrUnix{}); err != nil { // to an address of the kernel's choice
		return nil, nil, fmt.Errorf("bind socket: %w", err)
	}
	if err := unix.Listen(fd, 0); err != nil {
		return nil, nil, fmt.Errorf("listen on socket: %w", err)
	}
	addr, err := unix.Getsockname(fd)
	if err != nil {
		return nil, nil, fmt.Errorf("look up socket's address: %w", err)
	}
	if err := unix.Connect(int(client.Fd()), addr); err != nil {
		return nil, nil, fmt.Errorf("connect to own socket: %w", err)
	}
	return listener, client, nil
}

// socketPair returns two connected sockets, the guest's for QEMU.
func socketPair() (host net.Conn, guest *os.File, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("make socket pair: %w", err)
	}
	guest = os.NewFile(uintptr(fds[0]), "guest")
	file := os.NewFile(uintptr(fds[1]), "host")
	defer file.Close()
	if host, err = net.FileConn(file); err != nil {
		guest.Close()
		return nil, nil, fmt.Errorf("use socket pair: %w", err)
	}
	return host, guest, nil
}
