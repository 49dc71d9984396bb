// Command husk-agent is PID 1 of a guest: it sets the guest up, connects to the
// host, serves it, and powers the guest off.
package main

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"time"

	"github.com/husk-containers/husk/agent"
	"github.com/husk-containers/husk/agent/boot"
	"github.com/husk-containers/husk/agent/channel"
	"github.com/husk-containers/husk/agent/container"
	"github.com/husk-containers/husk/agent/hotplug"
	"github.com/husk-containers/husk/agent/listen"
	"github.com/husk-containers/husk/agent/module"
	"github.com/husk-containers/husk/agent/network"
	"github.com/husk-containers/husk/agent/pause"
	"github.com/husk-containers/husk/agent/reap"
	"github.com/husk-containers/husk/agent/storage"
	"github.com/husk-containers/husk/internal/version"
	agentv1 "github.com/husk-containers/husk/protocols/agent/v1"
	"github.com/husk-containers/husk/protocols/files"
	"github.com/husk-containers/husk/protocols/forward"
	"github.com/husk-containers/husk/protocols/stream"
)

// pauseArg makes of this program the first process of the shared PID namespace.
const pauseArg = "pause"

func main() {
	started := agent.Uptime()
	if len(os.Args) == 2 && os.Args[1] == "-version" {
		fmt.Println(version.Get())
		return
	}
	if len(os.Args) == 2 && os.Args[1] == pauseArg {
		if err := pause.Main(); err != nil {
			fmt.Fprintln(os.Stderr, "husk-agent: pause:", err)
			os.Exit(1)
		}
		return
	}
	if os.Args[0] == module.Helper {
		if err := module.Main(os.Args[1:]); err != nil {
			os.Exit(1)
		}
		return
	}
	if os.Getpid() != 1 {
		fmt.Fprintln(os.Stderr, "husk-agent: it runs as PID 1 of a guest only: start it by a VM's initrd")
		os.Exit(2)
	}
	if err := run(started); err != nil {
		fmt.Fprintln(os.Stderr, "husk-agent: fatal:", err)
	}
	boot.PowerOff()
}

// guestMachine: two of these are called Machine.
type guestMachine = boot.Machine

// A machine is what the agent does to the guest.
type machine struct {
	guestMachine
	*network.Stack
	*storage.Set
	*hotplug.Machine
}

// run returns when the host has asked for the shutdown, or with the reason why
// there is no going on.
func run(started time.Duration) error {
	params, err := boot.Up()
	if err != nil {
		return fmt.Errorf("set up the guest: %w", err)
	}
	slog.SetDefault(slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: params.LogLevel})))

	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	table := reap.New()
	go table.Collect(ctx) // ends with the guest

	runtime, err := container.NewCrun(container.CrunConfig{
		Command: boot.Crun,
		Dir:     agentv1.GuestDir,
		Cgroup:  boot.ContainersCgroup,
		// The file that this program was is gone since the boot; this leads to it.
		SharedPID: pause.New(agentv1.SharedPID, []string{"/proc/self/exe", pauseArg}, table),
	}, table)
	if err != nil {
		return err
	}
	storages, err := storage.New(agentv1.VolumesDir)
	if err != nil {
		return err
	}
	resources, err := hotplug.New(hotplug.Files{
		CPUs: "/sys/devices/system/cpu", Meminfo: "/proc/meminfo", MinFree: "/proc/sys/vm/min_free_kbytes",
		Containers: boot.ContainersCgroup,
	})
	if err != nil {
		return err
	}
	go resources.Follow(ctx) // ends with the guest
	host, err := channel.Open(ctx, params.Channel)
	if err != nil {
		return err
	}
	streams, err := host.Listen(stream.Port)
	if err != nil {
		return err
	}
	forwards, err := host.Listen(forward.Port)
	if err != nil {
		return err
	}
	operations, err := host.Listen(files.Port)
	if err != nil {
		return err
	}
	control, err := host.DialControl(ctx)
	if err != nil {
		return err
	}
	return agent.New(agent.Options{
		Version:   version.Get().String(),
		Started:   started,
		Runtime:   runtime,
		Platform:  machine{Stack: network.New(), Set: storages, Machine: resources},
		Streams:   streams,
		Forwards:  forwards,
		Files:     operations,
		Listeners: func() (agent.ListenWatcher, error) { return listen.Open(boot.CgroupRoot) },
	}).Serve(ctx, control)
}
