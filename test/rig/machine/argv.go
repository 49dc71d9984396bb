package machine

import (
	"fmt"

	"github.com/husk-containers/husk/test/rig/job"
)

// QEMU's file descriptors, in the order in which start passes them.
const (
	fdInitrd = 3 + iota
	fdScratch
	fdConsole
	fdResult
	fdOut
	fdErr
	fdRoot
	fdOutDir
)

// kernelParams keep the console to what matters and turn off what only costs
// time in an emulated machine that lives for minutes.
const kernelParams = "console=ttyS0 quiet panic=-1 mitigations=off nowatchdog random.trust_cpu=on"

// arguments returns QEMU's.
func arguments(kernel string, cfg Config) []string {
	args := []string{
		"-nodefaults", "-no-user-config", "-no-reboot", "-display", "none",
		"-M", "q35",
		"-accel", "tcg,thread=multi",
		"-cpu", "EPYC,+svm,+npt",
		"-smp", fmt.Sprint(cfg.CPUs),
		"-kernel", kernel,
		"-initrd", fdPath(fdInitrd),
		"-append", kernelParams,
		"-chardev", fmt.Sprintf("socket,id=console,fd=%d", fdConsole),
		"-serial", "chardev:console",
		"-blockdev", "driver=raw,node-name=scratch,discard=unmap,cache.no-flush=on," +
			"file.driver=file,file.locking=off,file.discard=unmap,file.filename=" + fdPath(fdScratch),
		"-device", "virtio-blk-pci,drive=scratch",
		"-device", "virtio-serial-pci",
	}
	args = append(args, nodeArguments(cfg)...)
	for _, port := range []struct {
		name string
		fd   int
	}{{job.ResultPort, fdResult}, {job.OutPort, fdOut}, {job.ErrPort, fdErr}} {
		args = append(args,
			"-chardev", fmt.Sprintf("socket,id=%s,fd=%d", port.name, port.fd),
			"-device", fmt.Sprintf("virtserialport,chardev=%s,name=%s", port.name, port.name))
	}
	args = append(args, shareArguments(job.RootTag, fdRoot)...)
	if cfg.OutDir != "" {
		args = append(args, shareArguments(job.OutTag, fdOutDir)...)
	}
	return args
}

// nodeArguments spread memory and CPUs over the nodes, as evenly as they can be.
func nodeArguments(cfg Config) []string {
	nodes := max(cfg.Nodes, 1)
	each := cfg.MemoryMiB / nodes
	args := []string{"-m", fmt.Sprintf("%dM", each*nodes)}
	for n := range nodes {
		args = append(args,
			"-object", fmt.Sprintf("memory-backend-memfd,id=ram%d,size=%dM,share=on", n, each),
			"-numa", fmt.Sprintf("node,nodeid=%d,memdev=ram%[1]d,cpus=%d-%d", n, n*cfg.CPUs/nodes, (n+1)*cfg.CPUs/nodes-1))
	}
	return args
}

func shareArguments(tag string, fd int) []string {
	return []string{
		"-chardev", fmt.Sprintf("socket,id=share-%s,fd=%d", tag, fd),
		"-device", fmt.Sprintf("vhost-user-fs-pci,chardev=share-%s,tag=%s", tag, tag),
	}
}

// fdPath is a path by which a process opens what one of its descriptors stands
// for anew.
func fdPath(fd int) string { return fmt.Sprintf("/proc/self/fd/%d", fd) }
