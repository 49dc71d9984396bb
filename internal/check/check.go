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
	"github.com/husk-containers/husk/hypervisor"
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
// reads it, and with the hypervisor that backend makes for it. ctx bounds the
// programs that are asked for their versions.
func Run(ctx context.Context, path string, explicit bool, backend func(config.Hypervisor) hypervisor.Hypervisor) []Result {
	cfg, results := configuration(path, explicit)
	h := cfg.Hypervisor
	results = append(results, monitor(ctx, backend(h), h)...)
	return append(results,
		virtiofsd(ctx, h.Virtiofsd),
		file("kernel", cfg.Guest.Kernel, h.User, hostcheck.CheckKernel),
		file("image", cfg.Guest.Initrd, h.User, hostcheck.CheckInitrd),
		user(h.User),
		tun(hostcheck.TunUsable),
		vhostNet(cfg.Network.VhostNet, hostcheck.VhostNetUsable),
		forward(cfg.Network.PortForward, hostcheck.NFTablesUsable),
		passt(cfg.Network, func(path string) error { return passtStarts(ctx, path) }),
		hostCgroups(),
		inotify(instancesPath),
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

// monitor tells what the hypervisor finds. What it lacks is in its Capabilities.
func monitor(ctx context.Context, backend hypervisor.Hypervisor, h config.Hypervisor) []Result {
	found, _ := backend.Check(ctx) //nolint:errcheck // see above
	kvm := "/dev/kvm"
	if found.Accelerator.Value == "tcg" {
		kvm = `not used: hypervisor.accelerator is "tcg"`
	}
	return []Result{
		capability("qemu", found.Version, h.Path+" "+found.Version.Value, ""),
		capability("kvm", found.Accelerator, kvm, "pods run under TCG, many times slower: "),
		capability("channel", found.Channel, found.Channel.Value, found.Channel.Value+" instead of vhost-vsock: "),
	}
}

// capability words one finding: good where it is the best, or else its reason
// after what that means.
func capability(name string, c hypervisor.Capability, good, meaning string) Result {
	switch {
	case c.Value == "":
		return Result{Fail, name, c.Reason}
	case c.Reason != "":
		return Result{Warn, name, meaning + c.Reason}
	}
	return Result{OK, name, good}
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
	found := fmt.Sprintf("%s %s (%s)", path, version.Number, version.Dialect)
	if version.Dialect == virtiofs.C {
		if _, err := virtiofs.FindPreload(); err != nil {
			return Result{Warn, name, found + ": " + err.Error()}
		}
	}
	return Result{OK, name, found}
}

// file checks an image of the guest's, and that a VM's user can read it.
func file(name, path, user string, check func(string) error) Result {
	err := check(path)
	if err == nil {
		err = readable(path, user)
	}
	if err != nil {
		return Result{Fail, name, err.Error()}
	}
	return Result{OK, name, path}
}

// nobody is in the range of the uids that VMs have of their own.
const nobody = 1<<31 - 2

func readable(path, user string) error {
	uid, gid := uint32(nobody), uint32(nobody)
	if user != "" {
		var err error
		if uid, gid, err = hostcheck.LookupUser(user); err != nil {
			return nil // it has its own line
		}
	}
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	return hostcheck.CheckReadable(f, uid, gid)
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
