package hostcheck

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"os"
	"slices"

	"golang.org/x/sys/unix"
)

// kvmCreateVM is KVM_CREATE_VM of linux/kvm.h; its argument, the machine type,
// is 0 on x86.
const kvmCreateVM = 0xAE01

// KVMUsable returns nil where KVM can run an ordinary guest: the CPU shows vmx
// or svm, and /dev/kvm creates a VM. A /dev/kvm alone proves nothing: software
// back ends open and create VMs in which an ordinary kernel never gets past its
// first instructions.
func KVMUsable() error {
	cpuinfo, err := os.ReadFile("/proc/cpuinfo")
	if err != nil {
		return fmt.Errorf("read CPU flags: %w", err)
	}
	return kvmUsable(cpuinfo, "/dev/kvm", createVM)
}

func kvmUsable(cpuinfo []byte, dev string, create func(*os.File) error) error {
	f, err := os.OpenFile(dev, os.O_RDWR, 0)
	if err == nil {
		defer f.Close()
	}
	switch {
	case !hasVirtualisation(cpuinfo) && err == nil:
		return fmt.Errorf("%s is a software KVM back end, which cannot run an ordinary guest: "+
			"the CPU shows neither vmx nor svm; use hardware or an outer VM that offers virtualisation", dev)
	case !hasVirtualisation(cpuinfo):
		return errors.New("the CPU shows neither vmx nor svm; " +
			"switch virtualisation on in the firmware, or nested virtualisation in the outer VM")
	case errors.Is(err, os.ErrNotExist):
		return fmt.Errorf("open %s: %w; load the kernel module kvm_intel or kvm_amd", dev, cause(err))
	case errors.Is(err, os.ErrPermission):
		return fmt.Errorf("open %s: %w; run as root or as a member of its group", dev, cause(err))
	case err != nil:
		return fmt.Errorf("open %s: %w; see the kernel log for why KVM is off", dev, cause(err))
	}
	if err := create(f); err != nil {
		return fmt.Errorf("create a VM on %s: %w; end other hypervisors and see the kernel log", dev, err)
	}
	return nil
}

// createVM creates and drops an empty VM.
func createVM(kvm *os.File) error {
	fd, err := unix.IoctlRetInt(int(kvm.Fd()), kvmCreateVM)
	if err != nil {
		return err
	}
	return unix.Close(fd)
}

// hasVirtualisation looks at the first CPU: Linux demands that all are alike.
func hasVirtualisation(cpuinfo []byte) bool {
	s := bufio.NewScanner(bytes.NewReader(cpuinfo))
	for s.Scan() {
		key, value, _ := bytes.Cut(s.Bytes(), []byte(":"))
		if string(bytes.TrimSpace(key)) != "flags" {
			continue
		}
		return slices.ContainsFunc(bytes.Fields(value), func(flag []byte) bool {
			return string(flag) == "vmx" || string(flag) == "svm"
		})
	}
	return false
}
