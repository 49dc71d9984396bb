package container

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"slices"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	agentv1 "github.com/husk-containers/husk/protocols/agent/v1"
)

// cgroupParent is the cgroup of all containers, as a spec names it.
const cgroupParent = "/husk/"

func invalid(format string, args ...any) error {
	return fmt.Errorf(format+": %w", append(args, errdefs.ErrInvalidArgument)...)
}

// strict decodes strictly: a field that the guest would not honour is an error.
func strict(data []byte, into any) error {
	d := json.NewDecoder(bytes.NewReader(data))
	d.DisallowUnknownFields()
	if err := d.Decode(into); err != nil {
		return invalid("decode spec: %v", err)
	}
	if _, err := d.Token(); err != io.EOF {
		return invalid("decode spec: more than one JSON value")
	}
	return nil
}

// DecodeSpec decodes the OCI spec of a container and holds it against what the
// host owes the guest.
func DecodeSpec(id string, data []byte, terminal bool) (*specs.Spec, error) {
	spec := &specs.Spec{}
	if err := strict(data, spec); err != nil {
		return nil, err
	}
	if spec.Root == nil || !agentv1.Below(spec.Root.Path, agentv1.GuestDir) {
		return nil, invalid("root.path is not a clean path below %s", agentv1.GuestDir)
	}
	if spec.Linux == nil || spec.Linux.CgroupsPath != cgroupParent+id {
		return nil, invalid("linux.cgroupsPath is not %q", cgroupParent+id)
	}
	for _, ns := range spec.Linux.Namespaces {
		_, ofContainer := agentv1.ContainerOfPID(ns.Path)
		if ns.Path != "" && (ns.Type != specs.PIDNamespace || ns.Path != agentv1.SharedPID && !ofContainer) {
			return nil, invalid("linux.namespaces: %s has the path %q, and only pid may have one, %s or %s",
				ns.Type, ns.Path, agentv1.SharedPID, agentv1.ContainerPID("<container>"))
		}
	}
	for _, m := range spec.Mounts {
		if _, ok := agentv1.DeviceOfNode(m.Source); !ok && agentv1.Below(m.Source, agentv1.GuestDir+"/dev") {
			return nil, invalid("mounts: %s has the source %q, which is of no device", m.Destination, m.Source)
		}
	}
	if spec.Process == nil {
		return nil, invalid("process is missing")
	}
	return spec, checkProcess(spec.Process, terminal)
}

// HasOwnPID tells whether a container has a PID namespace of its own.
func HasOwnPID(spec *specs.Spec) bool {
	return slices.Contains(spec.Linux.Namespaces, specs.LinuxNamespace{Type: specs.PIDNamespace})
}

// DecodeResources decodes the OCI resources of an update.
func DecodeResources(data []byte) (*specs.LinuxResources, error) {
	r := &specs.LinuxResources{}
	return r, strict(data, r)
}

// DecodeProcess decodes the OCI process of an exec.
func DecodeProcess(data []byte, terminal bool) (*specs.Process, error) {
	p := &specs.Process{}
	if err := strict(data, p); err != nil {
		return nil, err
	}
	return p, checkProcess(p, terminal)
}

func checkProcess(p *specs.Process, terminal bool) error {
	if len(p.Args) == 0 || p.Args[0] == "" {
		return invalid("process.args is empty: name a command")
	}
	if len(p.Cwd) == 0 || p.Cwd[0] != '/' {
		return invalid("process.cwd %q is not an absolute path", p.Cwd)
	}
	if p.Terminal != terminal {
		return invalid("process.terminal is %t, the streams' is %t", p.Terminal, terminal)
	}
	return nil
}
