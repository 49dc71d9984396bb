package boot

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/husk-containers/husk/agent/module"
	agentv1 "github.com/husk-containers/husk/protocols/agent/v1"
)

// everybodys are devices that udev lets everybody open, for their drivers ask for a
// privilege where one is needed. The kernel's own mode is 0600 for them.
func everybodys(name string) bool { return name == "fuse" || name == "net/tun" }

// MakeDevice makes the node of a device that this machine has, with mode and owner
// of its node in /dev. The module that brings it is loaded first if need be.
func (Machine) MakeDevice(d agentv1.Device) error {
	if err := makeDevice(d, d.Node()); err != nil {
		return fmt.Errorf("make device %s: %w", number(d), err)
	}
	return nil
}

func number(d agentv1.Device) string { return fmt.Sprintf("%c %d:%d", d.Kind, d.Major, d.Minor) }

func makeDevice(d agentv1.Device, path string) error {
	name, err := deviceName(d)
	if errors.Is(err, fs.ErrNotExist) {
		class := map[byte]string{'c': "char", 'b': "block"}[d.Kind]
		if err = module.Load(module.Dir, fmt.Sprintf("%s-major-%d-%d", class, d.Major, d.Minor)); err == nil || errdefs.IsNotFound(err) {
			name, err = deviceName(d)
		}
	}
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("the guest has no such device, whatever the host has: %w", errdefs.ErrNotFound)
	}
	if err != nil {
		return err
	}
	var st unix.Stat_t
	if err := unix.Stat(filepath.Join("/dev", name), &st); err != nil {
		return fmt.Errorf("stat /dev/%s: %w", name, err)
	}
	mode := st.Mode & 0o777
	if everybodys(name) {
		mode = 0o666
	}
	kind := map[byte]uint32{'c': unix.S_IFCHR, 'b': unix.S_IFBLK}[d.Kind]
	if err := os.MkdirAll(filepath.Dir(path), 0o711); err != nil {
		return err
	}
	if err := unix.Mknod(path, kind|mode, int(unix.Mkdev(d.Major, d.Minor))); err != nil && err != unix.EEXIST {
		return err
	}
	if err := os.Lchown(path, int(st.Uid), int(st.Gid)); err != nil {
		return err
	}
	return unix.Chmod(path, mode)
}

// deviceName is the name of a device below /dev; fs.ErrNotExist where there is no
// such device.
func deviceName(d agentv1.Device) (string, error) {
	class := map[byte]string{'c': "char", 'b': "block"}[d.Kind]
	data, err := os.ReadFile(fmt.Sprintf("/sys/dev/%s/%d:%d/uevent", class, d.Major, d.Minor))
	if err != nil {
		return "", err
	}
	for line := range strings.Lines(string(data)) {
		if name, ok := strings.CutPrefix(strings.TrimSpace(line), "DEVNAME="); ok {
			return name, nil
		}
	}
	return "", fs.ErrNotExist
}
