package spec

import (
	"fmt"
	"path"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"

	agentv1 "github.com/husk-containers/husk/protocols/agent/v1"
)

const shmPath = "/dev/shm"

// A Bind is a host path that a container mounts.
type Bind struct {
	// Field names the mount for errors: `mounts[3] (/data)`.
	Field string
	// Source is the host path, absolute or relative to the bundle.
	Source string
	Role   Role
	// Recursive includes the mounts below Source.
	Recursive bool
	// ReadOnly is of Source itself, AllReadOnly also of the mounts below it. Both are
	// enforced on the host too: the guest is not trusted with them.
	ReadOnly, AllReadOnly bool
	// Follows: what the host mounts later below Source appears too.
	Follows bool
	// Socket: Source has to be a unix socket.
	Socket bool
	// Unused: the guest has something of its own in its place.
	Unused bool

	mount *specs.Mount
	linux *specs.Linux
}

// A Role is what a container engine mounts a file for, known by where the container
// has it.
type Role int

// The roles.
const (
	// Volume is anything.
	Volume Role = iota
	// SystemFile is one of SystemFiles.
	SystemFile
	// TerminationLog takes the container's last words to the engine.
	TerminationLog
)

// SystemFiles are the files that an engine makes for each pod. Their places are
// CRI's.
var SystemFiles = []string{"/etc/hosts", "/etc/hostname", "/etc/resolv.conf"}

const (
	// terminationAnnotation is how the kubelet names the place of the termination
	// log, where the engine passes the annotation on.
	terminationAnnotation = "io.kubernetes.container.terminationMessagePath"
	// terminationPath is that place if nobody chooses another.
	terminationPath = "/dev/termination-log"
)

// roleOf tells what is mounted at a destination.
func roleOf(sp *specs.Spec, destination string) Role {
	destination = path.Clean(destination)
	log := sp.Annotations[terminationAnnotation]
	switch {
	case slices.Contains(SystemFiles, destination):
		return SystemFile
	case destination == terminationPath || log != "" && destination == path.Clean(log):
		return TerminationLog
	}
	return Volume
}

// At says where the guest has what is to be mounted. With follow, mounts that the
// guest's agent makes later below it appear in the container.
func (b *Bind) At(source string, follow bool) {
	b.mount.Source = source
	if !follow {
		return
	}
	b.mount.Options = append(slices.DeleteFunc(slices.Clone(b.mount.Options), isPropagation), "rslave")
	// The guest's runtime makes the container's binds in a mount namespace that
	// propagates as this says.
	b.linux.RootfsPropagation = "rslave"
}

// isPropagation tells whether a mount option is one of propagation.
func isPropagation(option string) bool {
	return slices.Contains([]string{"shared", "slave", "private", "unbindable"}, strings.TrimPrefix(option, "r"))
}

// guestFilesystems are the mount types that the guest's kernel provides itself.
var guestFilesystems = []string{"proc", "sysfs", "tmpfs", "devpts", "mqueue", "cgroup", "cgroup2", "devtmpfs", "ramfs"}

// mounts returns the mounts of the guest's spec, and those of them whose source is
// the host's.
func mounts(sp *specs.Spec) ([]specs.Mount, []*Bind, error) {
	out := make([]specs.Mount, 0, len(sp.Mounts)) // never moved: binds point into it
	var binds []*Bind
	var errs []error
	for i, m := range sp.Mounts {
		field := fmt.Sprintf("mounts[%d] (%s)", i, m.Destination)
		socket := m.Type == "uds"
		bind := socket || m.Type == "bind" || slices.Contains(m.Options, "bind") || slices.Contains(m.Options, "rbind")
		has := func(options ...string) bool {
			return slices.ContainsFunc(options, func(o string) bool { return slices.Contains(m.Options, o) })
		}
		switch {
		case !path.IsAbs(m.Destination):
			errs = append(errs, fmt.Errorf("%s: the destination is not absolute: %w", field, errdefs.ErrInvalidArgument))
		case len(m.UIDMappings) > 0 || len(m.GIDMappings) > 0:
			errs = append(errs, unsupported(field+".uidMappings", "id-mapped mounts"))
		case bind && m.Source == "":
			errs = append(errs, fmt.Errorf("%s: a bind mount without a source: %w", field, errdefs.ErrInvalidArgument))
		case bind && has("shared", "rshared"):
			errs = append(errs, toHost(field+".options"))
		case bind:
			b := &Bind{
				Field: field, Source: m.Source, Role: roleOf(sp, m.Destination), Socket: socket,
				Recursive: !slices.Contains(m.Options, "bind"),
				ReadOnly:  has("ro", "rro"), AllReadOnly: has("rro"),
				Follows: has("slave", "rslave"),
			}
			m.Type, m.Source = "bind", ""
			if !has("bind", "rbind") { // the guest's runtime goes by that alone
				m.Options = append(slices.Clone(m.Options), "rbind")
			}
			out = append(out, m)
			b.mount = &out[len(out)-1]
			binds = append(binds, b)
		case slices.Contains(guestFilesystems, m.Type):
			out = append(out, m)
		default:
			errs = append(errs, unsupported(field+".type", fmt.Sprintf("file system type %q", m.Type)))
		}
	}
	if p := sp.Linux.RootfsPropagation; len(errs) == 0 && (p == "shared" || p == "rshared") {
		errs = append(errs, toHost("linux.rootfsPropagation"))
	}
	return out, binds, join(errs)
}

// toHost is the error for mounts that are to propagate to the host.
func toHost(field string) error {
	return fmt.Errorf("%s: shared (Bidirectional): what is mounted in the guest cannot appear on the host: %w", field, errdefs.ErrNotImplemented)
}

// takeShm finds what is mounted last at /dev/shm. In a pod that goes with the IPC
// namespace: a tmpfs there is the sandbox's where the namespace is.
func (p *Plan) takeShm(mounts []specs.Mount, pod, privateIPC bool) {
	for i := range mounts {
		m := &mounts[i]
		if path.Clean(m.Destination) != shmPath {
			continue
		}
		p.Shm, p.privateIPC = nil, privateIPC
		switch {
		case m.Type == "bind":
			p.Shm = p.Binds[slices.IndexFunc(p.Binds, func(b *Bind) bool { return b.mount == m })]
		case m.Type == "tmpfs" && pod && !privateIPC:
			*m = sharedShm(m.Options)
		}
	}
}

// GuestShm has the container use shared memory of the guest at /dev/shm: the
// sandbox's where it shares the IPC namespace, or else its own of size bytes.
func (p *Plan) GuestShm(size uint64) {
	p.Shm.Unused = true
	if !p.privateIPC {
		*p.Shm.mount = sharedShm(p.Shm.mount.Options)
		return
	}
	*p.Shm.mount = specs.Mount{
		Destination: shmPath, Type: "tmpfs", Source: "shm",
		Options: []string{"nosuid", "noexec", "nodev", "mode=1777", fmt.Sprintf("size=%d", size)},
	}
}

// sharedShm is the mount of the sandbox's shared memory, read-only where options
// say so.
func sharedShm(options []string) specs.Mount {
	m := specs.Mount{Destination: shmPath, Type: "bind", Source: agentv1.SharedShm, Options: []string{"rbind", "nosuid", "noexec", "nodev"}}
	if slices.Contains(options, "ro") {
		m.Options = append(m.Options, "ro")
	}
	return m
}
