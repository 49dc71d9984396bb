// Command init is PID 1 of the rig's machine: it makes the machine look like the
// host it was started on, with KVM and vhost-vsock, and runs one command there.
package main

import (
	"encoding/json"
	"fmt"
	"os"

	"github.com/husk-containers/husk/test/rig/job"
	"golang.org/x/sys/unix"
)

func main() {
	if os.Getpid() != 1 {
		fmt.Fprintln(os.Stderr, "rig init: this is the first process of the rig's machine: start rig instead")
		os.Exit(1)
	}
	err := run()
	// The rig shows the console's last lines when the machine ends early.
	fmt.Fprintf(os.Stderr, "rig init: %v\n", err)
	unix.IoctlSetInt(int(os.Stderr.Fd()), unix.TCSBRK, 1) //nolint:errcheck // drains the console, best effort
	unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)          //nolint:errcheck // a PID 1 that returns ends the machine too
}

// run returns only on error: in the end the rig ends the machine.
func run() error {
	var j job.Job
	data, err := os.ReadFile("/" + job.File)
	if err != nil {
		return err
	}
	if err := json.Unmarshal(data, &j); err != nil {
		return fmt.Errorf("decode job: %w", err)
	}
	events, err := listenUevents()
	if err != nil {
		return err
	}
	if err := loadModules("/" + job.ModuleDir); err != nil {
		return err
	}
	if err := switchRoot(); err != nil {
		return err
	}
	if err := becomeHost(j.Out); err != nil {
		return err
	}
	var ports [3]*os.File
	for i, name := range []string{job.ResultPort, job.OutPort, job.ErrPort} {
		if ports[i], err = openPort(events, name); err != nil {
			return err
		}
	}
	result, err := execute(j, ports[1], ports[2])
	if err != nil {
		return err
	}
	if j.Out {
		if err := syncDir(outDir); err != nil {
			return err
		}
	}
	if err := json.NewEncoder(ports[0]).Encode(result); err != nil {
		return fmt.Errorf("send result: %w", err)
	}
	select {}
}

// syncDir writes back what is still in memory of the file system at dir.
func syncDir(dir string) error {
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := unix.Syncfs(int(f.Fd())); err != nil {
		return fmt.Errorf("sync %s: %w", dir, err)
	}
	return nil
}
