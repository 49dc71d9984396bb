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
)

// GuestShare is the guest directory at which the host's share is mounted. Below
// it each container has a directory with its rootfs and its mounts:
//
//	/run/husk/share/<container>/rootfs
//	/run/husk/share/<container>/mnt/<n>
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
	// Binds are the host paths to share, Binds[n] as mnt/n.
	Binds []Bind
	// Sysctls are for the guest as a whole: its network is no namespace of the
	// container's.
	Sysctls map[string]string
	// Notes name what the spec says of the host and means another thing, or none,
	// in a guest: labels of the host's security modules, set by its engine for
	// every container, and namespaces of the host that the guest's stand in for.
	Notes []string
}

// A Bind is a host path that the guest is to see.
type Bind struct {
	// Field names the mount for errors: `mounts[3] (/data)`.
	Field string
	// Source is the host path, absolute or relative to the bundle.
	Source string
	// Recursive includes the mounts below Source.
	Recursive bool
	// ReadOnly is enforced on the host too: the guest is not trusted with it.
	ReadOnly bool
}

// Transform returns what becomes of sp, which it leaves as it is, for the
// container of that id. Its error is InvalidArgument or NotImplemented and names
// every field that the guest cannot honour.
func Transform(sp *specs.Spec, id string) (*Plan, error) {
	if sp == nil || sp.Process == nil || sp.Root == nil || sp.Linux == nil {
		return nil, fmt.Errorf("the spec lacks process, root or linux: %w", errdefs.ErrInvalidArgument)
	}
	if err := refuse(sp); err != nil {
		return nil, err
	}
	p := &Plan{RootPath: sp.Root.Path}
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
	root.Path = path.Join(GuestShare, id, "rootfs")
	linux.CgroupsPath = path.Join(cgroupRoot, id)
	linux.MountLabel = ""
	linux.Namespaces = slices.DeleteFunc(slices.Clone(linux.Namespaces), func(ns specs.LinuxNamespace) bool {
		return ns.Type == specs.NetworkNamespace
	})
	linux.Sysctl, p.Sysctls = splitSysctls(sp.Linux.Sysctl)
	if out.Mounts, p.Binds, err = mounts(sp.Mounts, id); err != nil {
		return nil, err
	}
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

// splitSysctls parts what crun sets in the container's own namespaces from what
// belongs to the guest's network.
func splitSysctls(all map[string]string) (container, guest map[string]string) {
	container, guest = maps.Clone(all), map[string]string{}
	for k, v := range all {
		if strings.HasPrefix(strings.ReplaceAll(k, "/", "."), "net.") {
			guest[k] = v
			delete(container, k)
		}
	}
	return container, guest
}

// guestFilesystems are the mount types that the guest's kernel provides itself.
var guestFilesystems = []string{"proc", "sysfs", "tmpfs", "devpts", "mqueue", "cgroup", "cgroup2", "devtmpfs", "ramfs"}

func mounts(in []specs.Mount, id string) ([]specs.Mount, []Bind, error) {
	var out []specs.Mount
	var binds []Bind
	var errs []error
	for i, m := range in {
		field := fmt.Sprintf("mounts[%d] (%s)", i, m.Destination)
		bind := m.Type == "bind" || slices.Contains(m.Options, "bind") || slices.Contains(m.Options, "rbind")
		switch {
		case !path.IsAbs(m.Destination):
			errs = append(errs, fmt.Errorf("%s: the destination is not absolute: %w", field, errdefs.ErrInvalidArgument))
		case len(m.UIDMappings) > 0 || len(m.GIDMappings) > 0:
			errs = append(errs, unsupported(field+".uidMappings", "id-mapped mounts"))
		case bind && m.Source == "":
			errs = append(errs, fmt.Errorf("%s: a bind mount without a source: %w", field, errdefs.ErrInvalidArgument))
		case bind:
			binds = append(binds, Bind{
				Field: field, Source: m.Source,
				Recursive: !slices.Contains(m.Options, "bind"),
				ReadOnly:  slices.Contains(m.Options, "ro") || slices.Contains(m.Options, "rro"),
			})
			m.Type = "bind"
			m.Source = path.Join(GuestShare, id, "mnt", fmt.Sprint(len(binds)-1))
			out = append(out, m)
		case slices.Contains(guestFilesystems, m.Type):
			out = append(out, m)
		default:
			errs = append(errs, unsupported(field+".type", fmt.Sprintf("file system type %q", m.Type)))
		}
	}
	return out, binds, join(errs)
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
