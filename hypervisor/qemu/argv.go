package qemu

import (
	"encoding/json"
	"errors"
	"fmt"
	"regexp"
	"strings"

	"github.com/husk-containers/husk/hypervisor"
	"github.com/husk-containers/husk/hypervisor/qemu/memory"
)

// firstFD is where QEMU's inherited descriptors begin.
const firstFD = 3

// A machine is all that decides QEMU's command line.
type machine struct {
	hypervisor.Config
	machineType string // "q35"
	accelerator string // "kvm" or "tcg"
	cpuModel    string // "" for the accelerator's best
	// freePageReporting has the guest report what memory it does not use.
	freePageReporting bool
	// Descriptors, as QEMU numbers them.
	qmpFD, consoleFD, kernelFD, initrdFD int
	channel                              channelDevice
	shareFDs                             []int   // one for each hypervisor.Share in Devices, in order
	nicFDs                               [][]int // those of nicFiles, for each hypervisor.NIC in Devices, in order
}

// A channelDevice is the guest's end of the channel: exactly one of vsock and
// virtio-serial.
type channelDevice struct {
	fd int
	// cid of the guest, for vsock; 0 means virtio-serial.
	cid uint32
	// param names the channel on the guest's command line.
	param string
}

var (
	validID  = regexp.MustCompile(`^[A-Za-z0-9_.-]{1,128}$`)
	validTag = regexp.MustCompile(`^[A-Za-z0-9_.-]{1,35}$`)
)

// tcgCPU is all that TCG emulates but for the fast string instructions: the guest
// takes their flags for a reason to copy with REP MOVSB, which TCG translates to
// a byte at a time.
const tcgCPU = "max,erms=off,fsrm=off"

// sandbox denies every class of system calls that QEMU's filter knows of.
const sandbox = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"

// argv returns QEMU's arguments for m. Everything invalid in m is in the error.
func argv(m machine) ([]string, error) {
	var errs []error
	bad := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	if !validID.MatchString(m.ID) {
		bad("id %q is not 1 to 128 letters, digits, '_', '.', '-'", m.ID)
	}
	if m.VCPUs < 1 {
		bad("%d vCPUs, want at least 1", m.VCPUs)
	}
	if m.MemoryMiB < 64 {
		bad("%d MiB of memory, want at least 64", m.MemoryMiB)
	}
	cpu := m.cpuModel
	accel := "kvm"
	switch m.accelerator {
	case "kvm":
		cpu = or(cpu, "host")
	case "tcg":
		cpu = or(cpu, tcgCPU)
		accel = "tcg,thread=multi,tb-size=" + tbSize
	default:
		bad("accelerator %q is neither kvm nor tcg", m.accelerator)
	}
	if m.machineType != "q35" {
		bad("machine type %q is not q35", m.machineType)
	}
	if n := m.MemoryNode; n != nil && *n < 0 {
		bad("host NUMA node %d is negative", *n)
	}
	ram, err := json.Marshal(memory.Backend("ram", m.MemoryMiB, m.MemoryNode))
	if err != nil {
		bad("memory: %w", err)
	}
	args := []string{
		// Threads with names: "CPU 0/KVM" is a vCPU's.
		"-name", "husk-" + m.ID + ",debug-threads=on",
		"-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
		"-sandbox", sandbox,
		"-accel", accel,
		"-machine", m.machineType + ",memory-backend=ram,dump-guest-core=off,usb=off,vmport=off,sata=off,smbus=off",
		"-cpu", cpu,
		"-smp", smp(m),
		"-m", memorySize(m),
		"-object", string(ram),
		"-kernel", inherited(m.kernelFD),
		"-initrd", inherited(m.initrdFD),
		"-append", kernelParams(m),
		"-chardev", socket("qmp", m.qmpFD), "-mon", "chardev=qmp,mode=control",
		"-chardev", socket("console", m.consoleFD), "-serial", "chardev:console",
		"-object", "rng-random,id=rng,filename=/dev/urandom", "-device", "virtio-rng-pci,rng=rng",
		"-device", fmt.Sprintf("virtio-balloon-pci,id=%s,deflate-on-oom=on,free-page-reporting=%s", memory.Balloon, onOff(m.freePageReporting)),
	}
	args = append(args, m.channel.args()...)
	args = append(args, "-device", bridge)
	nicFDs, nics := m.nicFDs, &slots{}
	shares, tags := 0, map[string]bool{}
	for i, d := range m.Devices {
		switch d := d.(type) {
		case hypervisor.Share:
			switch {
			case !validTag.MatchString(d.Tag):
				bad("device %d: share tag %q is not 1 to 35 letters, digits, '_', '.', '-'", i, d.Tag)
			case tags[d.Tag]:
				bad("device %d: share tag %q is taken", i, d.Tag)
			case shares >= len(m.shareFDs):
				bad("device %d: share %q has no descriptor", i, d.Tag)
			default:
				id := fmt.Sprintf("share%d", shares)
				args = append(args, "-chardev", socket(id, m.shareFDs[shares]),
					"-device", fmt.Sprintf("vhost-user-fs-pci,chardev=%s,tag=%s,queue-size=1024", id, d.Tag))
			}
			tags[d.Tag] = true
			shares++
		case hypervisor.NIC:
			var fds []int
			if len(nicFDs) > 0 {
				fds, nicFDs = nicFDs[0], nicFDs[1:]
			}
			p, err := nics.reserve(d)
			if err != nil {
				bad("device %d: %w", i, err)
				continue
			}
			nic, err := nicArgs(d, p.slot, fds)
			if err != nil {
				bad("device %d: %w", i, err)
			}
			args = append(args, nic...)
		default:
			bad("device %d: %T is of no kind that this backend has", i, d)
		}
	}
	if err := errors.Join(errs...); err != nil {
		return nil, fmt.Errorf("vm configuration: %s", strings.ReplaceAll(err.Error(), "\n", "; "))
	}
	return args, nil
}

func (c channelDevice) args() []string {
	if c.cid != 0 {
		return []string{"-device", fmt.Sprintf("vhost-vsock-pci,guest-cid=%d,vhostfd=%d", c.cid, c.fd)}
	}
	return []string{
		"-device", "virtio-serial-pci", "-chardev", socket("channel", c.fd),
		"-device", "virtserialport,chardev=channel,name=husk.channel",
	}
}

// tbSize is how much translated code TCG keeps, in MiB; without a word it takes a
// gigabyte of the pod's memory as time goes by. See docs/decisions/027.
const tbSize = "64"

// memorySize is what there is at the boot, and room for more.
func memorySize(m machine) string {
	size := fmt.Sprintf("%dM", m.MemoryMiB)
	if room := memory.Room(m.MemoryMiB, m.MaxMemoryMiB); room > 0 {
		size += fmt.Sprintf(",maxmem=%dM", m.MemoryMiB+room)
	}
	return size
}

// hotplugParams have the guest take memory into use by itself, three parts for what can
// be moved, and so be given back, for each that cannot (Linux's own default for that
// policy). Room above 4 GiB makes Linux set 64 MiB aside for devices that cannot
// reach there; virtio's can.
const hotplugParams = "memhp_default_state=online memory_hotplug.online_policy=auto-movable swiotlb=noforce"

// kernelParams is the guest's command line. The console stays quiet: a verbose
// one costs half a second under TCG; a panic still shows. The check of the timer's
// interrupts takes a host that is late with them for broken hardware and panics;
// Linux leaves it out by itself under KVM alone. Of the security modules there are
// those that containers use: BPF's, which Debian's kernel has by default, makes Linux
// 6.1 leave out its own checks of security.* attributes, and any user may then take
// the capabilities off a file.
func kernelParams(m machine) string {
	params := "console=ttyS0 quiet panic=-1 no_timer_check lsm=landlock,yama "
	if m.MaxMemoryMiB > m.MemoryMiB {
		params += hotplugParams + " "
	}
	if m.accelerator == "tcg" && m.MaxVCPUs > m.VCPUs {
		params += fmt.Sprintf("maxcpus=%d ", m.VCPUs)
	}
	return strings.Join(strings.Fields(params+m.channel.param+" "+m.KernelParams), " ")
}

func socket(id string, fd int) string { return fmt.Sprintf("socket,id=%s,fd=%d", id, fd) }

// smp is the number of CPUs and how many there is room for. Under TCG none can come
// later (package vcpu): all are there, the guest starts with some (maxcpus of
// kernelParams), and there is room for a second at least. With one possible CPU
// QEMU 7.2 translates the guest's memory barriers and locked instructions to
// nothing that another thread of the host would heed (accel/tcg, CF_PARALLEL): a
// virtio notification can then be lost, and the guest waits for ever. Devices run
// in other threads and processes.
func smp(m machine) string {
	count, most := m.VCPUs, max(m.VCPUs, m.MaxVCPUs)
	if m.accelerator == "tcg" {
		count, most = most, max(most, 2)
	}
	// One socket and one thread of a core, whatever QEMU's version makes of the numbers.
	return fmt.Sprintf("cpus=%d,maxcpus=%d,sockets=1,cores=%d,threads=1", count, most, most)
}

// inherited names a descriptor as a file: QEMU's user need not be able to reach
// the path that it was opened by.
func inherited(fd int) string { return fmt.Sprintf("/proc/self/fd/%d", fd) }

func onOff(on bool) string {
	if on {
		return "on"
	}
	return "off"
}

func or(s, otherwise string) string {
	if s == "" {
		return otherwise
	}
	return s
}
