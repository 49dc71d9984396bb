package cri

import (
	"testing"

	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func TestPodOfTwoContainers(t *testing.T) {
	each(t, setup{}, func(e *env) {
		p := e.run("two")
		a := p.start("a", "echo to stdout; echo to stderr >&2; "+idle)
		b := p.start("b", idle)
		a.running()
		b.running()
		if s := p.status(); s.State != runtime.PodSandboxState_SANDBOX_READY || s.GetNetwork().GetIp() == "" {
			e.Errorf("pod: %v, want it ready, with an address", s)
		}
		a.waitOutput("to stdout\n")
		if got := a.output("stderr"); got != "to stderr\n" {
			e.Errorf("standard error in the log: %q", got)
		}
		if r := b.exec("echo out; echo err >&2; exit 7"); r != (result{"out\n", "err\n", 7}) {
			e.Errorf("exec: %v", r)
		}
		if e.isHusk() {
			for _, name := range []string{"qemu-system", "containerd-shim"} {
				if list := e.processes(name); len(list) != 1 {
					e.Errorf("%d processes %s, want one for the pod: %v", len(list), name, list)
				}
			}
		}
		a.stop()
		if s := a.status(); s.State != runtime.ContainerState_CONTAINER_EXITED || s.ExitCode != 137 {
			e.Errorf("stopped container: %v, want it exited with code 137", s)
		}
		p.stop()
		if s := p.status(); s.State != runtime.PodSandboxState_SANDBOX_NOTREADY {
			e.Errorf("stopped pod is %v", s.State)
		}
		p.stop() // once more changes nothing
		p.remove()
		e.settled()
	})
}
