package daemon

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/husk-containers/husk/test/images"
)

// CRI is what a containerd that serves CRI needs. Its runtime handlers are
// "runc", "husk", and, from containerd 2 on, "husk-shim", which uses the sandbox
// API.
//
// Such a containerd runs in a network namespace of its own, the node's, whose
// loopback is up: bridges and the hosts' ends of pods' interfaces are made there
// and go with it.
type CRI struct {
	// Networks are CNI configuration lists in JSON, one for each interface of a
	// pod: eth0, eth1 and so on. In them {dir} and {token} stand for Dir and Token.
	Networks []string
	// Plugins are programs by the name of the CNI plugin that they are, beside
	// those of Debian's package containernetworking-plugins.
	Plugins map[string]string
}

// cniPlugins is where Debian's package has them.
const cniPlugins = "/usr/lib/cni"

// cniResults is where every containerd's CNI library keeps what plugins said.
const cniResults = "/var/lib/cni/results"

// criState is where containerd keeps pods and their containers, below root and
// state.
const criState = "io.containerd.grpc.v1.cri"

// NetNS is the path of the network namespace of a containerd with CRI, while
// the daemon is there.
func (d *Daemon) NetNS() string {
	return fmt.Sprintf("/proc/%d/ns/net", d.supervisor.cmd.Process.Pid)
}

// PodNetNS lists the paths of the network namespaces that CRI has made for pods
// and not removed.
func (d *Daemon) PodNetNS() []string {
	return d.glob("state/" + criState + "/netns/*")
}

// AddressDir is below which the networks' plugins keep the addresses they gave
// away, where their configuration says {dir}/addresses.
func (d *Daemon) AddressDir() string { return d.file("addresses") }

func (d *Daemon) namespace() string {
	if d.cfg.CRI != nil {
		return "k8s.io"
	}
	return d.Token
}

// prepareCRI fills the directories of CNI's configuration and plugins.
func (d *Daemon) prepareCRI() error {
	if d.cfg.CRI == nil {
		return nil
	}
	bin, conf := d.file("cni/bin"), d.file("cni/conf")
	for _, dir := range []string{bin, conf} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return fmt.Errorf("make CNI directory: %w", err)
		}
	}
	installed, err := filepath.Glob(filepath.Join(cniPlugins, "*"))
	if err != nil || len(installed) == 0 {
		return fmt.Errorf("find CNI plugins in %s: none there; install the package containernetworking-plugins", cniPlugins)
	}
	plugins := map[string]string{}
	for _, path := range installed {
		plugins[filepath.Base(path)] = path
	}
	for name, path := range d.cfg.CRI.Plugins {
		plugins[name] = path
	}
	for name, path := range plugins {
		if err := os.Symlink(path, filepath.Join(bin, name)); err != nil {
			return fmt.Errorf("link CNI plugin: %w", err)
		}
	}
	expand := strings.NewReplacer("{dir}", d.Dir, "{token}", d.Token)
	for i, network := range d.cfg.CRI.Networks {
		path := filepath.Join(conf, fmt.Sprintf("%02d.conflist", i))
		if err := os.WriteFile(path, []byte(expand.Replace(network)), 0o600); err != nil {
			return fmt.Errorf("write CNI configuration: %w", err)
		}
	}
	return nil
}

// podFiles lists what belongs to a pod in the directories of CRI and CNI:
// nothing, when there is no pod.
func (d *Daemon) podFiles() []string {
	if d.cfg.CRI == nil {
		return nil
	}
	list := d.PodNetNS()
	for _, top := range []string{"root/", "state/"} {
		for _, sub := range []string{criState, "io.containerd.podsandbox.controller.v1.podsandbox"} {
			list = append(list, d.glob(top+sub+"/sandboxes/*")...)
			list = append(list, d.glob(top+sub+"/containers/*")...)
		}
	}
	// Addresses are files named like them, whose name holds a dot or a colon.
	list = append(list, d.glob("addresses/*/*[0-9a-f][.:]*")...)
	return append(list, d.results()...)
}

// results lists what CNI's library keeps of this daemon's networks, outside its
// directory.
func (d *Daemon) results() []string {
	paths, err := filepath.Glob(filepath.Join(cniResults, d.Token+"*"))
	if err != nil {
		panic(err) // the pattern is well-formed
	}
	return paths
}

func (d *Daemon) glob(pattern string) []string {
	paths, err := filepath.Glob(d.file(pattern))
	if err != nil {
		panic(err) // the pattern is well-formed
	}
	return paths
}

// configuration is containerd's.
func (d *Daemon) configuration() []byte {
	text, without := d.cfg.Generation.config, withoutCRI
	networks := 0
	if d.cfg.CRI != nil {
		text, without = text+d.cfg.Generation.cri, ""
		networks = len(d.cfg.CRI.Networks)
	}
	return []byte(strings.NewReplacer("{no-cri}", without, "{cleanup}", cleanupTimeout(), "{dir}", d.Dir, "{pause}", images.Pause,
		"{networks}", fmt.Sprint(networks)).Replace(text))
}

// withoutCRI disables it, as far as a containerd knows these plugins.
const withoutCRI = `
  "io.containerd.grpc.v1.cri",
  "io.containerd.cri.v1.images",
  "io.containerd.cri.v1.runtime",
  "io.containerd.podsandbox.controller.v1.podsandbox",`

// cri1 is the part of a configuration that sets CRI up, of containerd 1.6 and
// 1.7. To lower oom_score_adj takes CAP_SYS_RESOURCE, which tests do not ask for.
const cri1 = `
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{pause}"
  disable_apparmor = true
  restrict_oom_score_adj = true
  netns_mounts_under_state_dir = true
  stream_server_address = "127.0.0.1"
  stream_server_port = "0"

[plugins."io.containerd.grpc.v1.cri".cni]
  bin_dir = "{dir}/cni/bin"
  conf_dir = "{dir}/cni/conf"
  max_conf_num = {networks}

[plugins."io.containerd.grpc.v1.cri".containerd]
  default_runtime_name = "runc"

[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
  runtime_type = "io.containerd.runc.v2"

[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.husk]
  runtime_type = "io.containerd.husk.v2"
  pod_annotations = ["io.husk.*"]
  container_annotations = ["io.husk.*", "io.kubernetes.container.terminationMessagePath"]
  privileged_without_host_devices = true
`

// cri2 is cri1 for containerd 2.
const cri2 = `
[plugins."io.containerd.grpc.v1.cri"]
  stream_server_address = "127.0.0.1"
  stream_server_port = "0"

[plugins."io.containerd.cri.v1.images".pinned_images]
  sandbox = "{pause}"

[plugins."io.containerd.cri.v1.runtime"]
  disable_apparmor = true
  restrict_oom_score_adj = true
  netns_mounts_under_state_dir = true

[plugins."io.containerd.cri.v1.runtime".cni]
  bin_dirs = ["{dir}/cni/bin"]
  conf_dir = "{dir}/cni/conf"
  max_conf_num = {networks}

[plugins."io.containerd.cri.v1.runtime".containerd]
  default_runtime_name = "runc"

[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc]
  runtime_type = "io.containerd.runc.v2"

[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.husk]
  runtime_type = "io.containerd.husk.v2"
  sandboxer = "podsandbox"
  pod_annotations = ["io.husk.*"]
  container_annotations = ["io.husk.*", "io.kubernetes.container.terminationMessagePath"]
  privileged_without_host_devices = true
  privileged_without_host_devices_all_devices_allowed = true

[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.husk-shim]
  runtime_type = "io.containerd.husk.v2"
  sandboxer = "shim"
  pod_annotations = ["io.husk.*"]
  container_annotations = ["io.husk.*", "io.kubernetes.container.terminationMessagePath"]
  privileged_without_host_devices = true
  privileged_without_host_devices_all_devices_allowed = true
`

// cleanupTimeout is how long containerd waits for what takes back what a dead shim left:
// its default, but on an emulated host, where a program may take that long to begin.
func cleanupTimeout() string {
	if os.Getenv("HUSK_RIG") != "" {
		return "30s"
	}
	return "5s"
}
