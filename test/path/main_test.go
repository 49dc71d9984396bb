// Package path_test drives the whole path shim, virtcontainers, protocols, agent
// in one process: all but the VM, the OCI runtime and containerd is real.
package path_test

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

const inside = "HUSK_PATH_TEST_INSIDE"

// TestMain runs the tests in a mount namespace of their own, as the shim is, and
// without root in a user namespace: what they mount, nobody else sees.
func TestMain(m *testing.M) {
	if os.Getenv(inside) != "" {
		for _, flags := range []uintptr{unix.MS_SLAVE, unix.MS_SHARED} {
			if err := unix.Mount("", "/", "", unix.MS_REC|flags, ""); err != nil {
				fmt.Fprintln(os.Stderr, "set up the test's mount namespace:", err)
				os.Exit(1)
			}
		}
		// For what the agent makes there.
		if err := unix.Mount("run", "/run", "tmpfs", 0, ""); err != nil {
			fmt.Fprintln(os.Stderr, "set up the test's mount namespace:", err)
			os.Exit(1)
		}
		os.Exit(m.Run())
	}
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Args[0] = os.Args[0]
	cmd.Env = append(os.Environ(), inside+"=1")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	attr := &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL}
	if os.Getuid() != 0 {
		attr.Cloneflags |= unix.CLONE_NEWUSER
		attr.UidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getuid(), Size: 1}}
		attr.GidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getgid(), Size: 1}}
	}
	cmd.SysProcAttr = attr
	err := cmd.Run()
	var exit *exec.ExitError
	switch {
	case err == nil:
	case errors.As(err, &exit):
		os.Exit(max(1, exit.ExitCode()))
	default:
		// Counted as no test at all rather than as one that passed.
		fmt.Fprintln(os.Stderr, "no mount namespace can be made here, so no test ran:", err)
		os.Exit(1)
	}
}
