package config

import (
	"errors"
	"fmt"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
)

// A rule is one key of the file and what it allows.
type rule struct {
	key  string // section.key
	want string // what is allowed, in words
	// check returns the value as text, and whether it is allowed.
	check func(*Config) (got string, ok bool)
}

// rules are all keys there are, in the order of the file.
func rules() []rule {
	return []rule{
		text("hypervisor.path", wantPath, isPath, func(c *Config) *string { return &c.Hypervisor.Path }),
		enum("hypervisor.accelerator", func(c *Config) *Accelerator { return &c.Hypervisor.Accelerator },
			AcceleratorAuto, AcceleratorKVM, AcceleratorTCG),
		enum("hypervisor.machine", func(c *Config) *string { return &c.Hypervisor.Machine }, "q35"),
		text("hypervisor.cpu_model", `empty, or a model of "qemu-system-x86_64 -cpu help" with its flags`, cpuModel.MatchString,
			func(c *Config) *string { return &c.Hypervisor.CPUModel }),
		number("hypervisor.default_vcpus", 1, mostVCPUs, func(c *Config) *int { return &c.Hypervisor.DefaultVCPUs }),
		number("hypervisor.default_memory_mib", 128, mostMemoryMiB, func(c *Config) *int { return &c.Hypervisor.DefaultMemoryMiB }),
		limit("hypervisor.max_vcpus", "default_vcpus", mostVCPUs,
			func(c *Config) (most, least int) { return c.Hypervisor.MaxVCPUs, c.Hypervisor.DefaultVCPUs }),
		limit("hypervisor.max_memory_mib", "default_memory_mib", mostMemoryMiB,
			func(c *Config) (most, least int) { return c.Hypervisor.MaxMemoryMiB, c.Hypervisor.DefaultMemoryMiB }),
		boolean("hypervisor.free_page_reporting", func(c *Config) *bool { return &c.Hypervisor.FreePageReporting }),
		boolean("hypervisor.vcpu_pinning", func(c *Config) *bool { return &c.Hypervisor.VCPUPinning }),
		{
			key: "hypervisor.channels", want: `a list of at least one of "vhost-vsock" and "virtio-serial", each once`,
			check: func(c *Config) (string, bool) {
				return quoteList(c.Hypervisor.Channels), validChannels(c.Hypervisor.Channels)
			},
		},
		text("hypervisor.user", "empty, or the name or the uid of an account that is not root", isUnprivileged,
			func(c *Config) *string { return &c.Hypervisor.User }),
		text("hypervisor.virtiofsd", "empty, or "+wantPath, isEmptyOrPath, func(c *Config) *string { return &c.Hypervisor.Virtiofsd }),
		enum("hypervisor.virtiofsd_cache", func(c *Config) *VirtiofsdCache { return &c.Hypervisor.VirtiofsdCache },
			VirtiofsdCacheAuto, VirtiofsdCacheAlways, VirtiofsdCacheNever),
		number("hypervisor.virtiofsd_threads", 0, 64, func(c *Config) *int { return &c.Hypervisor.VirtiofsdThreads }),

		text("guest.kernel", wantPath, isPath, func(c *Config) *string { return &c.Guest.Kernel }),
		text("guest.initrd", wantPath, isPath, func(c *Config) *string { return &c.Guest.Initrd }),
		text("guest.kernel_params", "at most 1024 printable ASCII characters, and no husk.* parameter", isKernelParams,
			func(c *Config) *string { return &c.Guest.KernelParams }),
		enum("guest.log_level", func(c *Config) *LogLevel { return &c.Guest.LogLevel }, LogLevelDebug, LogLevelInfo, LogLevelWarn),

		enum("network.host_network", func(c *Config) *HostNetwork { return &c.Network.HostNetwork }, HostNetworkUser, HostNetworkRefuse),
		enum("network.unconfigured_network", func(c *Config) *UnconfiguredNetwork { return &c.Network.UnconfiguredNetwork },
			UnconfiguredNetworkNone, UnconfiguredNetworkUser),
		enum("network.vhost_net", func(c *Config) *VhostNet { return &c.Network.VhostNet }, VhostNetAuto, VhostNetNever),
		boolean("network.port_forward", func(c *Config) *bool { return &c.Network.PortForward }),
		text("network.passt", "empty, or "+wantPath, isEmptyOrPath, func(c *Config) *string { return &c.Network.Passt }),

		text("runtime.state_dir", wantPath, isPath, func(c *Config) *string { return &c.Runtime.StateDir }),
		enum("runtime.log_level", func(c *Config) *LogLevel { return &c.Runtime.LogLevel },
			LogLevelDebug, LogLevelInfo, LogLevelWarn, LogLevelError),
		duration("runtime.boot_timeout", func(c *Config) *Duration { return &c.Runtime.BootTimeout }),
		duration("runtime.request_timeout", func(c *Config) *Duration { return &c.Runtime.RequestTimeout }),
		duration("runtime.stop_timeout", func(c *Config) *Duration { return &c.Runtime.StopTimeout }),
		duration("runtime.drain_timeout", func(c *Config) *Duration { return &c.Runtime.DrainTimeout }),
		{
			key: "runtime.allowed_sockets", want: "a list of absolute paths, which may be patterns",
			check: func(c *Config) (string, bool) {
				return quoteList(c.Runtime.AllowedSockets), !slices.ContainsFunc(c.Runtime.AllowedSockets, isNoPattern)
			},
		},
		{
			key: "runtime.allowed_annotations", want: "a list of names of annotations that are listed above, or patterns of such",
			check: func(c *Config) (string, bool) {
				return quoteList(c.Runtime.AllowedAnnotations), !slices.ContainsFunc(c.Runtime.AllowedAnnotations, isNoAnnotation)
			},
		},
	}
}

const (
	// mostVCPUs is what the q35 machine has without interrupt remapping.
	mostVCPUs     = 255
	mostMemoryMiB = 1 << 20
)

// Validate reports every value that is not allowed: errors joined, each one
// line with the key, the value and what is allowed.
func (c Config) Validate() error {
	var errs []error
	for _, r := range rules() {
		if problem := r.problem(&c); problem != "" {
			errs = append(errs, errors.New(problem))
		}
	}
	return errors.Join(errs...)
}

// problem says what is wrong with the rule's value, or "".
func (r rule) problem(c *Config) string {
	got, ok := r.check(c)
	if ok {
		return ""
	}
	return r.refuse(got)
}

func (r rule) refuse(got string) string {
	if r.key == "hypervisor.channels" && got == "[]" {
		return fmt.Sprintf("%s = []: no way to the guest is allowed; want %s", r.key, r.want)
	}
	return fmt.Sprintf("%s = %s: want %s", r.key, got, r.want)
}

func text(key, want string, ok func(string) bool, get func(*Config) *string) rule {
	return rule{key, want, func(c *Config) (string, bool) { s := *get(c); return strconv.Quote(s), ok(s) }}
}

func enum[T ~string](key string, get func(*Config) *T, allowed ...T) rule {
	quoted := make([]string, len(allowed))
	for i, a := range allowed {
		quoted[i] = strconv.Quote(string(a))
	}
	return rule{key, strings.Join(quoted, " or "), func(c *Config) (string, bool) {
		v := *get(c)
		return strconv.Quote(string(v)), slices.Contains(allowed, v)
	}}
}

func number(key string, least, most int, get func(*Config) *int) rule {
	return rule{key, fmt.Sprintf("a whole number from %d to %d", least, most), func(c *Config) (string, bool) {
		n := *get(c)
		return strconv.Itoa(n), least <= n && n <= most
	}}
}

// limit is a number that is 0 for none and else no less than another.
func limit(key, other string, most int, get func(*Config) (n, least int)) rule {
	return rule{key, fmt.Sprintf("0, or a whole number from %s to %d", other, most), func(c *Config) (string, bool) {
		n, least := get(c)
		return strconv.Itoa(n), n == 0 || least <= n && 0 < n && n <= most
	}}
}

// boolean allows whatever the decoder lets in.
func boolean(key string, get func(*Config) *bool) rule {
	return rule{key, "true or false", func(c *Config) (string, bool) { return strconv.FormatBool(*get(c)), true }}
}

func duration(key string, get func(*Config) *Duration) rule {
	return rule{key, `a duration from "100ms" to "1h", such as "90s" or "1m30s"`, func(c *Config) (string, bool) {
		d := *get(c)
		return strconv.Quote(d.String()), 100*time.Millisecond <= d.Duration && d.Duration <= time.Hour
	}}
}

const wantPath = "an absolute path"

func isPath(s string) bool        { return filepath.IsAbs(s) && !strings.ContainsRune(s, 0) }
func isEmptyOrPath(s string) bool { return s == "" || isPath(s) }

var (
	cpuModel    = regexp.MustCompile(`^[A-Za-z0-9_.,+=-]*$`)
	accountName = regexp.MustCompile(`^[A-Za-z0-9_][A-Za-z0-9_.-]*$`)
)

func isUnprivileged(user string) bool {
	uid, err := strconv.ParseUint(user, 10, 32)
	return user == "" || accountName.MatchString(user) && user != "root" && (err != nil || uid != 0)
}

func isKernelParams(s string) bool {
	printable := strings.IndexFunc(s, func(r rune) bool { return r < ' ' || r > '~' }) < 0
	ours := slices.ContainsFunc(strings.Fields(s), func(p string) bool { return strings.HasPrefix(p, "husk.") })
	return len(s) <= 1024 && printable && !ours
}

func validChannels(channels []Channel) bool {
	for i, ch := range channels {
		known := ch == ChannelVhostVsock || ch == ChannelVirtioSerial
		if !known || slices.Contains(channels[:i], ch) {
			return false
		}
	}
	return len(channels) > 0
}

// isNoPattern tells of what can match nothing: a path that is not absolute or not
// clean, or brackets that do not close within an element.
func isNoPattern(s string) bool {
	if !isPath(s) || path.Clean(s) != s || s == "/" {
		return true
	}
	for element := range strings.SplitSeq(s, "/") {
		if _, err := path.Match(element, ""); err != nil {
			return true
		}
	}
	return false
}

func quoteList[T ~string](list []T) string {
	quoted := make([]string, len(list))
	for i, s := range list {
		quoted[i] = strconv.Quote(string(s))
	}
	return "[" + strings.Join(quoted, ", ") + "]"
}
