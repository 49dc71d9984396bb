package network

import (
	"errors"
	"fmt"
	"os"
	"runtime"

	"golang.org/x/sys/unix"
)

// inside runs f on a thread in the namespace: sockets and taps belong to the
// namespace of the thread that opens them.
func (n *Network) inside(f func() error) error {
	done := make(chan error)
	go func() { done <- within(n.ns, f) }()
	return <-done
}

// within needs a goroutine of its own. A thread that cannot be brought back stays
// locked, and so ends with that goroutine.
func within(ns *os.File, f func() error) error {
	runtime.LockOSThread()
	own, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		runtime.UnlockOSThread()
		return err
	}
	defer own.Close() //nolint:errcheck // read only
	if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET); err != nil {
		runtime.UnlockOSThread()
		return fmt.Errorf("setns: %w", err)
	}
	err = f()
	if back := unix.Setns(int(own.Fd()), unix.CLONE_NEWNET); back != nil {
		return errors.Join(err, fmt.Errorf("setns back: %w", back))
	}
	runtime.UnlockOSThread()
	return err
}
