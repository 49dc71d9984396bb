package spec

import (
	"fmt"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"

	agentv1 "github.com/husk-containers/husk/protocols/agent/v1"
)

// JoinPID decides which PID namespace of the pod a container joins whose spec gives
// that a path; for another container it does nothing. own are the ids of the pod's
// living containers that have one of their own.
//
// The path does not tell: it leads by the pid of a task, which is the same for all
// tasks of a pod, whether CRI was asked for the namespace of the pod (POD) or of one
// container (TARGET). The others tell: a kubelet gives all ordinary containers of a
// pod the same mode, so that where one has a namespace of its own, none asks for the
// pod's.
//
//	own           the container joins
//	none          the namespace that the pod's containers share
//	one           that one's
//	two or more   nothing: FailedPrecondition
func (p *Plan) JoinPID(own []string) error {
	all := p.Spec.Linux.Namespaces
	i := slices.Index(all, specs.LinuxNamespace{Type: specs.PIDNamespace, Path: agentv1.SharedPID})
	switch {
	case i < 0 || len(own) == 0:
		return nil
	case len(own) == 1:
		all[i].Path = agentv1.ContainerPID(own[0])
		return nil
	}
	return fmt.Errorf("linux.namespaces (pid).path: it cannot be told which container's namespace is meant, for several have one of their own: %s; "+
		"name no target (kubectl debug without --target), or let the pod's containers share theirs (shareProcessNamespace): %w",
		strings.Join(own, ", "), errdefs.ErrFailedPrecondition)
}
