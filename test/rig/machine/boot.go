package machine

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"

	"github.com/husk-containers/husk/guest/initrd"
	"github.com/husk-containers/husk/guest/modules"
	"github.com/husk-containers/husk/test/rig/job"
	"golang.org/x/sys/unix"
)

const (
	modulesDir = "/lib/modules"
	initSource = "github.com/husk-containers/husk/test/rig/init"
)

// bootModules are what it takes to reach the shared root, the scratch disk and
// the ports; all others come from the shared root.
func bootModules() []string {
	return []string{"virtio_pci", "virtiofs", "overlay", "virtio_console", "virtio_blk"}
}

// bootFiles returns the kernel's path and the initrd, which has no path.
func bootFiles(ctx context.Context, cfg Config) (kernel string, archive *os.File, err error) {
	release, err := modules.Newest(modulesDir, "cloud")
	if err != nil {
		return "", nil, err
	}
	kernel = filepath.Join("/boot", "vmlinuz-"+release)
	if _, err := os.Stat(kernel); err != nil {
		return "", nil, fmt.Errorf("find kernel: %w: apt-get install linux-image-%s", err, release)
	}
	program, err := initProgram(ctx, cfg.Init)
	if err != nil {
		return "", nil, err
	}
	entries, err := initrdEntries(filepath.Join(modulesDir, release), program, cfg.Job)
	if err != nil {
		return "", nil, err
	}
	archive, err = memfile("initrd")
	if err != nil {
		return "", nil, err
	}
	if err := initrd.Write(archive, entries...); err != nil {
		archive.Close()
		return "", nil, fmt.Errorf("write initrd: %w", err)
	}
	return kernel, archive, nil
}

// initrdEntries are init, its job, and the kernel modules of the kernel in dir
// in the order to load them.
func initrdEntries(dir string, program []byte, j job.Job) ([]initrd.Entry, error) {
	description, err := json.Marshal(j)
	if err != nil {
		return nil, fmt.Errorf("encode job: %w", err)
	}
	entries := []initrd.Entry{
		initrd.File("init", 0o755, program),
		initrd.File(job.File, 0o600, description),
		// The kernel opens it for init before anything is mounted.
		initrd.CharDevice("dev/console", 0o600, 5, 1),
	}
	tree, err := modules.Open(dir)
	if err != nil {
		return nil, err
	}
	files, err := tree.Resolve(bootModules()...)
	if err != nil {
		return nil, err
	}
	for i, file := range files {
		data, err := tree.Read(file)
		if err != nil {
			return nil, err
		}
		name := fmt.Sprintf("%s/%02d-%s.ko", job.ModuleDir, i, modules.Name(file))
		entries = append(entries, initrd.File(name, 0o644, data))
	}
	return entries, nil
}

// initProgram returns the init in path, or builds it where path is empty.
func initProgram(ctx context.Context, path string) ([]byte, error) {
	if path != "" {
		program, err := os.ReadFile(path)
		if err != nil {
			return nil, fmt.Errorf("read init: %w", err)
		}
		return program, nil
	}
	tool, err := exec.LookPath("go")
	if err != nil {
		return nil, fmt.Errorf("build init: %w: install Go or name a built one with -init", err)
	}
	binary, err := memfile("init")
	if err != nil {
		return nil, err
	}
	defer binary.Close()
	err = run(ctx, command{
		path:  tool,
		args:  []string{"build", "-trimpath", "-ldflags=-s -w", "-o", fdPath(3), initSource},
		env:   []string{"CGO_ENABLED=0"},
		files: []*os.File{binary},
	})
	if err != nil {
		return nil, fmt.Errorf("build init (this needs a working directory in Husk's sources; -init names a built one): %w", err)
	}
	if _, err := binary.Seek(0, io.SeekStart); err != nil {
		return nil, fmt.Errorf("read init: %w", err)
	}
	return io.ReadAll(binary)
}

// memfile returns an empty file in memory. Nothing of it is left when its last
// descriptor is closed.
func memfile(name string) (*os.File, error) {
	fd, err := unix.MemfdCreate(name, unix.MFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("create %s in memory: %w", name, err)
	}
	return os.NewFile(uintptr(fd), name), nil
}
