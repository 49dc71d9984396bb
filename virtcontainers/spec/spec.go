// Package spec rewrites the OCI spec of a container for the guest: what lies on
// the host is renamed to where the guest finds it, and what the guest cannot
// honour is refused by the field's name. It does no I/O.
package spec

import (
	"errors"
	"fmt"
	"maps"
	"path"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"

	agentv1 "github.com/husk-containers/husk/protocols/agent/v1"
)

// GuestShare is the guest directory at which the host's share is mounted. Below
// it each container has a directory with its rootfs, and each volume is a directory
// or file, whichever containers mount it:
//
//	/run/husk/share/<container>-<n>/rootfs
//	/run/husk/share/.volumes/<n>
//
// No name is used twice: the guest's kernel may know for a second, or longer, what was
// there before.
const GuestShare = "/run/husk/share"

// cgroupRoot holds the containers' cgroups in the guest.
const cgroupRoot = "/husk"

// guestVersion is the newest version of the spec that crun 1.8, the guest's
// runtime, takes for known. Newer fields that it would not heed are refused by
// name, so what is left says the same in the older version.
const guestVersion = "1.0.2"

// A Plan is a spec as the guest gets it, and what the host owes it.
type Plan struct {
	Spec *specs.Spec
	// RootPath is the host's root.path, as it was: absolute or relative to the
	// bundle.
	RootPath string
	// Binds are the host's paths that Spec mounts, each once it is told where the
	// guest has it.
	Binds []*Bind
	// Sysctls are for the guest as a whole: its network is no namespace of the
	// container's.
	Sysctls map[string]string
	// Network is which network the spec asks for.
	Network Network
	// CgroupsPath is the host's linux.cgroupsPath, as it was.
	CgroupsPath string
	// CPUs and Mems are the host's CPUs and memory nodes that the container is bound to,
	// as lists such as "0-2,7"; empty: any.
	CPUs, Mems string
	// OwnPID: the container gets a PID namespace of its own.
	OwnPID bool
	// Shm is the bind mount at /dev/shm, nil where there is none. Which file system it
	// is of decides what becomes of it: where it is shared memory, GuestShm is called
	// before Spec and Binds are used.
	Shm *Bind
	// Notes name what the spec says of the host and means another thing, or none,
	// in a guest: labels of the host's security modules, set by its engine for
	// every container, and namespaces of the host that the guest's stand in for.
	Notes []string

	privateIPC bool
}

// A Network is a spec's word on the network namespace.
type Network struct {
	// Host: the spec has none, and so asks for the host's own network.
	Host bool
	// Path of an existing namespace; empty where the spec asks for a new one.
	Path string
}

// Pod returns what the spec of a pod's sandbox container, which runs nothing in the
// guest, says of the guest as a whole: its Network, Sysctls and Shm. Its error is that
// of Transform.
func Pod(sp *specs.Spec) (*Plan, error) {
	if err := check(sp, true); err != nil {
		return nil, err
	}
	p := &Plan{Sysctls: sp.Linux.Sysctl}
	_, p.Network, _ = namespaces(sp.Linux.Namespaces)
	mounts, binds, err := mounts(sp)
	if err != nil {
		return nil, err
	}
	p.Binds = binds
	p.takeShm(mounts, true, true)
	return p, nil
}

func check(sp *specs.Spec, pod bool) error {
	if sp == nil || sp.Process == nil || sp.Root == nil || sp.Linux == nil {
		return fmt.Errorf("the spec lacks process, root or linux: %w", errdefs.ErrInvalidArgument)
	}
	return refuse(sp, pod)
}

// RootIn says in which directory of the share the root file system is.
func (p *Plan) RootIn(dir string) { p.Spec.Root.Path = path.Join(GuestShare, dir, "rootfs") }

// Transform returns what becomes of sp, which it leaves as it is, for the
// container of that id, in a pod or alone, once RootIn and each bind's At have been
// called. Its error is InvalidArgument or
// NotImplemented and names every field that the guest cannot honour.
func Transform(sp *specs.Spec, id string, pod bool) (*Plan, error) {
	if err := check(sp, pod); err != nil {
		return nil, err
	}
	p := &Plan{RootPath: sp.Root.Path, CgroupsPath: sp.Linux.CgroupsPath}
	out := *sp
	root, linux := *sp.Root, *sp.Linux
	out.Root, out.Linux = &root, &linux
	out.Hooks = nil
	// Annotations speak to the host's runtime; the guest's would take orders
	// from some of them.
	out.Annotations = nil
	process, err := TransformProcess(sp.Process, "process")
	if err != nil {
		return nil, err
	}
	out.Process = process
	out.Version = guestVersion
	p.note(sp)
	linux.CgroupsPath = path.Join(cgroupRoot, id)
	if linux.Resources, p.CPUs, p.Mems, err = Resources(sp.Linux.Resources); err != nil {
		return nil, err
	}
	linux.MountLabel = ""
	var private func(specs.LinuxNamespaceType) bool
	linux.Namespaces, p.Network, private = namespaces(sp.Linux.Namespaces)
	if !private(specs.UTSNamespace) {
		out.Hostname = "" // the name is the sandbox's, whoever joins
	}
	linux.Sysctl, p.Sysctls = splitSysctls(sp.Linux.Sysctl, private(specs.IPCNamespace))
	if out.Mounts, p.Binds, err = mounts(sp); err != nil {
		return nil, err
	}
	for _, b := range p.Binds {
		b.linux = &linux
	}
	p.OwnPID = private(specs.PIDNamespace)
	p.takeShm(out.Mounts, pod, private(specs.IPCNamespace))
	p.Spec = &out
	return p, nil
}

// TransformProcess does for one process what Transform does for a spec; field
// names it in errors.
func TransformProcess(pr *specs.Process, field string) (*specs.Process, error) {
	if pr == nil {
		return nil, fmt.Errorf("%s is missing: %w", field, errdefs.ErrInvalidArgument)
	}
	if err := join(refuseProcess(pr, field)); err != nil {
		return nil, err
	}
	out := *pr
	out.ApparmorProfile = ""
	out.SelinuxLabel = ""
	return &out, nil
}

// shared are the namespaces that a spec may leave out to share the host's. The
// container then shares the guest's.
var shared = []specs.LinuxNamespaceType{specs.PIDNamespace, specs.IPCNamespace, specs.UTSNamespace}

// note lists what Transform leaves out because it confines on the host what now
// is confined by the guest, and what it takes for the guest's.
func (p *Plan) note(sp *specs.Spec) {
	p.Notes = ProcessNotes(sp.Process, "process")
	if l := sp.Linux.MountLabel; l != "" {
		p.Notes = append(p.Notes, "linux.mountLabel="+l)
	}
	for _, typ := range shared {
		if !slices.ContainsFunc(sp.Linux.Namespaces, func(ns specs.LinuxNamespace) bool { return ns.Type == typ }) {
			p.Notes = append(p.Notes, fmt.Sprintf("linux.namespaces without %s: the guest's, not the host's", typ))
		}
	}
}

// ProcessNotes does for one process what Plan.Notes does for a spec; field names
// it.
func ProcessNotes(pr *specs.Process, field string) []string {
	var notes []string
	for _, f := range []struct{ name, value string }{
		{".apparmorProfile", pr.ApparmorProfile},
		{".selinuxLabel", pr.SelinuxLabel},
	} {
		if f.value != "" {
			notes = append(notes, field+f.name+"="+f.value)
		}
	}
	return notes
}

// namespaces returns those that the guest's runtime makes or joins, and which
// network the host owes. What containers of a pod share is the guest's own, but for
// process ids: in the guest's own namespace they would see the agent. A container's
// cgroup namespace is its own always: hosts with version 1 of cgroups have none to
// ask for, and then their engines show a container its own cgroup in other ways. private tells whether a container has a new namespace of a
// type, rather than one that it shares.
func namespaces(all []specs.LinuxNamespace) (out []specs.LinuxNamespace, network Network, private func(specs.LinuxNamespaceType) bool) {
	network.Host = true
	for _, ns := range all {
		switch {
		case ns.Type == specs.NetworkNamespace:
			network = Network{Path: ns.Path}
		case ns.Type == specs.CgroupNamespace:
		case ns.Path == "":
			out = append(out, ns)
		case ns.Type == specs.PIDNamespace:
			out = append(out, specs.LinuxNamespace{Type: ns.Type, Path: agentv1.SharedPID})
		}
	}
	out = append(out, specs.LinuxNamespace{Type: specs.CgroupNamespace})
	return out, network, func(typ specs.LinuxNamespaceType) bool {
		return slices.Contains(out, specs.LinuxNamespace{Type: typ})
	}
}

// ipcSysctl tells whether a parameter belongs to an IPC namespace
// (sysctl(8), ipc/ipc_sysctl.c and ipc/mq_sysctl.c in Linux).
func ipcSysctl(key string) bool {
	return strings.HasPrefix(key, "fs.mqueue.") || strings.HasPrefix(key, "kernel.shm") || strings.HasPrefix(key, "kernel.msg") || key == "kernel.sem"
}

// splitSysctls parts what crun sets in the container's own namespaces from what
// belongs to the guest as a whole: its network, and without a private one its IPC
// namespace.
func splitSysctls(all map[string]string, privateIPC bool) (container, guest map[string]string) {
	container, guest = maps.Clone(all), map[string]string{}
	for k, v := range all {
		key := strings.ReplaceAll(k, "/", ".")
		if strings.HasPrefix(key, "net.") || !privateIPC && ipcSysctl(key) {
			guest[k] = v
			delete(container, k)
		}
	}
	return container, guest
}

// unsupported is the error for a field whose meaning the guest cannot give.
func unsupported(field, what string) error {
	return fmt.Errorf("%s: %s cannot be had in a guest: %w", field, what, errdefs.ErrNotImplemented)
}

// join makes one line of several errors and keeps their classes.
func join(errs []error) error {
	switch len(errs) {
	case 0:
		return nil
	case 1:
		return errs[0]
	}
	var lines []string
	for _, e := range errs {
		lines = append(lines, e.Error())
	}
	return &joined{strings.Join(lines, "; "), errors.Join(errs...)}
}

type joined struct {
	line string
	error
}

func (j *joined) Error() string { return j.line }
func (j *joined) Unwrap() error { return j.error }
