// Package config is Husk's configuration: one tree of types that is one TOML
// file, with its defaults, its strict reading and its validation.
//
// The annotated default is configuration.toml at the root of the repository;
// docs/configuration.md is generated from it.
package config

import (
	"log/slog"
	"time"
)

//go:generate go run ./gendoc -o ../docs/configuration.md

// A Config is one configuration file with its drop-ins.
type Config struct {
	Hypervisor Hypervisor `toml:"hypervisor"`
	Guest      Guest      `toml:"guest"`
	Network    Network    `toml:"network"`
	Runtime    Runtime    `toml:"runtime"`
}

// Hypervisor says how VMs are run on the host.
type Hypervisor struct {
	// Path of QEMU.
	Path        string      `toml:"path"`
	Accelerator Accelerator `toml:"accelerator"`
	// Machine type of QEMU.
	Machine string `toml:"machine"`
	// CPUModel is QEMU's; with "" it is the best that the accelerator has.
	CPUModel string `toml:"cpu_model"`
	// DefaultVCPUs and DefaultMemoryMiB are of a VM whose pod states no limit of its
	// CPUs, or of its memory.
	DefaultVCPUs     int `toml:"default_vcpus"`
	DefaultMemoryMiB int `toml:"default_memory_mib"`
	// MaxVCPUs and MaxMemoryMiB bound every VM; with 0 the host's own number does.
	MaxVCPUs     int `toml:"max_vcpus"`
	MaxMemoryMiB int `toml:"max_memory_mib"`
	// FreePageReporting gives memory that the guest has freed back to the host.
	FreePageReporting bool `toml:"free_page_reporting"`
	// VCPUPinning gives each vCPU a host CPU of its own, where containers have as many
	// by their cpuset.
	VCPUPinning bool `toml:"vcpu_pinning"`
	// Channels are the allowed ways to the guest, tried in order.
	Channels []Channel `toml:"channels"`
	// User that QEMU runs as, by name or by uid; with "" each VM has a uid of
	// its own.
	User string `toml:"user"`
	// Virtiofsd is its path; with "" it is looked for.
	Virtiofsd      string         `toml:"virtiofsd"`
	VirtiofsdCache VirtiofsdCache `toml:"virtiofsd_cache"`
	// VirtiofsdThreads is how many requests of a guest are served at once; with 0
	// they are served one by one.
	VirtiofsdThreads int `toml:"virtiofsd_threads"`
}

// Guest says what runs inside a VM.
type Guest struct {
	// Kernel and Initrd are paths on the host.
	Kernel string `toml:"kernel"`
	Initrd string `toml:"initrd"`
	// KernelParams follow Husk's own on the guest's command line.
	KernelParams string   `toml:"kernel_params"`
	LogLevel     LogLevel `toml:"log_level"`
}

// Network says how guests reach networks.
type Network struct {
	HostNetwork         HostNetwork         `toml:"host_network"`
	UnconfiguredNetwork UnconfiguredNetwork `toml:"unconfigured_network"`
	VhostNet            VhostNet            `toml:"vhost_net"`
	// PortForward lets connections to loopback in a pod's network namespace reach
	// the guest's loopback.
	PortForward bool `toml:"port_forward"`
	// Passt is its path; with "" it is looked for.
	Passt string `toml:"passt"`
}

// NeedsPasst reports whether there are pods that want user-mode networking.
func (n Network) NeedsPasst() bool {
	return n.HostNetwork == HostNetworkUser || n.UnconfiguredNetwork == UnconfiguredNetworkUser
}

// Runtime says how the shim behaves.
type Runtime struct {
	// StateDir holds one directory per sandbox.
	StateDir string   `toml:"state_dir"`
	LogLevel LogLevel `toml:"log_level"`
	// BootTimeout bounds the time from QEMU's start to the agent's first word.
	BootTimeout Duration `toml:"boot_timeout"`
	// RequestTimeout bounds each call to the agent.
	RequestTimeout Duration `toml:"request_timeout"`
	// StopTimeout bounds a graceful shut-down, before the kill, and the removal
	// of a container.
	StopTimeout Duration `toml:"stop_timeout"`
	// DrainTimeout is how long output that nobody reads is held without progress.
	DrainTimeout Duration `toml:"drain_timeout"`
	// AllowedSockets are patterns of the host's unix sockets that containers may
	// have, if they mount them.
	AllowedSockets []string `toml:"allowed_sockets"`
	// AllowedAnnotations are names of annotations, or patterns of such, by which a pod
	// may override what is configured (see Override).
	AllowedAnnotations []string `toml:"allowed_annotations"`
}

// Default returns the configuration that holds where no file says otherwise.
func Default() Config {
	return Config{
		Hypervisor: Hypervisor{
			Path:              "/usr/bin/qemu-system-x86_64",
			Accelerator:       AcceleratorAuto,
			Machine:           "q35",
			DefaultVCPUs:      1,
			DefaultMemoryMiB:  256,
			FreePageReporting: true,
			Channels:          []Channel{ChannelVhostVsock, ChannelVirtioSerial},
			VirtiofsdCache:    VirtiofsdCacheAuto,
		},
		Guest: Guest{
			Kernel:   "/usr/share/husk/vmlinuz",
			Initrd:   "/usr/share/husk/initrd.img",
			LogLevel: LogLevelWarn,
		},
		Network: Network{
			HostNetwork:         HostNetworkUser,
			UnconfiguredNetwork: UnconfiguredNetworkNone,
			VhostNet:            VhostNetAuto,
			PortForward:         true,
		},
		Runtime: Runtime{
			StateDir:           "/run/husk",
			LogLevel:           LogLevelInfo,
			BootTimeout:        Duration{60 * time.Second},
			RequestTimeout:     Duration{30 * time.Second},
			StopTimeout:        Duration{5 * time.Second},
			DrainTimeout:       Duration{10 * time.Second},
			AllowedSockets:     []string{"/**"},
			AllowedAnnotations: []string{},
		},
	}
}

// An Accelerator is what executes the guest's instructions.
type Accelerator string

// The accelerators.
const (
	AcceleratorAuto Accelerator = "auto" // KVM where it is usable, else TCG
	AcceleratorKVM  Accelerator = "kvm"
	AcceleratorTCG  Accelerator = "tcg"
)

// A Channel is a way between host and guest.
type Channel string

// The channels.
const (
	ChannelVhostVsock   Channel = "vhost-vsock"
	ChannelVirtioSerial Channel = "virtio-serial"
)

// A VirtiofsdCache is what the guest may cache of a shared directory.
type VirtiofsdCache string

// The cache policies of virtiofsd.
const (
	VirtiofsdCacheAuto   VirtiofsdCache = "auto"
	VirtiofsdCacheAlways VirtiofsdCache = "always"
	VirtiofsdCacheNever  VirtiofsdCache = "never"
)

// A HostNetwork is what becomes of a pod that wants the host's network.
type HostNetwork string

// The ways with the host's network.
const (
	HostNetworkUser   HostNetwork = "user" // user-mode networking by passt
	HostNetworkRefuse HostNetwork = "refuse"
)

// An UnconfiguredNetwork is what a container has whose network namespace is new
// and that nobody configures.
type UnconfiguredNetwork string

// The networks of such a container.
const (
	UnconfiguredNetworkNone UnconfiguredNetwork = "none" // loopback alone
	UnconfiguredNetworkUser UnconfiguredNetwork = "user" // user-mode networking by passt
)

// A VhostNet is when the host's kernel copies packets in QEMU's stead.
type VhostNet string

// The uses of vhost-net.
const (
	VhostNetAuto  VhostNet = "auto" // where /dev/vhost-net opens
	VhostNetNever VhostNet = "never"
)

// A LogLevel is the least severity that is logged.
type LogLevel string

// The log levels.
const (
	LogLevelDebug LogLevel = "debug"
	LogLevelInfo  LogLevel = "info"
	LogLevelWarn  LogLevel = "warn"
	LogLevelError LogLevel = "error"
)

// Level returns l for slog; of an invalid level it is Info.
func (l LogLevel) Level() slog.Level {
	switch l {
	case LogLevelDebug:
		return slog.LevelDebug
	case LogLevelWarn:
		return slog.LevelWarn
	case LogLevelError:
		return slog.LevelError
	}
	return slog.LevelInfo
}

// A Duration is written as a string such as "1m30s".
type Duration struct{ time.Duration }

// UnmarshalText reads what time.ParseDuration does.
func (d *Duration) UnmarshalText(text []byte) (err error) {
	d.Duration, err = time.ParseDuration(string(text))
	return err
}
