package main

import (
	"fmt"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"github.com/husk-containers/husk/test/rig/job"
	"golang.org/x/sys/unix"
)

const (
	cgroupDir = "/sys/fs/cgroup"
	outDir    = "/out"
	// openFiles is the limit of open files that systemd gives its services, the
	// hard one.
	openFiles = 512 * 1024
)

// hostModules give the machine what the rig is for; the kernel loads others as
// they are asked for.
func hostModules() []string {
	return []string{"kvm-amd", "vhost_vsock", "vhost_net", "vsock_loopback", "tun", "bridge", "veth", "nf_tables"}
}

// becomeHost does what a host's own init would have done by the time that
// somebody logs in.
func becomeHost(out bool) error {
	const safe = unix.MS_NOSUID | unix.MS_NODEV
	mounts := []mountPoint{
		{"devpts", "devpts", "/dev/pts", unix.MS_NOSUID | unix.MS_NOEXEC, "mode=620,ptmxmode=666,gid=5"},
		{"tmpfs", "shm", "/dev/shm", safe, "mode=1777"},
		{"mqueue", "mqueue", "/dev/mqueue", safe | unix.MS_NOEXEC, ""},
		{"tmpfs", "run", "/run", safe, "mode=755"},
		{"tmpfs", "tmp", "/tmp", safe, "mode=1777"},
		{"cgroup2", "cgroup2", cgroupDir, safe | unix.MS_NOEXEC, ""},
		{"ext4", "/dev/vda", "/scratch", 0, "noinit_itable,discard"},
	}
	if out {
		mounts = append(mounts, mountPoint{"virtiofs", job.OutTag, outDir, 0, ""})
	}
	if err := mountAll(mounts...); err != nil {
		return err
	}
	// As systemd has it: mounts reach the namespaces made later.
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_SHARED, ""); err != nil {
		return fmt.Errorf("share mounts: %w", err)
	}
	for name, target := range map[string]string{"fd": "fd", "stdin": "fd/0", "stdout": "fd/1", "stderr": "fd/2"} {
		if err := os.Symlink("/proc/self/"+target, "/dev/"+name); err != nil {
			return err
		}
	}
	if err := delegateControllers(); err != nil {
		return err
	}
	if err := loopbackUp(); err != nil {
		return err
	}
	if err := unix.Sethostname([]byte("rig")); err != nil {
		return fmt.Errorf("set host name: %w", err)
	}
	limit := syscall.Rlimit{Cur: openFiles, Max: openFiles}
	if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil {
		return fmt.Errorf("limit open files: %w", err)
	}
	modprobe := exec.Command("/sbin/modprobe", append([]string{"-a"}, hostModules()...)...)
	if out, err := modprobe.CombinedOutput(); err != nil {
		return fmt.Errorf("load the host's modules: %s: %w", strings.TrimSpace(string(out)), err)
	}
	return ownDevices()
}

// delegateControllers gives every cgroup controller to the root's children.
func delegateControllers() error {
	controllers, err := os.ReadFile(filepath.Join(cgroupDir, "cgroup.controllers"))
	if err != nil {
		return err
	}
	var enable strings.Builder
	for _, c := range strings.Fields(string(controllers)) {
		enable.WriteString("+" + c + " ")
	}
	return os.WriteFile(filepath.Join(cgroupDir, "cgroup.subtree_control"), []byte(enable.String()), 0)
}

// loopbackUp sets lo up; the kernel gives it its addresses.
func loopbackUp() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open socket: %w", err)
	}
	defer unix.Close(fd)
	ifreq, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	ifreq.SetUint16(unix.IFF_UP)
	if err := unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, ifreq); err != nil {
		return fmt.Errorf("set lo up: %w", err)
	}
	return nil
}

// ownDevices gives the devices of virtualization to the group kvm, and tun to
// everybody, as the rules of udev in Debian do.
func ownDevices() error {
	gid := 0
	if g, err := user.LookupGroup("kvm"); err == nil {
		if gid, err = strconv.Atoi(g.Gid); err != nil {
			return fmt.Errorf("look up group kvm: %w", err)
		}
	}
	for _, name := range []string{"/dev/kvm", "/dev/vhost-vsock", "/dev/vhost-net"} {
		if err := os.Chown(name, 0, gid); err != nil {
			return err
		}
		if err := os.Chmod(name, 0o660); err != nil {
			return err
		}
	}
	return os.Chmod("/dev/net/tun", 0o666)
}
