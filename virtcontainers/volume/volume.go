// Package volume is the table of what the containers of a sandbox mount: what each
// source is decides how it reaches the guest.
package volume

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"path"
	"path/filepath"
	"strconv"
	"sync"

	"github.com/opencontainers/runtime-spec/specs-go"

	agentv1 "github.com/husk-containers/husk/protocols/agent/v1"
	"github.com/husk-containers/husk/virtcontainers/copies"
	"github.com/husk-containers/husk/virtcontainers/inotify"
	"github.com/husk-containers/husk/virtcontainers/spec"
	"github.com/husk-containers/husk/virtcontainers/storage"
)

// Dir is the directory of the volumes below the one that the guest sees. No
// container's id begins with a dot.
const Dir = ".volumes"

// guest is what the table needs of the guest; see guest.Guest.
type guest interface {
	Call(ctx context.Context, f func(context.Context, agentv1.AgentClient) error) error
	Dial(ctx context.Context, port uint32) (net.Conn, error)
	Lost(err error) bool
}

// Options is what a Table is made of.
type Options struct {
	// Private is the directory whose mounts the guest sees at spec.GuestShare, and
	// which holds Dir; Stage is one that it does not see.
	Private, Stage string
	// Clone takes the host's mounts.
	Clone storage.Clone
	Guest guest
	// Sockets carries connections to sockets of the host.
	Sockets hostSockets
	Log     *slog.Logger
}

// A Table holds the volumes of a sandbox. Containers that mount the same source
// share one: what one of them binds, locks or watches there, the others see. Its
// methods are safe for concurrent use.
type Table struct {
	opts    Options
	inotify *inotify.Instance // of all that is watched on the host

	follows chan struct{} // closed when there is something to follow
	once    sync.Once

	mu        sync.Mutex
	last      int // number of a volume; none is used twice
	volumes   map[key]*volume
	followers []*Mount
	mirrors   []*storage.Mirror
}

// A key says which mounts share a volume.
type key struct {
	kind                           Kind
	dev, ino                       uint64 // ino is 0 where the file system is the volume
	recursive, follows             bool
	readOnly, allReadOnly, private bool
	n                              int // number of a private one
}

// New returns an empty table.
func New(o Options) *Table {
	return &Table{opts: o, inotify: inotify.New(), volumes: map[key]*volume{}, follows: make(chan struct{})}
}

// A User is the container that mounts something.
type User struct {
	ID string
	// Bundle is where relative sources begin.
	Bundle string
	Spec   *specs.Spec
	// CgroupsPath is the container's on the host.
	CgroupsPath string
}

// A Mount is a container's use of a volume, until its Release.
type Mount struct {
	table  *Table
	user   User
	bind   *spec.Bind
	volume *volume
	// within is the directory of the volume that is mounted; empty: all of it.
	within string
	// directories to be there, of Memory.
	directories []*agentv1.Directory

	// held are the file systems that the agent knows of, where the mount follows the
	// host; guarded by the table.
	held []string
}

// Add finds out what a bind is of, and does on the host what that needs; the guest
// need not be there yet. Its error names the mount.
func (t *Table) Add(ctx context.Context, u User, b *spec.Bind) (_ *Mount, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("%s: %w", b.Field, err)
		}
	}()
	src, err := open(b, u.Bundle, t.opts.Clone)
	if err != nil {
		return nil, err
	}
	if err := src.lookBelow(b, t.opts.Stage, t.opts.Clone); err != nil {
		return nil, errors.Join(fmt.Errorf("source %s: %w", src.name, err), src.Close())
	}
	kind, err := t.kindOf(b, src)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("source %s %w", src.name, err), src.Close())
	}
	if kind == HugePages && src.size == 0 {
		src.size = hugePageLimit(u.Spec, src.block)
	}
	m := &Mount{table: t, user: u, bind: b}
	m.volume = t.take(keyOf(kind, b, src), src)
	switch kind {
	case Memory:
		m.within, m.directories = src.root, src.tree()
	case Devices:
		m.within = src.root
	}
	m.volume.host.Do(func() { m.volume.hostErr = m.volume.place(b) })
	if src != m.volume.source {
		err = src.Close()
	}
	if err = errors.Join(m.volume.hostErr, err); err != nil {
		return nil, errors.Join(fmt.Errorf("share %s: %w", src.name, err), m.Release(ctx))
	}
	return m, nil
}

// hugePageLimit is how many bytes of pages of that size a container may have, 0 where
// its spec does not say.
func hugePageLimit(sp *specs.Spec, page uint64) uint64 {
	if sp.Linux.Resources == nil {
		return 0
	}
	for _, l := range sp.Linux.Resources.HugepageLimits {
		if l.Pagesize == pageName(page) {
			return l.Limit
		}
	}
	return 0
}

// pageName is a page's size as cgroups name it, such as 2MB.
func pageName(bytes uint64) string {
	for _, unit := range []struct {
		name  string
		shift int
	}{{"GB", 30}, {"MB", 20}} {
		if n := bytes >> unit.shift; n > 0 {
			return fmt.Sprintf("%d%s", n, unit.name)
		}
	}
	return fmt.Sprintf("%dKB", bytes>>10)
}

// kindOf is the package's kindOf, where the table does not know better: what a tmpfs
// was first taken for, it is.
func (t *Table) kindOf(b *spec.Bind, src *source) (Kind, error) {
	t.mu.Lock()
	known := t.volumes[key{kind: Memory, dev: src.dev}]
	t.mu.Unlock()
	if known != nil && src.mode.IsDir() {
		return Memory, nil
	}
	return kindOf(b, src.facts)
}

// keyOf is the key of the volume that a source is, or becomes.
func keyOf(kind Kind, b *spec.Bind, src *source) key {
	k := key{kind: kind}
	switch kind {
	case Memory, HugePages, Devices:
		k.dev = src.dev
	case Copied:
		k.dev, k.ino = src.dev, src.ino
	case Shared:
		k.dev, k.ino, k.recursive, k.follows = src.dev, src.ino, b.Recursive, b.Follows
		k.readOnly, k.allReadOnly = b.ReadOnly, b.AllReadOnly
	case Device, Socket:
		k.private = true
	}
	return k
}

// take returns the volume of a key, which takes over the source where it is new.
func (t *Table) take(k key, src *source) *volume {
	if v := t.join(k); v != nil {
		return v
	}
	return t.add(&volume{table: t, key: k, source: src})
}

// join returns the volume of a key, if there is one, with one user more.
func (t *Table) join(k key) *volume {
	t.mu.Lock()
	defer t.mu.Unlock()
	// One that is writable will do: the guest has been given that, and its own kernel
	// keeps the container from writing.
	for _, k := range []key{writable(k), k} {
		if v := t.volumes[k]; v != nil && !k.private {
			v.users++
			return v
		}
	}
	return nil
}

// add makes a volume known, with its first user, unless another was quicker, which
// then it returns.
func (t *Table) add(v *volume) *volume {
	t.mu.Lock()
	defer t.mu.Unlock()
	if other := t.volumes[v.key]; other != nil && !v.key.private {
		other.users++
		return other
	}
	t.last++
	if v.key.private {
		v.key.n = t.last
	}
	v.name, v.users = strconv.Itoa(t.last), 1
	t.volumes[v.key] = v
	return v
}

func writable(k key) key {
	k.readOnly, k.allReadOnly = false, false
	return k
}

// Ready does in the guest what the mount needs there, and tells the spec where the
// guest has it.
func (m *Mount) Ready(ctx context.Context) error {
	v := m.volume
	v.guest.Do(func() { v.guestErr = v.ready(ctx, m.user) })
	err := v.guestErr
	if err == nil && len(m.directories) > 0 {
		err = v.mount(ctx, m.directories)
	}
	if err == nil && v.sockets != nil {
		err = v.sockets.join(ctx, m)
	}
	if err != nil {
		return fmt.Errorf("%s: %w", m.bind.Field, err)
	}
	m.bind.At(path.Join(v.path, m.within), v.key.kind == Shared && (m.bind.Follows || v.sockets != nil))
	return nil
}

// FileSystems returns the guest's directories at which file systems of the host
// appear, each after the one that it is below. Those that appear later are Follow's to
// tell of.
func (m *Mount) FileSystems() ([]string, error) {
	if m.volume.key.kind != Shared {
		return nil, nil
	}
	dirs, err := m.fileSystems()
	if err == nil && m.bind.Follows {
		m.table.follow(m, dirs)
	}
	return dirs, err
}

func (m *Mount) fileSystems() ([]string, error) {
	dirs, err := storage.FileSystems(m.volume.dir())
	for i, dir := range dirs {
		dirs[i] = m.volume.path + dir[len(m.volume.dir()):]
	}
	return dirs, err
}

// Release gives up the mount; a volume goes with its last one, but for memory, which
// later containers of the pod find again.
func (m *Mount) Release(ctx context.Context) error {
	v := m.volume
	v.table.unfollow(m)
	var err error
	if v.sockets != nil {
		err = v.sockets.leave(ctx, m)
	}
	v.table.mu.Lock()
	v.users--
	last := v.users == 0 && (v.key.kind != Memory || v.hostErr != nil || v.guestErr != nil)
	if last {
		delete(v.table.volumes, v.key)
	}
	v.table.mu.Unlock()
	if last {
		err = errors.Join(err, v.remove(ctx))
	}
	return err
}

// A volume is one source as the guest sees it.
type volume struct {
	table  *Table
	key    key
	name   string
	source *source
	users  int // guarded by the table

	host, guest       sync.Once
	hostErr, guestErr error
	// path in the guest, set by place.
	path string
	// made: there is something in the guest to take back.
	made bool
	// following is the copy of a Copied one.
	following *copies.Copy
	// disconnect takes a Socket away.
	disconnect func(context.Context) error
	// mirror is what a Shared one that follows the host is shown by.
	mirror *storage.Mirror
	// sockets are those in a Shared directory; nil for a file.
	sockets *socketDir
}

// dir is where the host has what it shows to the guest.
func (v *volume) dir() string { return filepath.Join(v.table.opts.Private, Dir, v.name) }

// place does the host's part.
func (v *volume) place(b *spec.Bind) error {
	switch v.key.kind {
	case Memory, HugePages:
		v.path = path.Join(agentv1.VolumesDir, v.name)
		return v.source.Close() // or it would pin the host's
	case Device:
		v.path = agentv1.Device{Kind: 'c', Major: v.source.major, Minor: v.source.minor}.Node()
	case Devices:
		v.path = "/dev"
	case Copied:
		v.path = path.Join(agentv1.CopiesDir, v.name)
	case Shared:
		v.path = path.Join(spec.GuestShare, Dir, v.name)
		return v.share(b)
	}
	return nil
}

// share shows the source to the guest by virtio-fs.
func (v *volume) share(b *spec.Bind) error {
	how := storage.Attributes{Recursive: b.Recursive, ReadOnly: b.ReadOnly, AllReadOnly: b.AllReadOnly}
	if !v.source.mode.IsDir() {
		if err := os.WriteFile(v.dir(), nil, 0o600); err != nil {
			return err
		}
		return storage.Attach(v.source.File, v.dir(), how)
	}
	if err := os.Mkdir(v.dir(), 0o755); err != nil {
		return err
	}
	attach := func() error { return storage.Attach(v.source.File, v.dir(), how) }
	if b.Follows {
		attach = func() error { return v.follow(how) }
	}
	if err := attach(); err != nil {
		return err
	}
	v.sockets = v.table.watchSockets(v)
	return nil
}

// ready does the guest's part.
func (v *volume) ready(ctx context.Context, u User) error {
	switch v.key.kind {
	case Memory, HugePages:
		v.made = true
		return v.mount(ctx, nil)
	case Copied:
		err := v.copy(ctx)
		v.made = err == nil // one that is broken off leaves nothing
		return err
	case Socket:
		return v.connect(ctx, u)
	case Shared:
		if v.sockets != nil {
			v.sockets.follow(ctx)
		}
	}
	return nil
}

// mount has the guest mount its own, with these directories.
func (v *volume) mount(ctx context.Context, directories []*agentv1.Directory) error {
	src := v.source
	s := &agentv1.Storage{
		Kind: agentv1.Storage_KIND_TMPFS, Target: v.path, SizeBytes: src.size,
		Mode: 0o1777, // the kernel's default, where the source is not the root
	}
	if v.key.kind == HugePages {
		s.Kind, s.PageBytes = agentv1.Storage_KIND_HUGETLBFS, src.block
	}
	if path.Clean("/"+src.root) == "/" {
		s.Mode, s.Uid, s.Gid = src.permissions(), src.uid, src.gid
	}
	return v.table.opts.Guest.Call(ctx, func(ctx context.Context, a agentv1.AgentClient) error {
		_, err := a.MountStorage(ctx, &agentv1.MountStorageRequest{Storage: s, Directories: directories})
		return err
	})
}

// remove takes back what place and ready have done.
func (v *volume) remove(ctx context.Context) error {
	var errs []error
	if v.disconnect != nil {
		errs = append(errs, v.disconnect(ctx))
	}
	if v.sockets != nil {
		v.sockets.stop()
	}
	switch {
	case v.made && v.key.kind == Copied:
		errs = append(errs, v.dropCopy(ctx))
	case v.made:
		err := v.table.opts.Guest.Call(ctx, func(ctx context.Context, a agentv1.AgentClient) error {
			_, err := a.UnmountStorage(ctx, &agentv1.UnmountStorageRequest{Target: v.path})
			return err
		})
		if !v.table.opts.Guest.Lost(err) {
			errs = append(errs, err)
		}
	}
	if v.mirror != nil {
		errs = append(errs, v.unfollow())
	}
	if err := v.source.Close(); err != nil && !errors.Is(err, os.ErrClosed) {
		errs = append(errs, err)
	}
	if err := storage.Detach(v.dir()); err != nil {
		return errors.Join(append(errs, err)...)
	}
	if err := os.Remove(v.dir()); err != nil && !errors.Is(err, fs.ErrNotExist) {
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}
