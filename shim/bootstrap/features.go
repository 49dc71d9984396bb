package bootstrap

import (
	"encoding/json"

	"github.com/containerd/containerd/v2/pkg/cap"
	"github.com/opencontainers/runtime-spec/specs-go"
	"github.com/opencontainers/runtime-spec/specs-go/features"
	"google.golang.org/protobuf/types/known/anypb"
)

// featuresType is the URL by which containerd 2.x knows the OCI runtime's features,
// which are JSON (its core/runtime registers them so).
const featuresType = "types.containerd.io/opencontainers/runtime-spec/1/features/Features"

// mountOptions are those that a mount in a guest heeds. Their second forms, which
// begin with another r, hold for the mounts below too. By rro containerd's CRI tells
// that a pod may ask for recursive read-only mounts.
var mountOptions = []string{
	"async", "bind", "defaults", "dev", "diratime", "dirsync", "exec", "noatime", "nodev", "nodiratime", "noexec",
	"norelatime", "nostrictatime", "nosuid", "private", "rbind", "relatime", "ro", "rprivate", "rshared", "rslave",
	"runbindable", "rw", "shared", "slave", "strictatime", "suid", "sync", "unbindable",
	"rdev", "rdiratime", "rexec", "rnoatime", "rnodev", "rnodiratime", "rnoexec", "rnorelatime", "rnostrictatime",
	"rnosuid", "rrelatime", "rro", "rrw", "rstrictatime", "rsuid",
}

// runtimeFeatures says what of an OCI spec a container may ask for, as docs/limits.md
// does. What is left out is unknown to who reads it, but for hooks: an empty list, which
// would say that there are none, cannot be written.
func runtimeFeatures() features.Features {
	yes, no := true, false
	return features.Features{
		OCIVersionMin: "1.0.0",
		OCIVersionMax: specs.Version,
		MountOptions:  mountOptions,
		Linux: &features.Linux{
			Namespaces: []string{
				string(specs.CgroupNamespace), string(specs.IPCNamespace), string(specs.MountNamespace),
				string(specs.NetworkNamespace), string(specs.PIDNamespace), string(specs.UTSNamespace),
			},
			Capabilities: cap.Known(),
			Cgroup:       &features.Cgroup{V1: &no, V2: &yes, Systemd: &no, SystemdUser: &no, Rdma: &no},
			Seccomp: &features.Seccomp{
				Enabled: &yes,
				// Without a listener on the host there is no SCMP_ACT_NOTIFY.
				Actions: []string{
					string(specs.ActAllow), string(specs.ActErrno), string(specs.ActKill), string(specs.ActKillProcess),
					string(specs.ActKillThread), string(specs.ActLog), string(specs.ActTrace), string(specs.ActTrap),
				},
				Operators: []string{
					string(specs.OpEqualTo), string(specs.OpGreaterEqual), string(specs.OpGreaterThan), string(specs.OpLessEqual),
					string(specs.OpLessThan), string(specs.OpMaskedEqual), string(specs.OpNotEqual),
				},
			},
			Apparmor:        &features.Apparmor{Enabled: &no},
			Selinux:         &features.Selinux{Enabled: &no},
			IntelRdt:        &features.IntelRdt{Enabled: &no},
			MountExtensions: &features.MountExtensions{IDMap: &features.IDMap{Enabled: &no}},
			NetDevices:      &features.NetDevices{Enabled: &no},
		},
	}
}

// encodeFeatures puts the features in the form that containerd decodes.
func encodeFeatures() (*anypb.Any, error) {
	raw, err := json.Marshal(runtimeFeatures())
	if err != nil {
		return nil, err
	}
	return &anypb.Any{TypeUrl: featuresType, Value: raw}, nil
}
