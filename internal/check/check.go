// Package check looks at everything a pod needs of this host and words one line
// on each.
package check

import (
	"context"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"

	"github.com/husk-containers/husk/config"
	"github.com/husk-containers/husk/hypervisor/channel"
	"github.com/husk-containers/husk/hypervisor/virtiofs"
	"github.com/husk-containers/husk/internal/hostcheck"
)

// A Level is how much a result matters.
type Level int

// The levels.
const (
	OK   Level = iota
	Warn       // pods start, but something is slower or missing
	Fail       // no pod can start
)

// String returns the level as it is printed.
func (l Level) String() string {
	switch l {
	case OK:
		return "ok"
	case Warn:
		return "warn"
	}
	return "FAIL"
}

// A Result is what was found about one requirement. Text is one line; unless
// all is well it names the cause and the remedy.
type Result struct {
	Level Level
	Name  string
	Text  string
}

// Print writes one aligned line per result.
func Print(w io.Writer, results []Result) error {
	for _, r := range results {
		if _, err := fmt.Fprintf(w, "%-4s  %-10s  %s\n", r.Level, r.Name, r.Text); err != nil {
			return fmt.Errorf("print result: %w", err)
		}
	}
	return nil
}

// Failed reports whether the results say that no pod can start.
func Failed(results []Result) bool {
	return slices.ContainsFunc(results, func(r Result) bool { return r.Level == Fail })
}

// Run checks this host for pods with the configuration at path, as config.Load
// reads it. ctx bounds the programs that are asked for their versions.
func Run(ctx context.Context, path string, explicit bool) []Result {
	cfg, results := configuration(path, explicit)
	h := cfg.Hypervisor
	return append(results,
		qemu(ctx, h.Path),
		kvm(h.Accelerator, hostcheck.KVMUsable),
		guestChannel(h.Channels, channel.VsockUsable),
		virtiofsd(ctx, h.Virtiofsd),
		file("kernel", cfg.Guest.Kernel, hostcheck.CheckKernel),
		file("image", cfg.Guest.Initrd, hostcheck.CheckInitrd),
		user(h.User),
		tun(hostcheck.TunUsable),
		hostCgroups(),
	)
}

// configuration falls back to the defaults, so that the rest can be checked.
func configuration(path string, explicit bool) (config.Config, []Result) {
	const name = "config"
	cfg, err := config.Load(path, explicit)
	if err == nil {
		if _, statErr := os.Stat(path); statErr != nil {
			path += " is not there: the defaults and config.d hold"
		}
		return cfg, []Result{{OK, name, path}}
	}
	var results []Result
	for line := range strings.Lines(err.Error()) {
		results = append(results, Result{Fail, name, strings.TrimSuffix(line, "\n")})
	}
	return config.Default(), append(results, Result{Warn, name, "what follows was checked with the defaults; correct the lines above"})
}

func qemu(ctx context.Context, path string) Result {
	version, err := hostcheck.QEMUVersion(ctx, path)
	if err != nil {
		return Result{Fail, "qemu", err.Error()}
	}
	return Result{OK, "qemu", path + " " + version}
}

func kvm(want config.Accelerator, usable func() error) Result {
	const name = "kvm"
	err := usable()
	switch {
	case want == config.AcceleratorTCG:
		return Result{OK, name, `not used: hypervisor.accelerator is "tcg"`}
	case err == nil:
		return Result{OK, name, "/dev/kvm"}
	case want == config.AcceleratorKVM:
		return Result{Fail, name, err.Error() + `, or set hypervisor.accelerator to "auto"`}
	}
	return Result{Warn, name, "pods run under TCG, many times slower: " + err.Error()}
}

// guestChannel tells the first of the allowed channels that works.
func guestChannel(allowed []config.Channel, vsockUsable func() error) Result {
	const name = "channel"
	var vsockErr error
	for _, ch := range allowed {
		switch {
		case ch == config.ChannelVhostVsock:
			if vsockErr = vsockUsable(); vsockErr == nil {
				return Result{OK, name, "vhost-vsock by /dev/vhost-vsock"}
			}
		case vsockErr != nil:
			return Result{Warn, name, string(ch) + " instead of vhost-vsock: " + vsockErr.Error()}
		default:
			return Result{OK, name, string(ch)}
		}
	}
	return Result{Fail, name, fmt.Sprintf(`%v, or allow "virtio-serial" in hypervisor.channels`, vsockErr)}
}

func virtiofsd(ctx context.Context, path string) Result {
	const name = "virtiofsd"
	if path == "" {
		var err error
		if path, err = virtiofs.Find(); err != nil {
			return Result{Fail, name, err.Error()}
		}
	}
	version, err := virtiofs.Probe(ctx, path)
	if err != nil {
		return Result{Fail, name, err.Error()}
	}
	return Result{OK, name, fmt.Sprintf("%s %s (%s)", path, version.Number, version.Dialect)}
}

func file(name, path string, check func(string) error) Result {
	if err := check(path); err != nil {
		return Result{Fail, name, err.Error()}
	}
	return Result{OK, name, path}
}

func user(name string) Result {
	if name == "" {
		return Result{OK, "user", "a uid of its own for each VM"}
	}
	uid, gid, err := hostcheck.LookupUser(name)
	if err != nil {
		return Result{Fail, "user", err.Error()}
	}
	return Result{OK, "user", fmt.Sprintf("%s, uid %d, gid %d", name, uid, gid)}
}

func tun(usable func() error) Result {
	if err := usable(); err != nil {
		return Result{Warn, "tun", "pods have no network: " + err.Error()}
	}
	return Result{OK, "tun", "/dev/net/tun"}
}
