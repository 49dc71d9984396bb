package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/husk-containers/husk/test/daemon"
	"github.com/husk-containers/husk/test/images"
)

// privileged gives a spec what a privileged container has that makes containers
// itself. The host's devices are not among it.
func privileged(s *specs.Spec) {
	allow(s, []string{"CAP_SYS_ADMIN", "CAP_NET_ADMIN", "CAP_SYS_RESOURCE", "CAP_SYS_PTRACE", "CAP_DAC_READ_SEARCH"})
	s.Linux.MaskedPaths, s.Linux.ReadonlyPaths, s.Linux.Seccomp = nil, nil, nil
	s.Linux.Resources.Devices = []specs.LinuxDeviceCgroup{{Allow: true, Access: "rwm"}}
	s.Process.NoNewPrivileges = false
	for i, m := range s.Mounts {
		if m.Destination == "/sys" {
			s.Mounts[i].Options = []string{"nosuid", "noexec", "nodev", "rw"}
		}
	}
	s.Mounts = append(s.Mounts, specs.Mount{Destination: "/sys/fs/cgroup", Type: "cgroup", Source: "cgroup", Options: []string{"nosuid", "noexec", "nodev", "rw"}})
}

// TestBuildAndRunInAContainer has buildah, in a privileged container, build an image
// and run a container of it. The images are on the guest's overlay of a volume in
// the guest's memory, and the builder's containers are run by a crun of its own.
func TestBuildAndRunInAContainer(t *testing.T) {
	if _, err := os.Stat(images.BuildahPath); err != nil {
		t.Skip(err)
	}
	eachHusk(t, func(e *env) {
		if err := e.d.Configure(daemon.Settings{"hypervisor": {"default_memory_mib": 1024}}); err != nil {
			e.Fatal(err)
		}
		builder, err := images.Builder(filepath.Join(e.root, "build", "guest", "crun"))
		if err != nil {
			e.Fatal(err)
		}
		id := e.d.ID("builder")
		path := e.spec(func(s *specs.Spec) {
			if err := images.Unpack(s.Root.Path, builder); err != nil {
				e.Fatal(err)
			}
			privileged(s)
			s.Process.Args = []string{"sleep", "10000"}
			s.Mounts = append(s.Mounts, specs.Mount{Destination: "/var/lib/containers", Type: "tmpfs", Source: "tmpfs", Options: []string{"size=512m"}})
		})
		e.must(e.runArgs("-d", "--null-io", "--config", path, id)...)
		const oci = " --isolation oci --runtime /bin/crun --network host "
		for i, step := range []struct{ script, want string }{
			{`mkdir /var/tmp /tmp/context && cd /tmp/context && echo 'from the context' > file && cat > Containerfile <<'END'
FROM oci-archive:/base.tar
COPY file /file
RUN sed 's/$/, changed by a step/' /file > /changed && rm /file
CMD ["cat", "/changed"]
END`, ""},
			{"buildah build" + oci + "-t built /tmp/context > /tmp/log 2>&1 || cat /tmp/log", ""},
			{"buildah inspect --type image --format '{{.OCIv1.Config.Cmd}} {{len .OCIv1.RootFS.DiffIDs}}' built", "[cat /changed] 2"},
			{"buildah from --name c --pull-never built", "c\n"},
			{
				"buildah run" + oci + "c sh -c 'cat /changed; ls / | grep -c file; echo pid $$; " +
					"while read what where type rest; do [ $where != / ] || echo $type; done < /proc/mounts'",
				"from the context, changed by a step\n0\npid 1\noverlay\n",
			},
		} {
			if r := e.exec(id, fmt.Sprint("step", i), "sh", "-c", step.script); r.stdout != step.want || r.code != 0 {
				e.Fatalf("%s: %v, want %q", step.script, r, step.want)
			}
		}
		e.must("task", "kill", "--signal", "SIGKILL", id)
	})
}
