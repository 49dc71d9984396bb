// Package pod reads what Kubernetes' runtimes say of a pod: in the annotations of
// its containers, and in the options of a sandbox.
package pod

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"

	"github.com/containerd/errdefs"
)

// A Role is what a container is in a pod.
type Role int

// The roles of a container.
const (
	// Lone is in no pod, as far as its spec says.
	Lone Role = iota
	// Sandbox is the container that stands for the pod itself, also called the
	// pause container. It comes first.
	Sandbox
	// Member is any other container of a pod.
	Member
)

// A Place is where a container belongs.
type Place struct {
	Role Role
	// Sandbox is the pod's id; a lone container's own.
	Sandbox string
}

// keys are the annotations of a dialect: of the container's role, and of the
// pod's id.
type keys struct{ role, sandbox string }

var dialects = []keys{
	{"io.kubernetes.cri.container-type", "io.kubernetes.cri.sandbox-id"},   // containerd
	{"io.kubernetes.cri-o.ContainerType", "io.kubernetes.cri-o.SandboxID"}, // CRI-O
}

// PlaceOf returns where the container of that id belongs by its annotations. It is
// InvalidArgument where they make no sense.
func PlaceOf(annotations map[string]string, id string) (Place, error) {
	for _, k := range dialects {
		role, sandbox := annotations[k.role], annotations[k.sandbox]
		switch {
		case role == "" && sandbox == "":
			continue
		case role == "sandbox" && (sandbox == "" || sandbox == id):
			return Place{Sandbox, id}, nil
		case role == "sandbox":
			return Place{}, fmt.Errorf("annotations %s=%s and %s=%s: the sandbox container of another sandbox: %w",
				k.role, role, k.sandbox, sandbox, errdefs.ErrInvalidArgument)
		case role != "" && role != "container":
			return Place{}, fmt.Errorf("annotation %s=%q: neither sandbox nor container: %w", k.role, role, errdefs.ErrInvalidArgument)
		case sandbox == "":
			return Place{}, fmt.Errorf("annotation %s=%s without %s: %w", k.role, role, k.sandbox, errdefs.ErrInvalidArgument)
		case role == "" && sandbox == id:
			return Place{Lone, id}, nil
		}
		return Place{Member, sandbox}, nil
	}
	return Place{Lone, id}, nil
}

// ReadPlace is PlaceOf for the spec in a bundle.
func ReadPlace(bundle, id string) (Place, error) {
	raw, err := os.ReadFile(filepath.Join(bundle, "config.json"))
	if err != nil {
		return Place{}, fmt.Errorf("read the bundle's spec: %w", err)
	}
	var spec struct {
		Annotations map[string]string `json:"annotations"`
	}
	if err := json.Unmarshal(raw, &spec); err != nil {
		return Place{}, fmt.Errorf("decode the bundle's config.json: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	return PlaceOf(spec.Annotations, id)
}
