package cri

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// cgroupDirs are the directories of a cgroup that are there.
func (e *env) cgroupDirs(path string) []string {
	e.Helper()
	var dirs []string
	for _, pattern := range []string{"/sys/fs/cgroup", "/sys/fs/cgroup/*"} {
		found, err := filepath.Glob(pattern + path)
		if err != nil {
			e.Fatal(err)
		}
		dirs = append(dirs, found...)
	}
	return dirs
}

// removeCgroup removes what a pod is in, as a kubelet does once the pod is stopped.
func (e *env) removeCgroup(path string) {
	e.Helper()
	for _, dir := range e.cgroupDirs(path) {
		if err := os.Remove(dir); err != nil {
			e.Error(err)
		}
	}
}

// A cgroupForm is how a kubelet names a pod's cgroup, and where containerd's shims
// are to find it.
type cgroupForm struct{ parent, dir, sandbox string }

func (e *env) cgroupForms() map[string]cgroupForm {
	pod := "/" + e.d.Token + "/pod-a"
	slice := e.d.Token + ".slice"
	return map[string]cgroupForm{
		"cgroupfs": {pod, pod, pod + "/%s"},
		"systemd":  {"/" + slice + "/" + e.d.Token + "-poda.slice", "/" + slice + "/" + e.d.Token + "-poda.slice", "/" + slice + "/" + e.d.Token + "-poda.slice/cri-containerd-%s.scope"},
	}
}

func TestHostCgroup(t *testing.T) {
	for _, form := range []string{"cgroupfs", "systemd"} {
		t.Run(form, func(t *testing.T) {
			each(t, setup{husk: true}, func(e *env) {
				f := e.cgroupForms()[form]
				e.Cleanup(func() { e.removeCgroup(filepath.Dir(f.dir)) })
				for _, shimDies := range []bool{false, true} {
					p := e.run("pod", func(c *runtime.PodSandboxConfig) { c.Linux.CgroupParent = f.parent })
					a := p.start("a", idle)
					path := fmt.Sprintf(f.sandbox, p.id)
					parts := 0
					for _, process := range e.processes("") {
						if !e.isOf(process, p) {
							continue
						}
						parts++
						raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", process.PID))
						if err != nil {
							e.Error(err)
						}
						for line := range strings.Lines(string(raw)) {
							if !strings.HasSuffix(strings.TrimSpace(line), ":"+path) {
								e.Errorf("%s is in %s, want %s", process.Name, line, path)
							}
						}
					}
					if parts < 3 { // the shim, the VM and virtiofsd
						e.Errorf("the pod has %d processes", parts)
					}
					if shimDies {
						e.kill(e.processOf(p, "containerd-shim"))
						a.exited()
					}
					p.stop()
					gone := func(context.Context) error {
						if left := e.cgroupDirs(path); len(left) > 0 {
							return fmt.Errorf("left of a pod that is stopped: %q", left)
						}
						return nil
					}
					if shimDies { // containerd 1.6 does not wait for its own clean-up
						e.eventually("the pod's cgroup is removed", gone)
					} else if err := gone(e.Context()); err != nil { // a kubelet kills what it finds there now
						e.Error(err)
					}
					e.removeCgroup(f.dir)
					p.remove()
					e.settled()
				}
			})
		})
	}
}
