package main

import (
	"bytes"
	"debug/elf"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"strings"

	"github.com/husk-containers/husk/guest/initrd"
	"github.com/husk-containers/husk/guest/modules"
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
	}
}

// layout returns what the initrd holds:
//
//	/init               the agent
//	/bin/crun
//	/lib/modules/*.ko   of the kernel whose modules are in modulesDir, uncompressed
//	/lib/modules/load   their paths, one a line, in the order to load them
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
	return append(entries, initrd.File("lib/modules/load", 0o644, []byte(load.String()))), nil
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
