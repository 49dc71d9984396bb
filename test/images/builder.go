package images

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path"
	"slices"
	"strings"
)

// BuildahPath is the image builder of Debian's package buildah.
const BuildahPath = "/usr/bin/buildah"

// Builder lists what BusyboxRoot lacks to build images and run containers in: the
// system's buildah, the static OCI runtime crun, and the busybox image as /base.tar.
func Builder(crun string) ([]File, error) {
	files, err := Program(BuildahPath)
	if err != nil {
		return nil, fmt.Errorf("%w (install the package buildah)", err)
	}
	runtime, err := os.ReadFile(crun)
	if err != nil {
		return nil, fmt.Errorf("read crun: %w", err)
	}
	var base bytes.Buffer
	if err := WriteBusybox(&base); err != nil {
		return nil, err
	}
	return append(files,
		File{Name: "bin/crun", Data: runtime, Mode: 0o755},
		File{Name: "base.tar", Data: base.Bytes(), Mode: 0o644},
		File{Name: "etc/containers/", Mode: 0o755},
		File{Name: "etc/containers/policy.json", Data: []byte(`{"default": [{"type": "insecureAcceptAnything"}]}`), Mode: 0o644},
		File{Name: "etc/containers/storage.conf", Mode: 0o644, Data: []byte(
			"[storage]\ndriver = \"overlay\"\ngraphroot = \"/var/lib/containers\"\nrunroot = \"/run/containers\"\n")},
	), nil
}

// Program lists what BusyboxRoot lacks for a program of the system's to run, as
// /bin/NAME: the program, and its shared libraries where it looks for them.
func Program(file string) ([]File, error) {
	data, err := os.ReadFile(file)
	if err != nil {
		return nil, fmt.Errorf("read program: %w", err)
	}
	files := []File{{Name: "bin/" + path.Base(file), Data: data, Mode: 0o755}}
	out, err := exec.Command("ldd", file).Output()
	if err != nil {
		return nil, fmt.Errorf("list the libraries of %s: %w", file, err)
	}
	dirs := map[string]bool{}
	for line := range strings.Lines(string(out)) {
		// "NAME => FILE (ADDRESS)", or the dynamic linker's "FILE (ADDRESS)"
		fields := strings.Fields(line)
		i := slices.IndexFunc(fields, func(f string) bool { return strings.HasPrefix(f, "/") })
		if i < 0 {
			continue // the kernel's own
		}
		data, err := os.ReadFile(fields[i])
		if err != nil {
			return nil, fmt.Errorf("read a library of %s: %w", file, err)
		}
		name := strings.TrimPrefix(fields[i], "/")
		for dir := path.Dir(name); dir != "."; dir = path.Dir(dir) {
			dirs[dir+"/"] = true
		}
		files = append(files, File{Name: name, Data: data, Mode: 0o755})
	}
	for dir := range dirs {
		files = append(files, File{Name: dir, Mode: 0o755})
	}
	slices.SortFunc(files, func(a, b File) int { return strings.Compare(a.Name, b.Name) }) // each after its directory
	return files, nil
}
