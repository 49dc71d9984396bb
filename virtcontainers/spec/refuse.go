package spec

//lint:file-ignore SA1019 Fields that are deprecated may still be set: they are refused by name.

import (
	"fmt"
	"slices"

	"github.com/opencontainers/runtime-spec/specs-go"
)

// refuse names everything in sp that the guest cannot honour. What is not named
// here is either the guest runtime's to do or rewritten by Transform.
func refuse(sp *specs.Spec, pod bool) error {
	var errs []error
	no := func(present bool, field, what string) {
		if present {
			errs = append(errs, unsupported(field, what))
		}
	}
	no(sp.Windows != nil, "windows", "a Windows container")
	no(sp.Solaris != nil, "solaris", "a Solaris container")
	no(sp.ZOS != nil, "zos", "a z/OS container")
	no(sp.FreeBSD != nil, "freebsd", "a FreeBSD container")
	no(sp.VM != nil, "vm", "a VM of the spec's own making")
	if h := sp.Hooks; h != nil {
		for _, f := range []struct {
			name  string
			hooks []specs.Hook
		}{
			{"prestart", h.Prestart},
			{"createRuntime", h.CreateRuntime},
			{"createContainer", h.CreateContainer},
			{"startContainer", h.StartContainer},
			{"poststart", h.Poststart},
			{"poststop", h.Poststop},
		} {
			no(len(f.hooks) > 0, "hooks."+f.name, "a program of the host")
		}
	}
	no(sp.Domainname != "", "domainname", "an NIS domain name")
	l := sp.Linux
	no(len(l.UIDMappings) > 0, "linux.uidMappings", "a user namespace")
	no(len(l.GIDMappings) > 0, "linux.gidMappings", "a user namespace")
	no(len(l.NetDevices) > 0, "linux.netDevices", "a network device of the host")
	no(l.IntelRdt != nil, "linux.intelRdt", "the host's cache allocation")
	no(l.MemoryPolicy != nil, "linux.memoryPolicy", "a memory policy over the host's nodes")
	no(len(l.TimeOffsets) > 0, "linux.timeOffsets", "a time namespace")
	no(l.Seccomp != nil && l.Seccomp.ListenerPath != "", "linux.seccomp.listenerPath", "a seccomp listener on the host")
	errs = append(errs, refuseNamespaces(l.Namespaces, pod)...)
	errs = append(errs, refuseDevices(l.Devices)...)
	if l.Resources != nil {
		errs = append(errs, refuseResources(l.Resources)...)
	}
	return join(errs)
}

func refuseProcess(pr *specs.Process, field string) []error {
	var errs []error
	no := func(present bool, name, what string) {
		if present {
			errs = append(errs, unsupported(field+"."+name, what))
		}
	}
	no(pr.CommandLine != "", "commandLine", "a Windows command line")
	no(pr.User.Username != "", "user.username", "a user by name")
	no(pr.Scheduler != nil, "scheduler", "a scheduling policy")
	no(pr.IOPriority != nil, "ioPriority", "an I/O priority")
	no(pr.ExecCPUAffinity != nil, "execCPUAffinity", "an affinity to the host's CPUs")
	return errs
}

// mayJoin are the namespaces that may have a path in a pod: which one it names on the
// host is the host's matter; in the guest it is the one that the pod's containers
// share.
var mayJoin = []specs.LinuxNamespaceType{specs.PIDNamespace, specs.IPCNamespace, specs.UTSNamespace}

func refuseNamespaces(nss []specs.LinuxNamespace, pod bool) []error {
	var errs []error
	for i, ns := range nss {
		field := fmt.Sprintf("linux.namespaces[%d] (%s)", i, ns.Type)
		switch {
		case ns.Type == specs.UserNamespace:
			errs = append(errs, unsupported(field, "a user namespace"))
		case ns.Type == specs.TimeNamespace:
			errs = append(errs, unsupported(field, "a time namespace"))
		case ns.Path != "" && ns.Type != specs.NetworkNamespace && !(pod && slices.Contains(mayJoin, ns.Type)):
			errs = append(errs, unsupported(field+".path", fmt.Sprintf("the host's namespace %s", ns.Path)))
		}
	}
	return errs
}

// StaticChar tells whether a character device's number means the same in every
// Linux kernel: memory devices, consoles, and the miscellaneous devices whose
// minor is not given out at run time (Documentation/admin-guide/devices.txt).
func StaticChar(major, minor int64) bool {
	switch major {
	case 1, 5:
		return true
	case 10:
		return minor < 255
	}
	return false
}

func refuseDevices(devices []specs.LinuxDevice) []error {
	var errs []error
	for i, d := range devices {
		if d.Type == "p" || (d.Type == "c" || d.Type == "u") && StaticChar(d.Major, d.Minor) {
			continue
		}
		errs = append(errs, unsupported(fmt.Sprintf("linux.devices[%d] (%s)", i, d.Path),
			fmt.Sprintf("the host's device %s %d:%d", d.Type, d.Major, d.Minor)))
	}
	return errs
}
