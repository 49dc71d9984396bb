package files

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path"
	"slices"
	"strings"
	"sync"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/husk-containers/husk/agent/archive"
	"github.com/husk-containers/husk/internal/beneath"
	agentv1 "github.com/husk-containers/husk/protocols/agent/v1"
)

// stageDir holds what is on its way into copies. It is of their file system, so
// that a rename suffices, and beside them, so that no container sees it.
const stageDir = ".stage"

// dirMode is the mode of the directories that copies are in: what is in them is
// reached by those alone who have it mounted or know its name.
const dirMode = 0o711

// copies are what the guest keeps of files of the host's.
type copies struct {
	dir string

	mu  sync.Mutex
	all map[string]*oneCopy // by name below dir
}

// A oneCopy is one target.
type oneCopy struct {
	turn chan struct{} // holds one for whoever works on it
	// names are what syncs have put below the target; what else is there, such as
	// the place of a mount that a runtime has made, is not theirs to remove. It
	// belongs to who has the turn.
	names map[string]struct{}
}

func newCopies(dir string) *copies {
	return &copies{dir: dir, all: make(map[string]*oneCopy)}
}

// take waits for the turn on the copy at target, and returns the name that it has
// below dir.
func (c *copies) take(ctx context.Context, target string) (name string, one *oneCopy, err error) {
	name, err = c.name(target)
	if err != nil {
		return "", nil, err
	}
	for {
		one = c.get(name)
		select {
		case one.turn <- struct{}{}:
		case <-ctx.Done():
			return "", nil, context.Cause(ctx)
		}
		if c.get(name) == one {
			return name, one, nil
		}
		<-one.turn // dropped meanwhile
	}
}

func (c *copies) get(name string) *oneCopy {
	c.mu.Lock()
	defer c.mu.Unlock()
	one := c.all[name]
	if one == nil {
		one = &oneCopy{turn: make(chan struct{}, 1)}
		c.all[name] = one
	}
	return one
}

func (c *copies) name(target string) (string, error) {
	if !agentv1.Below(target, c.dir) {
		return "", archive.Invalid("the target is not a clean path below %s", c.dir)
	}
	name := strings.TrimPrefix(target, c.dir+"/")
	if strings.HasPrefix(name, ".") {
		return "", archive.Invalid("the target begins with a dot")
	}
	return name, nil
}

// open opens the directory that holds copies, which it makes.
func (c *copies) open() (int, error) {
	if err := mkdirAll(c.dir); err != nil {
		return -1, archive.Failed("make", c.dir, err)
	}
	fd, err := unix.Open(c.dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, archive.Failed("open", c.dir, err)
	}
	return fd, nil
}

// mkdirAll makes dir and what is missing above it.
func mkdirAll(dir string) error {
	err := unix.Mkdir(dir, dirMode)
	if errors.Is(err, unix.ENOENT) && dir != "/" {
		if err := mkdirAll(path.Dir(dir)); err != nil {
			return err
		}
		err = unix.Mkdir(dir, dirMode)
	}
	if errors.Is(err, unix.EEXIST) {
		return nil
	}
	if err == nil {
		err = unix.Chmod(dir, dirMode) // whatever the umask
	}
	return err
}

// sync makes the copy at target what the archive in body says. Before that has ended
// nothing of the copy changes.
func (c *copies) sync(ctx context.Context, target string, body io.Reader) error {
	name, one, err := c.take(ctx, target)
	if err != nil {
		return err
	}
	defer func() { <-one.turn }()
	dir, err := c.open()
	if err != nil {
		return err
	}
	defer unix.Close(dir)
	if err := mkdirAll(path.Dir(target)); err != nil {
		return archive.Failed("make", path.Dir(target), err)
	}
	if err := mkdirAll(path.Join(c.dir, stageDir)); err != nil {
		return archive.Failed("make", stageDir, err)
	}
	stagePath, err := os.MkdirTemp(path.Join(c.dir, stageDir), "") // 0700
	if err != nil {
		return archive.Failed("make", stageDir, err)
	}
	defer os.RemoveAll(stagePath)
	stage, err := unix.Open(stagePath, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return archive.Failed("open", stageDir, err)
	}
	defer unix.Close(stage)

	t := newTree(dir, stage, name)
	defer t.close()
	if err := t.read(body); err != nil {
		return full(err)
	}
	err = t.commit(one.names)
	if one.names == nil || err == nil {
		one.names = make(map[string]struct{}, len(t.entries))
	}
	for name := range maps.Keys(t.entries) {
		one.names[name] = struct{}{}
	}
	return full(err)
}

// full says what to do where there is no room.
func full(err error) error {
	if errors.Is(err, errdefs.ErrResourceExhausted) {
		return fmt.Errorf("the guest has no memory left for a copy of this size, give it more: %w", err)
	}
	return err
}

// drop removes the copy at target, and the directories above it that are empty
// then.
func (c *copies) drop(ctx context.Context, target string) error {
	name, one, err := c.take(ctx, target)
	if err != nil {
		return err
	}
	defer func() { <-one.turn }()
	root, err := os.OpenRoot(c.dir)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return archive.Failed("open", c.dir, err)
	}
	defer root.Close()
	if err := root.RemoveAll(name); err != nil {
		return archive.Failed("remove", name, err)
	}
	for above := path.Dir(name); above != "."; above = path.Dir(above) {
		if root.Remove(above) != nil {
			break
		}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.all, name)
	return nil
}

// read writes the last bytes, most at most, of the file at target.
func (c *copies) read(target string, most int, w io.Writer) error {
	name, err := c.name(target)
	if err != nil {
		return err
	}
	dir, err := c.open()
	if err != nil {
		return err
	}
	defer unix.Close(dir)
	fd, err := beneath.Open(dir, name, unix.O_RDONLY)
	if err != nil {
		return archive.Failed("open", name, err)
	}
	f := os.NewFile(uintptr(fd), name)
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return archive.Failed("open", name, err)
	}
	if !info.Mode().IsRegular() {
		return fmt.Errorf("%q is not a file: %w", name, errdefs.ErrFailedPrecondition)
	}
	from := max(0, info.Size()-int64(most))
	if _, err := io.Copy(w, io.NewSectionReader(f, from, int64(most))); err != nil {
		return archive.Failed("read", name, err)
	}
	return nil
}

// sorted are the names that a set has, parents first.
func sorted(set map[string]struct{}) []string { return slices.Sorted(maps.Keys(set)) }
