// Package boot makes the bare guest into one that runs containers, which is
// what PID 1 does first, and acts on the machine for the agent.
package boot

import (
	"errors"
	"fmt"
	"log/slog"
	"math"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

const (
	// CgroupRoot is where cgroup v2 is mounted.
	CgroupRoot = "/sys/fs/cgroup"
	// ContainersCgroup is the cgroup of all containers; each has one below it,
	// called as the container is.
	ContainersCgroup = CgroupRoot + "/husk"

	agentCgroup = CgroupRoot + "/agent"
	moduleList  = "/lib/modules/load"
	maxFiles    = 1 << 20 // fs.nr_open's default: the most there can be
)

// Up sets the guest up and returns the agent's parameters. It is called once,
// first of all, by PID 1 on the initramfs.
func Up() (Params, error) {
	ignoreSignals()
	loadModules()
	if err := switchRoot(); err != nil {
		return Params{}, err
	}
	if err := mountAll(); err != nil {
		return Params{}, err
	}
	cmdline, err := os.ReadFile("/proc/cmdline")
	if err != nil {
		return Params{}, err
	}
	params, err := ParseParams(string(cmdline))
	if err != nil {
		return params, err
	}
	if err := setUpCgroups(); err != nil {
		return params, err
	}
	if err := protectAgent(); err != nil {
		return params, err
	}
	if err := loopbackUp(); err != nil {
		return params, err
	}
	return params, setLimits()
}

// ignoreSignals keeps what would end an ordinary process from ending this one.
// The signals are caught, not ignored: children would inherit the latter.
func ignoreSignals() {
	signal.Notify(make(chan os.Signal, 1),
		unix.SIGHUP, unix.SIGINT, unix.SIGQUIT, unix.SIGTERM, unix.SIGPIPE, unix.SIGUSR1, unix.SIGUSR2)
}

// loadModules loads the modules that the initramfs lists, in that order. A
// guest may do without one; what needs it says so later, so this only warns.
func loadModules() {
	list, err := os.ReadFile(moduleList)
	if err != nil {
		if !errors.Is(err, os.ErrNotExist) { // a kernel without modules
			slog.Warn("no list of kernel modules", "err", err)
		}
		return
	}
	for path := range strings.FieldsSeq(string(list)) {
		if !filepath.IsAbs(path) {
			path = filepath.Join(filepath.Dir(moduleList), path)
		}
		if err := loadModule(path); err != nil {
			slog.Warn("load kernel module", "path", path, "err", err)
		}
	}
}

func loadModule(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := unix.FinitModule(int(f.Fd()), "", 0); err != nil && err != unix.EEXIST {
		return err
	}
	return nil
}

// mountAll mounts the kernel's file systems. /run and /tmp need none: the root
// is a tmpfs itself.
func mountAll() error {
	for _, m := range []struct {
		fstype, target, options string
		flags                   uintptr
	}{
		{"proc", "/proc", "", unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC},
		{"sysfs", "/sys", "", unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC},
		{"devtmpfs", "/dev", "mode=0755", unix.MS_NOSUID},
		{"devpts", "/dev/pts", "newinstance,ptmxmode=0666,mode=0620,gid=5", unix.MS_NOSUID | unix.MS_NOEXEC},
		{"tmpfs", "/dev/shm", "mode=1777", unix.MS_NOSUID | unix.MS_NODEV},
		{"cgroup2", CgroupRoot, "nsdelegate", unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC},
	} {
		if err := os.MkdirAll(m.target, 0o755); err != nil {
			return err
		}
		if err := unix.Mount(m.fstype, m.target, m.fstype, m.flags, m.options); err != nil {
			return fmt.Errorf("mount %s on %s: %w", m.fstype, m.target, err)
		}
	}
	for dir, mode := range map[string]os.FileMode{"/run": 0o755, "/tmp": 0o777 | os.ModeSticky} {
		if err := os.MkdirAll(dir, mode); err != nil {
			return err
		}
		if err := os.Chmod(dir, mode); err != nil { // whatever the umask
			return err
		}
	}
	return nil
}

// setUpCgroups puts this process into a cgroup of its own, for a cgroup that
// delegates controllers has no processes, and delegates every controller to the
// containers' cgroup.
func setUpCgroups() error {
	for _, dir := range []string{agentCgroup, ContainersCgroup} {
		if err := os.Mkdir(dir, 0o755); err != nil {
			return err
		}
	}
	if err := os.WriteFile(agentCgroup+"/cgroup.procs", []byte("0"), 0); err != nil {
		return err
	}
	for _, dir := range []string{CgroupRoot, ContainersCgroup} {
		controllers, err := os.ReadFile(dir + "/cgroup.controllers")
		if err != nil {
			return err
		}
		var all []string
		for name := range strings.FieldsSeq(string(controllers)) {
			all = append(all, "+"+name)
		}
		if err := os.WriteFile(dir+"/cgroup.subtree_control", []byte(strings.Join(all, " ")), 0); err != nil {
			return fmt.Errorf("delegate cgroup controllers %s: %w", all, err)
		}
	}
	return nil
}

// loopbackUp sets the loopback interface up; the kernel gives it 127.0.0.1/8
// and ::1 then.
func loopbackUp() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("set loopback up: %w", err)
	}
	defer unix.Close(fd)
	req, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	req.SetUint16(unix.IFF_UP)
	if err := unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, req); err != nil {
		return fmt.Errorf("set loopback up: %w", err)
	}
	return nil
}

// setLimits sets the resource limits that containers get where they ask for
// none. The kernel's own are those of a machine as small as the guest; what a
// container may use is for its cgroup to say.
func setLimits() error {
	// As the kubelet has it on every node: what a program may use is its container's limit
	// to say. A guest with little memory would refuse large, sparse allocations.
	if err := os.WriteFile("/proc/sys/vm/overcommit_memory", []byte("1"), 0); err != nil {
		return fmt.Errorf("let memory be overcommitted: %w", err)
	}
	for resource, most := range map[int]uint64{
		unix.RLIMIT_NOFILE:     maxFiles,
		unix.RLIMIT_NPROC:      math.MaxUint64, // RLIM_INFINITY
		unix.RLIMIT_SIGPENDING: math.MaxUint64,
	} {
		if err := syscall.Setrlimit(resource, &syscall.Rlimit{Cur: most, Max: most}); err != nil {
			return fmt.Errorf("set resource limit %d: %w", resource, err)
		}
	}
	return nil
}
