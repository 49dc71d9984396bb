// Command mkinitrd assembles the guest's initial RAM disk from the agent, a
// static crun and the modules of a kernel. The same inputs give the same bytes.
package main

import (
	"bytes"
	"flag"
	"fmt"
	"os"
	"path/filepath"

	"github.com/husk-containers/husk/guest/initrd"
	"github.com/husk-containers/husk/guest/modules"
)

func main() {
	var (
		agent      = flag.String("agent", "", "static agent binary, the guest's /init")
		crun       = flag.String("crun", "", "static crun binary")
		release    = flag.String("kernel-release", "", "guest kernel release (default: the newest cloud kernel in -modules-dir)")
		modulesDir = flag.String("modules-dir", "/lib/modules", "directory with the modules of each kernel release")
		out        = flag.String("o", "", "initrd to write")
	)
	flag.Parse()
	if *agent == "" || *crun == "" || *out == "" || flag.NArg() != 0 {
		fmt.Fprintln(os.Stderr, "mkinitrd: -agent, -crun and -o are needed, and nothing else")
		flag.Usage()
		os.Exit(2)
	}
	if err := run(*agent, *crun, *modulesDir, *release, *out); err != nil {
		fmt.Fprintf(os.Stderr, "mkinitrd: %v\n", err)
		os.Exit(1)
	}
}

func run(agent, crun, modulesDir, release, out string) error {
	if release == "" {
		var err error
		if release, err = modules.Newest(modulesDir, "cloud"); err != nil {
			return err
		}
	}
	entries, err := layout(agent, crun, filepath.Join(modulesDir, release))
	if err != nil {
		return err
	}
	var archive bytes.Buffer
	if err := initrd.Write(&archive, entries...); err != nil {
		return err
	}
	if err := os.WriteFile(out+".new", archive.Bytes(), 0o644); err != nil {
		return fmt.Errorf("write initrd: %w", err)
	}
	if err := os.Rename(out+".new", out); err != nil {
		return fmt.Errorf("write initrd: %w", err)
	}
	return nil
}
