package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"

	"github.com/husk-containers/husk/config"
	"github.com/husk-containers/husk/hypervisor"
	"github.com/husk-containers/husk/hypervisor/qemu"
	"github.com/husk-containers/husk/internal/check"
	"github.com/husk-containers/husk/internal/version"
)

func runCheck(file string, stdout io.Writer) (int, error) {
	ctx, cancel := context.WithTimeout(context.Background(), probeTimeout)
	defer cancel()
	path, explicit := config.Path(file)
	results := check.Run(ctx, path, explicit, backend)
	if err := check.Print(stdout, results); err != nil {
		return exitFailed, err
	}
	if check.Failed(results) {
		return exitFailed, nil
	}
	return exitOK, nil
}

// backend is what the shim would boot VMs with, as far as a check of it goes.
func backend(c config.Hypervisor) hypervisor.Hypervisor {
	o := qemu.Options{Path: c.Path, Accelerator: string(c.Accelerator)}
	for _, ch := range c.Channels {
		o.Channels = append(o.Channels, string(ch))
	}
	return qemu.New(o)
}

func printVersion(stdout io.Writer, asJSON bool) error {
	v := version.Get()
	if asJSON {
		return json.NewEncoder(stdout).Encode(v)
	}
	_, err := fmt.Fprintln(stdout, "husk", v)
	return err
}
