package virtcontainers

import (
	"context"
	"os"
	"os/exec"

	"github.com/husk-containers/husk/virtcontainers/cgroup"
	"github.com/husk-containers/husk/virtcontainers/record"
)

// Spawn starts the daemon of a shim for the container of a bundle: in the host's cgroup
// that the spec names, which the daemon's sandbox takes over and in the end removes.
// After an error of this or of the daemon, Cleanup removes it. With a spec that names
// none the daemon is where the caller is.
func Spawn(bundle string, daemon *exec.Cmd) error {
	sp, err := ReadSpec(bundle)
	if err != nil {
		return err
	}
	if sp.Linux == nil || sp.Linux.CgroupsPath == "" {
		return daemon.Start()
	}
	r, err := record.Open(bundle, "")
	if err != nil {
		return err
	}
	group, _, err := r.MakeCgroup(sp.Linux.CgroupsPath)
	if err != nil {
		return err
	}
	return group.Start(daemon)
}

// enter has this process, and with it all that the sandbox will run, in the pod's
// cgroup: where Spawn has put it, or in that of a path. Without either it stays.
func (s *Sandbox) enter(cgroupsPath string) error {
	home, created := s.record.Entered()
	switch {
	case home != nil:
		stay, err := cgroup.Resume(os.Getpid(), home, created)
		if err != nil {
			return err
		}
		s.stayIn(stay)
		return nil
	case cgroupsPath == "":
		return nil
	}
	group, home, err := s.record.MakeCgroup(cgroupsPath)
	if err != nil {
		return err
	}
	s.stayIn(cgroup.NewStay(group, os.Getpid(), home))
	return group.Add(os.Getpid())
}

func (s *Sandbox) stayIn(stay *cgroup.Stay) {
	s.cgroup = stay.Cgroup
	s.undo.Push("leave the pod's cgroup", hostStep, func(ctx context.Context) error { return stay.End(ctx) })
}

// Cgroup is that of the host in which the shim, the VM and all helpers are; nil where
// the pod was given none. It is gone once the sandbox is stopped.
func (s *Sandbox) Cgroup() *cgroup.Cgroup { return s.cgroup }
