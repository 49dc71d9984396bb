// Package ownmounts runs the tests of a package in a mount namespace of their own.
package ownmounts

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// inside is set in the environment of the program that runs the tests.
const inside = "HUSK_TEST_OWN_MOUNTS"

// Main is what a TestMain calls. The tests run in a mount namespace of their own, as
// the shim is: what they mount, nobody else sees. Its first mounts are private, for the
// tests' part of the host. Without root they are skipped.
func Main(m *testing.M) {
	if os.Getuid() != 0 {
		fmt.Println("skipped: mounts need root")
		os.Exit(0)
	}
	if os.Getenv(inside) != "" {
		if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
			fmt.Fprintln(os.Stderr, "set up the tests' mount namespace:", err)
			os.Exit(1)
		}
		os.Exit(m.Run())
	}
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Args[0] = os.Args[0]
	cmd.Env = append(os.Environ(), inside+"=1")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL}
	var exit *exec.ExitError
	if err := cmd.Run(); errors.As(err, &exit) {
		os.Exit(max(1, exit.ExitCode()))
	} else if err != nil {
		fmt.Fprintln(os.Stderr, "no mount namespace can be made here, so no test ran:", err)
		os.Exit(1)
	}
}
