package daemon

import (
	"fmt"
	"os"
	"path/filepath"
)

// A Generation is one containerd to test with.
type Generation struct {
	// Name as in Lookup, such as "1.6".
	Name string
	// Containerd and Ctr are paths of the programs; the shims beside them are
	// found before the system's.
	Containerd, Ctr string
	config          string
	cri             string
}

// Lookup finds a generation by name: "1.6" is the machine's own package, "2.4"
// what `make containerd-2.4` puts below the repository's root.
func Lookup(root, name string) (Generation, error) {
	g := Generation{Name: name}
	switch name {
	case "1.6":
		g.Containerd, g.Ctr, g.config = "/usr/bin/containerd", "/usr/bin/ctr", config1
		g.cri = cri1
	case "2.4":
		dir := filepath.Join(root, "build", "containerd-2.4")
		g.Containerd, g.Ctr, g.config = filepath.Join(dir, "containerd"), filepath.Join(dir, "ctr"), config2
		g.cri = cri2
	default:
		return Generation{}, fmt.Errorf("find containerd %q: there are 1.6 and 2.4", name)
	}
	if _, err := os.Stat(g.Containerd); err != nil {
		return Generation{}, fmt.Errorf("find containerd %s: %w; `make deps containerd-2.4` gets both", name, err)
	}
	return g, nil
}

// config1 is a configuration of containerd 1.6 and 1.7. No plugin of it writes
// outside root and state: opt and NRI would, and CRI, where nobody asked for it,
// and the other snapshotters only cost start-up time.
const config1 = `version = 2
root = "{dir}/root"
state = "{dir}/state"
disabled_plugins = [{no-cri}
  "io.containerd.internal.v1.opt",
  "io.containerd.nri.v1.nri",
  "io.containerd.snapshotter.v1.aufs",
  "io.containerd.snapshotter.v1.btrfs",
  "io.containerd.snapshotter.v1.devmapper",
  "io.containerd.snapshotter.v1.zfs",
]

[grpc]
  address = "{dir}/c.sock"

[debug]
  level = "info"

[timeouts]
  "io.containerd.timeout.shim.cleanup" = "{cleanup}"
`

const config2 = `version = 3
root = "{dir}/root"
state = "{dir}/state"
disabled_plugins = [{no-cri}
  "io.containerd.internal.v1.opt",
  "io.containerd.nri.v1.nri",
  "io.containerd.snapshotter.v1.blockfile",
  "io.containerd.snapshotter.v1.btrfs",
  "io.containerd.snapshotter.v1.devmapper",
  "io.containerd.snapshotter.v1.erofs",
  "io.containerd.snapshotter.v1.zfs",
]

[grpc]
  address = "{dir}/c.sock"

[debug]
  level = "info"

[timeouts]
  "io.containerd.timeout.shim.cleanup" = "{cleanup}"
`
