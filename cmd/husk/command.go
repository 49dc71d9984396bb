package main

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"io"

	"github.com/husk-containers/husk/config"
	"github.com/husk-containers/husk/hypervisor"
	"github.com/husk-containers/husk/hypervisor/qemu"
	"github.com/husk-containers/husk/internal/check"
	"github.com/husk-containers/husk/internal/version"
)

// A command is one of the tool's. It takes least to most arguments.
type command struct {
	help        string
	least, most int
	action      func() (int, error) // called once the flags have been parsed
}

// find returns the command of that name, and adds its flags.
func find(name string, flags *flag.FlagSet, stdout io.Writer) (command, bool) {
	switch name {
	case "check":
		file := flags.String("config", "", "")
		return command{help: usage, action: func() (int, error) { return runCheck(*file, stdout) }}, true
	case "cp":
		return command{copyUsage, 2, 2, copyAction(flags, stdout)}, true
	case "status":
		return command{statusUsage, 0, 1, statusAction(flags, stdout)}, true
	case "reclaim":
		return command{podUsage(name, "have a pod give memory back to the host", reclaimText), 1, 1, podAction(flags, stdout, reclaim)}, true
	case "pause":
		return command{podUsage(name, "stop a pod's virtual machine", pauseText), 1, 1, podAction(flags, stdout, pause)}, true
	case "resume":
		return command{podUsage(name, "have a pod's virtual machine go on", resumeText), 1, 1, podAction(flags, stdout, resume)}, true
	case "version":
		asJSON := flags.Bool("json", false, "")
		return command{help: usage, action: func() (int, error) { return exitOK, printVersion(stdout, *asJSON) }}, true
	}
	return command{}, false
}

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
