package main

import (
	"bytes"
	"compress/gzip"
	"debug/elf"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"slices"
	"strings"

	"github.com/containerd/errdefs"

	"github.com/husk-containers/husk/guest/initrd"
	"github.com/husk-containers/husk/guest/modules"
	"github.com/husk-containers/husk/internal/modindex"
)

// guestModules lists what the guest's kernel must be able to do. Dependencies are
// found by themselves, and what the kernel has built in needs no module.
func guestModules() []string {
	return []string{
		"virtio_pci",                 // every device
		"virtio_console",             // the virtio-serial channel
		"vmw_vsock_virtio_transport", // the vsock channel
		"virtiofs",                   // shared directories
		"virtio_net",                 // network interfaces
		"virtio_rng",                 // entropy from the host
		"virtio_balloon",             // memory back to the host
		"virtio_mem",                 // memory that comes and goes
	}
}

// onDemand lists what a guest may come to need, by what for. It is loaded when the
// kernel asks for it, which is when somebody uses it. What the kernel lacks is left
// out.
func onDemand() []string {
	return []string{
		"tun", "wireguard", // VPNs
		"overlay", "loop", // container builds, and containers in containers
		"veth", "bridge", "br_netfilter", "macvlan", "vxlan", "dummy", // their networks
		// and their packet filters: nft, and iptables by it
		"nf_tables", "nft_chain_nat", "nft_compat", "nft_connlimit", "nft_ct", "nft_fib_inet", "nft_hash", "nft_limit",
		"nft_log", "nft_masq", "nft_nat", "nft_numgen", "nft_objref", "nft_quota", "nft_redir", "nft_reject",
		"nft_reject_inet", "nft_socket", "nft_tproxy", "nf_log_syslog",
		"ipt_REJECT", "ip6t_REJECT", "xt_MASQUERADE", "xt_REDIRECT", "xt_TCPMSS", "xt_TPROXY", "xt_addrtype",
		"xt_comment", "xt_connmark", "xt_conntrack", "xt_limit", "xt_mark", "xt_multiport", "xt_nat", "xt_owner",
		"xt_socket", "xt_statistic", "xt_tcpudp",
	}
}

// layout returns what the initrd holds:
//
//	/init               the agent
//	/bin/crun
//	/lib/modules/*.ko   of the kernel whose modules are in modulesDir, uncompressed
//	/lib/modules/load   their paths, one a line, in the order to load them
//	/modules/*.ko.gz    those to load on demand, and what they need
//	/modules/index      of these (internal/modindex)
//	/dev/console        which the kernel opens for /init, and /dev/null
//
// and empty directories to mount on.
func layout(agent, crun, modulesDir string) ([]initrd.Entry, error) {
	init, err := readStatic(agent)
	if err != nil {
		return nil, fmt.Errorf("read agent: %w", err)
	}
	runtime, err := readStatic(crun)
	if err != nil {
		return nil, fmt.Errorf("read crun: %w", err)
	}
	tree, err := modules.Open(modulesDir)
	if err != nil {
		return nil, err
	}
	files, err := tree.Resolve(guestModules()...)
	if err != nil {
		return nil, err
	}
	entries := []initrd.Entry{
		initrd.File("init", 0o755, init),
		initrd.File("bin/crun", 0o755, runtime),
		initrd.CharDevice("dev/console", 0o600, 5, 1),
		initrd.CharDevice("dev/null", 0o666, 1, 3),
		initrd.Dir("proc", 0o755),
		initrd.Dir("run", 0o755),
		initrd.Dir("sys", 0o755),
		initrd.Dir("tmp", 0o777|fs.ModeSticky),
	}
	var load strings.Builder
	for _, file := range files {
		module, err := tree.Read(file)
		if err != nil {
			return nil, err
		}
		name := path.Join("lib/modules", modules.Name(file)+".ko")
		entries = append(entries, initrd.File(name, 0o644, module))
		fmt.Fprintf(&load, "/%s\n", name)
	}
	entries = append(entries, initrd.File("lib/modules/load", 0o644, []byte(load.String())))
	demand, err := demandLayout(tree, files)
	if err != nil {
		return nil, err
	}
	return append(entries, demand...), nil
}

// demandLayout returns the modules to load on demand and their index, without those
// that have been loaded by then.
func demandLayout(tree *modules.Tree, loaded []string) ([]initrd.Entry, error) {
	var entries []initrd.Entry
	var index modindex.Index
	seen := map[string]bool{}
	for _, file := range loaded {
		seen[file] = true
	}
	add := func(file string) error {
		if seen[file] {
			return nil
		}
		seen[file] = true
		module, err := tree.Read(file)
		if err != nil {
			return err
		}
		var packed bytes.Buffer
		z, err := gzip.NewWriterLevel(&packed, gzip.BestCompression)
		if err != nil {
			return err
		}
		if _, err := z.Write(module); err != nil {
			return err
		}
		if err := z.Close(); err != nil {
			return err
		}
		name := modules.Name(file)
		m := modindex.Module{Name: name, Aliases: tree.Aliases(name)}
		needs, err := tree.Resolve(name)
		if err != nil {
			return err
		}
		for _, need := range needs[:len(needs)-1] {
			if !slices.Contains(loaded, need) {
				m.Needs = append(m.Needs, modules.Name(need))
			}
		}
		index = append(index, m)
		entries = append(entries, initrd.File(path.Join("modules", name+modindex.Suffix), 0o644, packed.Bytes()))
		return nil
	}
	for _, name := range onDemand() {
		files, err := tree.Resolve(name)
		if errdefs.IsNotFound(err) {
			continue
		}
		if err != nil {
			return nil, err
		}
		for _, file := range files {
			if err := add(file); err != nil {
				return nil, err
			}
		}
	}
	var list bytes.Buffer
	if err := index.Write(&list); err != nil {
		return nil, err
	}
	return append(entries, initrd.File(path.Join("modules", modindex.File), 0o644, list.Bytes())), nil
}

// readStatic returns the executable in file. It must not ask for a dynamic
// linker: the guest has none, and would only say that there is no such file.
func readStatic(file string) ([]byte, error) {
	data, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	exe, err := elf.NewFile(bytes.NewReader(data))
	if err != nil {
		return nil, fmt.Errorf("%s is not an executable: %w", file, err)
	}
	for _, p := range exe.Progs {
		if p.Type == elf.PT_INTERP {
			return nil, &fs.PathError{Op: "use", Path: file, Err: errors.New("it is dynamically linked and the guest has no shared libraries: link it statically")}
		}
	}
	return data, nil
}
