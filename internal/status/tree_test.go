package status

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"

	"github.com/husk-containers/husk/internal/statedir"
	operatorv1 "github.com/husk-containers/husk/shim/operator/v1"
)

// podID is like those of Kubernetes' pods.
const podID = "3f7c9a1be4d25f8066a1c2d3e4f5061728394a5b6c7d8e9f0a1b2c3d4e5f6071"

// A tree is a host made of files.
type tree struct {
	*testing.T
	root string
	host Host
}

func newTree(t *testing.T) *tree {
	root := t.TempDir()
	tr := &tree{t, root, Host{StateDir: root + "/state", Proc: root + "/proc", Sys: root + "/sys"}}
	tr.write("sys/devices/system/cpu/online", "0-3\n")
	tr.write("sys/devices/system/node/node0/cpulist", "0-1\n")
	tr.write("sys/devices/system/node/node1/cpulist", "2-3\n")
	tr.write("proc/uptime", "10000.00 0.00\n")
	tr.write("proc/pressure/cpu", "some avg10=1.50 avg60=0.25 avg300=0.00 total=1\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=0\n")
	return tr
}

func (t *tree) write(name, content string) {
	t.Helper()
	path := filepath.Join(t.root, name)
	if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(content), 0o600)); err != nil {
		t.Fatal(err)
	}
}

// A task is a thread to be.
type task struct {
	name, cpus string
	last       int
}

// process makes a process whose threads' ids follow its own.
func (t *tree) process(pid, parent int, args string, started, sharedKiB int, tasks ...task) {
	t.Helper()
	dir := fmt.Sprintf("proc/%d/", pid)
	for i, k := range tasks {
		stat := fmt.Sprintf("%d (%s) S %d%s %d%s %d 0\n", pid+i, k.name, parent, strings.Repeat(" 0", 17), started, strings.Repeat(" 0", 16), k.last)
		if i == 0 {
			t.write(dir+"stat", stat)
		}
		t.write(fmt.Sprintf("%stask/%d/stat", dir, pid+i), stat)
		t.write(fmt.Sprintf("%stask/%d/status", dir, pid+i), "Name:\t"+k.name+"\nCpus_allowed_list:\t"+k.cpus+"\n")
	}
	t.write(dir+"cmdline", strings.ReplaceAll(args, " ", "\x00")+"\x00")
	t.write(dir+"smaps_rollup", fmt.Sprintf("0-1 ---p 0 00:00 0 [rollup]\nPss: %d kB\nPss_Anon: 2048 kB\nPss_File: 1024 kB\nPss_Shmem: %d kB\n", 3072+sharedKiB, sharedKiB))
	t.write(dir+"numa_maps", fmt.Sprintf("7f00 default anon=512 N1=512 kernelpagesize_kB=4\n7f01 default N0=%d kernelpagesize_kB=4\n", sharedKiB/4))
	t.write(dir+"cgroup", "2:memory:/kubepods/pod1\n1:cpu,cpuacct:/kubepods/pod1\n0::/\n")
}

// sandbox makes the directory of one, and its record there or in the bundle.
func (t *tree) sandbox(namespace, id, address, recordIn, recorded string) {
	t.Helper()
	dir := filepath.Join("state", namespace+"+"+id)
	t.write(filepath.Join(dir, "address"), address)
	if recorded != "" {
		t.write(filepath.Join(strings.Replace(recordIn, "DIR", dir, 1), "husk.json"), `{"dir":"x","processes":[`+recorded+`]}`)
	}
}

func onFile(name string, pid, started int) string {
	return fmt.Sprintf(`{"name":%q,"pid":%d,"start_time":%d}`, name, pid, started)
}

// busy is a host of three pods: one whose vCPUs are pinned, one whose shim is stopped,
// and one whose shim has ended.
func busy(t *testing.T) *tree {
	tr := newTree(t)
	tr.sandbox("k8s.io", podID, "/run/s/a", "DIR", onFile("shim", 100, 991000)+","+onFile("qemu", 200, 991100)+","+onFile("virtiofsd", 300, 991050)+","+onFile("passt", 900, 5))
	tr.process(100, 1, "/bin/containerd-shim-husk-v2 -namespace k8s.io -id x -socket unix:///run/s/a", 991000, 0, task{"containerd-shim", "0-1", 0}, task{"containerd-shim", "0-1", 1})
	tr.process(110, 100, "/bin/containerd-shim-husk-v2 -namespace k8s.io -id x -socket unix:///run/s/a", 999999, 0, task{"containerd-shim", "0-1", 0}) // about to exec
	tr.process(200, 100, "qemu-system-x86_64 -m 512M", 991100, 204800, task{"qemu-system-x86", "0-1", 1}, task{"CPU 0/KVM", "2", 2}, task{"CPU 1/KVM", "3", 3}, task{"IO iothread0", "0-2", 0})
	tr.process(300, 100, "virtiofsd", 991050, 1024, task{"virtiofsd", "0-1", 0})
	tr.process(310, 300, "virtiofsd", 991051, 1024, task{"virtiofsd", "0-1", 1})
	tr.process(900, 1, "somebody elses", 6, 0, task{"else", "0-3", 0}) // has a pid that is on record

	tr.sandbox("default", "web", "/run/s/b", "proc/500/cwd", onFile("shim", 500, 400000)+","+onFile("qemu", 600, 400100))
	tr.process(500, 1, "/bin/containerd-shim-husk-v2 -socket unix:///run/s/b", 400000, 0, task{"containerd-shim", "0-3", 3})
	tr.process(600, 500, "qemu-system-x86_64", 400100, 102400, task{"qemu-system-x86", "0-3", 1}, task{"CPU 0/TCG", "0-3", 2})

	tr.sandbox("default", "old", "/run/s/c", "", "")

	tr.host.Ask = func(_ context.Context, shim statedir.Shim) (*operatorv1.StatusResponse, error) {
		switch shim.Address {
		case "/run/s/a":
			return &operatorv1.StatusResponse{
				State: operatorv1.StatusResponse_STATE_RUNNING, Accelerator: "kvm",
				Size: &operatorv1.Size{Vcpus: 2, MemoryMib: 512}, Maximum: &operatorv1.Size{Vcpus: 4, MemoryMib: 512},
				Vcpus:     []*operatorv1.VCPU{{Number: 0, Thread: 201}, {Number: 1, Thread: 202}},
				Placement: &operatorv1.Placement{Cpus: "2-3", MemoryNodes: "1", Pinned: true},
				Containers: []*operatorv1.Container{
					{Id: "app", State: operatorv1.Container_STATE_RUNNING}, {Id: "init", State: operatorv1.Container_STATE_STOPPED},
				},
			}, nil
		case "/run/s/b":
			return nil, fmt.Errorf("the shim does not answer within 3s: it is stopped or hangs: %w", errdefs.ErrUnavailable)
		}
		return nil, fmt.Errorf("nothing listens at the shim's socket: %w", errdefs.ErrUnavailable)
	}
	return tr
}
