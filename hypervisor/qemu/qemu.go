// Package qemu boots virtual machines with QEMU: a pure command line, an
// unprivileged process that gets everything as a descriptor, and one supervisor
// that knows why it ended.
package qemu

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/husk-containers/husk/hypervisor"
	"github.com/husk-containers/husk/hypervisor/channel"
	"github.com/husk-containers/husk/hypervisor/qemu/memory"
	"github.com/husk-containers/husk/hypervisor/qemu/qmp"
	"github.com/husk-containers/husk/hypervisor/qemu/vcpu"
	"github.com/husk-containers/husk/hypervisor/virtiofs"
	"github.com/husk-containers/husk/internal/child"
	"github.com/husk-containers/husk/internal/hostcheck"
)

// releaseStep bounds one step of giving back what a VM holds.
const releaseStep = 5 * time.Second

// Options says how VMs are run on this host.
type Options struct {
	// Path of qemu-system-x86_64.
	Path string
	// Accelerator is "auto", "kvm" or "tcg". Auto is KVM where it is usable.
	Accelerator string
	// CPUModel is QEMU's; empty means the best that the accelerator has.
	CPUModel string
	// Channels are the ways to the guest that are allowed, in order of
	// preference: "vhost-vsock", "virtio-serial".
	Channels []string
	// User that QEMU runs as, by name or uid; not root. Empty means a uid of its
	// own for each VM.
	User string
	// Machine type; "q35".
	Machine string
	// FreePageReporting has the guest tell which of its memory is free, and the host
	// take that back.
	FreePageReporting bool
	// Virtiofsd is its path; empty means the usual places.
	Virtiofsd string
	// VirtiofsdCache is "auto", "always" or "never".
	VirtiofsdCache string
	// VirtiofsdThreads is how many requests of a guest are served at once; zero
	// serves them one by one.
	VirtiofsdThreads int
	// Log; nil means slog.Default().
	Log *slog.Logger
}

// A QEMU boots virtual machines. It implements hypervisor.Hypervisor.
type QEMU struct {
	Options
}

// New returns a QEMU that works by o.
func New(o Options) *QEMU {
	if o.Log == nil {
		o.Log = slog.Default()
	}
	return &QEMU{o}
}

// Check implements hypervisor.Hypervisor.
func (q *QEMU) Check(ctx context.Context) (hypervisor.Capabilities, error) {
	var c hypervisor.Capabilities
	var err error
	if c.Version.Value, err = hostcheck.QEMUVersion(ctx, q.Path); err != nil {
		c.Version.Reason = err.Error()
	}
	c.Accelerator = q.accelerator(kvmUsable)
	c.Channel = q.channel(channel.VsockUsable)
	return c, c.Err()
}

// accelerator is what a VM started now would run on.
func (q *QEMU) accelerator(usable func() error) hypervisor.Capability {
	if q.Accelerator == "tcg" {
		return hypervisor.Capability{Value: "tcg"}
	}
	switch err := usable(); {
	case err == nil:
		return hypervisor.Capability{Value: "kvm"}
	case q.Accelerator == "kvm":
		return hypervisor.Capability{Reason: fmt.Sprintf(`hypervisor.accelerator is "kvm" but KVM is not usable: %v, or set it to "auto"`, err)}
	default:
		return hypervisor.Capability{Value: "tcg", Reason: err.Error()}
	}
}

// kvmUsable tells whether KVM works, and works for the unprivileged.
func kvmUsable() error {
	if err := hostcheck.KVMUsable(); err != nil {
		return err
	}
	_, err := kvmGroup()
	return err
}

// channel is the first allowed way to the guest that this host offers.
func (q *QEMU) channel(vsockUsable func() error) hypervisor.Capability {
	reason := ""
	for _, c := range q.Channels {
		if c == "vhost-vsock" {
			if err := vsockUsable(); err != nil {
				reason = err.Error()
				continue
			}
			reason = ""
		}
		return hypervisor.Capability{Value: c, Reason: reason}
	}
	if reason == "" {
		return hypervisor.Capability{Reason: "no way to the guest is allowed; allow one in hypervisor.channels"}
	}
	return hypervisor.Capability{Reason: "no way to the guest: " + reason + `, or allow "virtio-serial" in hypervisor.channels`}
}

// Start implements hypervisor.Hypervisor.
func (q *QEMU) Start(ctx context.Context, cfg hypervisor.Config) (hypervisor.VM, error) {
	if err := hostcheck.CheckKernel(cfg.Kernel); err != nil {
		return nil, err
	}
	if err := hostcheck.CheckInitrd(cfg.Initrd); err != nil {
		return nil, err
	}
	m := machine{Config: cfg, machineType: q.Machine, cpuModel: q.CPUModel, freePageReporting: q.FreePageReporting}
	accelerator, way := q.accelerator(kvmUsable), q.channel(channel.VsockUsable)
	for _, c := range []hypervisor.Capability{accelerator, way} {
		if c.Value == "" {
			return nil, errors.New(c.Reason)
		}
	}
	m.accelerator = accelerator.Value
	if accelerator.Reason != "" {
		q.Log.Warn("the guest runs under TCG, which is slow", "reason", accelerator.Reason)
	}
	v := &vm{log: q.Log, turn: make(chan struct{}, 1), stopping: make(chan struct{}), done: make(chan struct{}), watched: make(chan struct{})}
	if err := q.start(ctx, v, m, way.Value); err != nil {
		return nil, errors.Join(err, v.held.Run(ctx))
	}
	go v.watch() // ends with the connection, and supervise waits for it
	go v.supervise()
	return v, nil
}

// start takes what the machine needs, piece by piece, and runs QEMU on it. What
// was taken is on v.held.
func (q *QEMU) start(ctx context.Context, v *vm, m machine, kind string) error {
	files := &inheritance{}
	defer files.close()

	uid, gid, err := q.account()
	if err != nil {
		return err
	}
	carrier, dev, err := openChannel(kind, files)
	if err != nil {
		return err
	}
	v.carrier, m.channel = carrier, dev
	v.held.Push("close the channel", releaseStep, func(context.Context) error { return ignoreClosed(carrier.Close()) })

	for _, d := range m.Devices {
		switch d := d.(type) { // argv refuses what it does not know
		case hypervisor.Share:
			daemon, err := q.startVirtiofsd(ctx, m.Config, d)
			if err != nil {
				return err
			}
			v.daemons = append(v.daemons, daemon)
			v.held.Push("stop virtiofsd", releaseStep, daemon.Stop)
			m.shareFDs = append(m.shareFDs, files.take(daemon.Socket()))
		case hypervisor.NIC:
			if _, err := v.nics.reserve(d); err != nil { // the slot that argv gives it
				return fmt.Errorf("vm configuration: %w", err)
			}
			var fds []int
			for _, f := range nicFiles(d) {
				fds = append(fds, files.add(f))
			}
			m.nicFDs = append(m.nicFDs, fds)
		}
	}

	qmpConn, qmpFile, err := socketpair("qmp")
	if err != nil {
		return err
	}
	v.held.Push("close the QMP connection", releaseStep, func(context.Context) error { return ignoreClosed(qmpConn.Close()) })
	m.qmpFD = files.take(qmpFile)
	conConn, conFile, err := socketpair("console")
	if err != nil {
		return err
	}
	v.console = newConsole(conConn)
	v.held.Push("close the console", releaseStep, func(context.Context) error {
		err := ignoreClosed(conConn.Close())
		<-v.console.done
		return err
	})
	m.consoleFD = files.take(conFile)

	for _, image := range []struct {
		path string
		fd   *int
	}{{m.Kernel, &m.kernelFD}, {m.Initrd, &m.initrdFD}} {
		f, err := os.Open(image.path)
		if err != nil {
			return err
		}
		*image.fd = files.take(f)
		// QEMU opens it once more: what counts then is the file's own mode.
		if err := hostcheck.CheckReadable(f, uid, gid); err != nil {
			return err
		}
	}

	if err := q.spawn(v, m, files, int(uid), int(gid)); err != nil {
		return err
	}
	// QEMU's ends are QEMU's alone from here: its death is their end.
	files.close()
	if v.qmp, err = qmp.New(ctx, qmpConn); err != nil {
		return fmt.Errorf("start qemu: %w", v.startCause(err))
	}
	v.cpus = vcpu.New(v.qmp, m.VCPUs, m.MaxVCPUs, m.accelerator == "tcg", v.done)
	v.memory = memory.New(v.qmp, m.MemoryMiB, m.MaxMemoryMiB, m.MemoryNode, memory.Place{Bus: nicBus, Addr: memorySlot}, v.done)
	return nil
}

// diagnosisGrace is how long a VM whose channel broke may take to be seen ended,
// and why, on a busy host. It delays only an error that says less.
const diagnosisGrace = 2 * time.Second

// deathGrace is how long a process whose socket closed may take to be seen dead.
const deathGrace = 250 * time.Millisecond

func (q *QEMU) startVirtiofsd(ctx context.Context, cfg hypervisor.Config, share hypervisor.Share) (*virtiofs.Daemon, error) {
	return virtiofs.Start(ctx, virtiofs.Options{
		Path: q.Virtiofsd, Dir: share.Dir, SocketDir: cfg.Dir, Cache: virtiofs.Cache(q.VirtiofsdCache),
		ThreadPoolSize: q.VirtiofsdThreads, Log: q.Log,
		Started: func(name string, pid int) error { return started(cfg, name, pid) },
	})
}

func started(cfg hypervisor.Config, name string, pid int) error {
	if cfg.Started == nil {
		return nil
	}
	return cfg.Started(hypervisor.Process{Name: name, PID: pid})
}

// spawn runs QEMU without privileges, in namespaces of its own: it has no
// network, sees no other process, and holds only the descriptors in files.
func (q *QEMU) spawn(v *vm, m machine, files *inheritance, uid, gid int) error {
	args, err := argv(m)
	if err != nil {
		return err
	}
	spec := child.Spec{
		Path: q.Path, Args: args, Dir: "/", ExtraFiles: files.files,
		UID: uid, GID: gid, NoNewPrivs: true,
		Namespaces: unix.CLONE_NEWNET | unix.CLONE_NEWIPC | unix.CLONE_NEWPID | unix.CLONE_NEWUTS,
	}
	if m.accelerator == "kvm" {
		group, err := kvmGroup()
		if err != nil {
			return err
		}
		spec.Groups = append(spec.Groups, group...)
	}
	v.child, err = child.Start(spec)
	if errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("%s does not exist: install QEMU (apt-get install qemu-system-x86) or set hypervisor.path", q.Path)
	}
	if err != nil {
		return err
	}
	v.held.Push("stop qemu", releaseStep, func(ctx context.Context) error { return v.child.Stop(ctx, syscall.SIGKILL) })
	return started(m.Config, "qemu", v.child.PID())
}

const (
	// minUID and maxUID bound the uids that VMs get: above what distributions
	// give to users, containers and user namespaces, and below what does not fit
	// a signed number (systemd's UIDS-GIDS.md).
	minUID = 1879048192
	maxUID = 2147483646
)

// account returns whom a new QEMU runs as. A random uid needs no record of those
// in use: of 1,000 VMs on a host two share one with a chance of 1 in 500.
func (q *QEMU) account() (uid, gid uint32, err error) {
	if q.User == "" {
		uid = minUID + rand.Uint32N(maxUID-minUID+1)
		return uid, uid, nil
	}
	if uid, gid, err = hostcheck.LookupUser(q.User); err != nil {
		err = fmt.Errorf("hypervisor.user: %w", err)
	}
	return uid, gid, err
}

// kvmGroup returns the group through which an unprivileged process may open
// /dev/kvm; none where everyone may.
func kvmGroup() ([]int, error) {
	var st unix.Stat_t
	if err := unix.Stat("/dev/kvm", &st); err != nil {
		return nil, fmt.Errorf("/dev/kvm: %w", err)
	}
	switch {
	case st.Mode&0o006 == 0o006:
		return nil, nil
	case st.Mode&0o060 == 0o060 && st.Gid != 0:
		return []int{int(st.Gid)}, nil
	}
	return nil, fmt.Errorf("/dev/kvm has mode %#o and group %d, and QEMU, which runs unprivileged, cannot open it; chgrp kvm /dev/kvm && chmod 660 /dev/kvm", st.Mode&0o777, st.Gid)
}

// openChannel opens the channel of that kind and gives the guest's end to QEMU.
func openChannel(kind string, files *inheritance) (channel.Carrier, channelDevice, error) {
	if kind == "vhost-vsock" {
		c, err := channel.OpenVsock()
		if err != nil {
			return nil, channelDevice{}, err
		}
		return c, channelDevice{fd: files.take(c.VhostFile()), cid: c.CID(), param: c.GuestParam()}, nil
	}
	c, err := channel.OpenSerial()
	if err != nil {
		return nil, channelDevice{}, err
	}
	return c, channelDevice{fd: files.take(c.GuestFile()), param: c.GuestParam()}, nil
}

// inheritance are the descriptors that QEMU is started with.
type inheritance struct {
	files, owned []*os.File
}

// add passes f on, which stays its owner's, and returns its number in QEMU.
func (in *inheritance) add(f *os.File) int {
	in.files = append(in.files, f)
	return firstFD + len(in.files) - 1
}

// take is add for a file that is closed here once QEMU has it.
func (in *inheritance) take(f *os.File) int {
	in.owned = append(in.owned, f)
	return in.add(f)
}

func (in *inheritance) close() {
	for _, f := range in.owned {
		f.Close() //nolint:errcheck // QEMU has its own, or there is none
	}
}

// socketpair returns a connected pair: our end as a connection, QEMU's as a file.
func socketpair(name string) (net.Conn, *os.File, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("make the %s socket: %w", name, err)
	}
	ours := os.NewFile(uintptr(fds[0]), name)
	defer ours.Close() //nolint:errcheck // FileConn has its own
	theirs := os.NewFile(uintptr(fds[1]), name)
	conn, err := net.FileConn(ours)
	if err != nil {
		theirs.Close() //nolint:errcheck // the first error says more
		return nil, nil, fmt.Errorf("make the %s socket: %w", name, err)
	}
	return conn, theirs, nil
}

func ignoreClosed(err error) error {
	if errors.Is(err, net.ErrClosed) || errors.Is(err, os.ErrClosed) {
		return nil
	}
	return err
}
