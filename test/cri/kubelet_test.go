package cri

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// A kubelet makes the volumes of one pod where and how a real one does.
type kubelet struct {
	e      *env
	dir    string   // of the pod
	mounts []string // in the order in which they were made
}

// kubelet makes the directory of a pod. At the end it unmounts all when the pods have
// been stopped, which may be long before they are removed: a mount that somebody still
// uses then fails the test.
func (e *env) kubelet(pod string) *kubelet {
	e.Helper()
	k := &kubelet{e: e, dir: filepath.Join(e.d.Dir, "kubelet", "pods", pod+"-uid")}
	k.must(os.MkdirAll(k.dir, 0o750))
	e.Cleanup(func() {
		if err := e.stopAll(); err != nil {
			e.Errorf("stop pods: %v", err)
		}
		for _, target := range slices.Backward(k.mounts) {
			if err := unix.Unmount(target, 0); err != nil {
				e.Errorf("unmount %s of a pod that was stopped: %v", target, err)
				unix.Unmount(target, unix.MNT_DETACH)
			}
		}
	})
	return k
}

// stopAll stops all pods.
func (e *env) stopAll() error {
	ctx, cancel := e.call()
	defer cancel()
	list, err := e.cri.ListPodSandbox(ctx, &runtime.ListPodSandboxRequest{})
	for _, p := range list.GetItems() {
		_, stopErr := e.cri.StopPodSandbox(ctx, &runtime.StopPodSandboxRequest{PodSandboxId: p.Id})
		err = errors.Join(err, stopErr)
	}
	return err
}

func (k *kubelet) must(err error) {
	k.e.Helper()
	if err != nil {
		k.e.Fatal(err)
	}
}

func (k *kubelet) mount(source, target, fstype string, flags uintptr, options string) {
	k.e.Helper()
	if err := unix.Mount(source, target, fstype, flags, options); err != nil {
		k.e.Fatalf("mount %s at %s: %v", source, target, err)
	}
	k.mounts = append(k.mounts, target)
}

func (k *kubelet) unmount(target string) {
	k.e.Helper()
	if err := unix.Unmount(target, 0); err != nil {
		k.e.Fatalf("unmount %s: %v", target, err)
	}
	k.mounts = slices.DeleteFunc(k.mounts, func(m string) bool { return m == target })
}

// path makes a directory of the pod's.
func (k *kubelet) path(elements ...string) string {
	k.e.Helper()
	dir := filepath.Join(append([]string{k.dir}, elements...)...)
	k.must(os.MkdirAll(dir, 0o750))
	return dir
}

// file writes a file of any directory.
func (k *kubelet) file(dir, name, text string, mode fs.FileMode) string {
	k.e.Helper()
	path := filepath.Join(dir, name)
	k.must(os.WriteFile(path, []byte(text), mode))
	k.must(os.Chmod(path, mode)) // whatever the umask
	return path
}

// hostPath is a directory of the host's in which all may write.
func (k *kubelet) hostPath(name string) string {
	k.e.Helper()
	dir := filepath.Join(k.e.d.Dir, "host", name)
	k.must(os.MkdirAll(dir, 0o755))
	k.must(os.Chmod(dir, 0o777))
	return dir
}

// share has mounts below a directory propagate, as all do on a usual host.
func (k *kubelet) share(dir string) {
	k.e.Helper()
	k.mount(dir, dir, "", unix.MS_BIND, "")
	k.must(unix.Mount("", dir, "", unix.MS_SHARED, ""))
}

// emptyDir is one of the default medium.
func (k *kubelet) emptyDir(name string) string {
	k.e.Helper()
	dir := k.path("volumes", "kubernetes.io~empty-dir", name)
	k.must(os.Chmod(dir, 0o777))
	return dir
}

// memory is an emptyDir of medium Memory: a tmpfs of which nothing but the size is
// said, so that its root has the mode 1777.
func (k *kubelet) memory(name string, bytes int) string {
	k.e.Helper()
	dir := k.emptyDir(name)
	k.mount("tmpfs", dir, "tmpfs", 0, fmt.Sprint("size=", bytes))
	return dir
}

// hugePages is an emptyDir of medium HugePages-2Mi.
func (k *kubelet) hugePages(name string) string {
	k.e.Helper()
	dir := k.emptyDir(name)
	k.mount("nodev", dir, "hugetlbfs", 0, "pagesize=2M")
	return dir
}

// A payload is the files of a configMap, secret or projected volume, by their path.
type payload map[string]projection

type projection struct {
	text string
	mode fs.FileMode
}

// plain is a payload of files that everybody may read.
func plain(texts map[string]string) payload {
	p := payload{}
	for name, text := range texts {
		p[name] = projection{text, 0o644}
	}
	return p
}

// configMap is a volume of files on disk; nested are the places in it where the
// container mounts others.
func (k *kubelet) configMap(name string, files payload, nested ...string) string {
	k.e.Helper()
	dir := k.path("volumes", "kubernetes.io~configmap", name)
	k.must(os.Chmod(dir, 0o777))
	k.project(dir, files, nested...)
	return dir
}

// secret is a volume of files in memory. What kind names is "secret" or "projected".
func (k *kubelet) secret(kind, name string, files payload, nested ...string) string {
	k.e.Helper()
	dir := k.path("volumes", "kubernetes.io~"+kind, name)
	k.mount("tmpfs", dir, "tmpfs", 0, "size=64M")
	k.project(dir, files, nested...)
	return dir
}

func (k *kubelet) project(dir string, files payload, nested ...string) {
	k.e.Helper()
	k.write(dir, files)
	for _, name := range nested {
		k.must(os.MkdirAll(filepath.Join(dir, name), 0o755))
	}
}

// write replaces a volume's files, all at once: they are below a directory named for
// the time, ..data is a link to that, and a new link to the next is renamed over it.
// What users see are links by way of ..data.
func (k *kubelet) write(dir string, files payload) {
	k.e.Helper()
	old, err := os.Readlink(filepath.Join(dir, "..data"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		k.e.Fatal(err)
	}
	stamped, err := os.MkdirTemp(dir, time.Now().UTC().Format("..2006_01_02_15_04_05."))
	k.must(err)
	k.must(os.Chmod(stamped, 0o755))
	visible := map[string]bool{}
	for path, p := range files {
		k.must(os.MkdirAll(filepath.Join(stamped, filepath.Dir(path)), 0o755))
		k.file(stamped, path, p.text, p.mode)
		first, _, _ := strings.Cut(path, "/")
		visible[first] = true
	}
	next := filepath.Join(dir, "..data_tmp")
	k.must(os.Symlink(filepath.Base(stamped), next))
	k.must(os.Rename(next, filepath.Join(dir, "..data")))
	for name := range visible {
		if err := os.Symlink("..data/"+name, filepath.Join(dir, name)); err != nil && !errors.Is(err, fs.ErrExist) {
			k.e.Fatal(err)
		}
	}
	if old == "" {
		return
	}
	entries, err := os.ReadDir(filepath.Join(dir, old))
	k.must(err)
	for _, entry := range entries {
		if !visible[entry.Name()] {
			k.must(os.Remove(filepath.Join(dir, entry.Name())))
		}
	}
	k.must(os.RemoveAll(filepath.Join(dir, old)))
}

// subPath is what a container mounts as a sub-path of a volume: the path resolved,
// bound in a directory of the container's. It is made where it is not there.
func (k *kubelet) subPath(volume, path, container string, index int) string {
	k.e.Helper()
	source := filepath.Join(volume, path)
	if _, err := os.Stat(source); errors.Is(err, fs.ErrNotExist) {
		info, err := os.Stat(volume)
		k.must(err)
		k.must(os.MkdirAll(source, 0o755))
		k.must(os.Chmod(source, info.Mode().Perm()))
	}
	source, err := filepath.EvalSymlinks(source)
	k.must(err)
	parent := k.path("volume-subpaths", filepath.Base(volume), container)
	target := filepath.Join(parent, strconv.Itoa(index))
	info, err := os.Stat(source)
	k.must(err)
	if info.IsDir() {
		k.must(os.Mkdir(target, 0o750))
	} else {
		k.file(parent, strconv.Itoa(index), "", 0o640)
	}
	k.mount(source, target, "", unix.MS_BIND, "")
	return target
}

// fsGroup gives a volume to a group, as a pod's security context has it.
func (k *kubelet) fsGroup(dir string, group int, readOnly bool) {
	k.e.Helper()
	k.must(filepath.WalkDir(dir, func(path string, entry fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := entry.Info()
		if err != nil {
			return err
		}
		if err := os.Lchown(path, -1, group); err != nil || info.Mode()&fs.ModeSymlink != 0 {
			return err
		}
		mode := info.Mode() | 0o660
		if readOnly {
			mode = info.Mode() | 0o440
		}
		if info.IsDir() {
			mode |= fs.ModeSetgid | 0o110
		}
		return os.Chmod(path, mode)
	}))
}

// rw is a mount of a volume.
func rw(host, path string) *runtime.Mount {
	return &runtime.Mount{HostPath: host, ContainerPath: path}
}

func ro(host, path string) *runtime.Mount {
	return &runtime.Mount{HostPath: host, ContainerPath: path, Readonly: true}
}

// with has a container mount these, beside what it does already.
func with(mounts ...*runtime.Mount) func(*runtime.ContainerConfig) {
	return func(c *runtime.ContainerConfig) { c.Mounts = append(c.Mounts, mounts...) }
}

// user has a container run as one, with a group of its own and one of its volumes.
func user(uid, gid, fsGroup int64) func(*runtime.ContainerConfig) {
	return func(c *runtime.ContainerConfig) {
		s := c.Linux.SecurityContext
		s.RunAsUser, s.RunAsGroup = &runtime.Int64Value{Value: uid}, &runtime.Int64Value{Value: gid}
		s.SupplementalGroups = []int64{fsGroup}
	}
}

// builtProbe is the program of the directory probe.
var builtProbe = sync.OnceValues(func() ([]byte, error) { return built("./probe") })

// built is the program of a package, without what a container may not have.
func built(pkg string) ([]byte, error) {
	dir, err := os.MkdirTemp("", "husk-build-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	program := filepath.Join(dir, "program")
	build := exec.Command("go", "build", "-trimpath", "-ldflags=-s -w", "-o", program, pkg)
	build.Env = append(os.Environ(), "CGO_ENABLED=0") // there are no libraries in a container
	if out, err := build.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("build %s: %w: %s", pkg, err, out)
	}
	return os.ReadFile(program)
}

// probe gives a container the program /probe.
func (e *env) probe() func(*runtime.ContainerConfig) {
	e.Helper()
	return with(ro(e.probePath(), "/probe"))
}

// probePath is where the host has the program.
func (e *env) probePath() string {
	e.Helper()
	path := filepath.Join(e.d.Dir, "probe")
	if _, err := os.Stat(path); err == nil {
		return path
	}
	program, err := builtProbe()
	if err == nil {
		err = os.WriteFile(path, program, 0o755)
	}
	if err != nil {
		e.Fatal(err)
	}
	return path
}

// tree is what the host has in directories, as probe tells it.
func (e *env) tree(dirs ...string) string {
	e.Helper()
	out, err := exec.Command(e.probePath(), append([]string{"tree"}, dirs...)...).CombinedOutput()
	if err != nil {
		e.Fatalf("tree: %v: %s", err, out)
	}
	return strings.TrimSpace(string(out))
}

// wantTree wants a container to see in its directories what the host has in its.
func (c *container) wantTree(host, guest []string) {
	c.e.Helper()
	if want, got := c.e.tree(host...), c.sh("/probe tree "+strings.Join(guest, " ")); got != want {
		c.e.Errorf("in the container:\n%s\non the host:\n%s", got, want)
	}
}

// hostRead is a file of the host's.
func (e *env) hostRead(path string) string {
	e.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		e.Error(err)
	}
	return string(data)
}
