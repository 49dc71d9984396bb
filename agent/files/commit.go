package files

import (
	"errors"
	"io"
	"os"
	"path"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/husk-containers/husk/agent/archive"
	"github.com/husk-containers/husk/internal/beneath"
)

// commit makes the copy what was read. before are the names that syncs before have
// put there.
func (t *tree) commit(before map[string]struct{}) error {
	for _, name := range t.moves {
		if err := t.move(name); err != nil {
			return archive.Failed("put in place", name, err)
		}
	}
	for _, name := range t.keep {
		if err := t.fix(name); err != nil {
			return archive.Failed("set owner, mode and time of", name, err)
		}
	}
	for _, first := range []bool{true, false} {
		for _, name := range t.links {
			if strings.HasPrefix(path.Base(name), "..") != first {
				continue
			}
			if err := t.move(name); err != nil {
				return archive.Failed("put in place", name, err)
			}
		}
	}
	for _, name := range sorted(before) {
		if err := t.remove(name); err != nil {
			return archive.Failed("remove", name, err)
		}
	}
	for _, name := range t.keep { // what was renamed or removed in them has changed these
		if e := t.entries[name]; e.dir {
			if err := t.atKept(name, e.SetTime); err != nil {
				return archive.Failed("set time of", name, err)
			}
		}
	}
	return nil
}

// move has a new entry take the place of what there is.
func (t *tree) move(name string) error {
	e := t.entries[name]
	dir, base, err := t.kept(name)
	if err != nil {
		return err
	}
	if name == self && !e.dir {
		if done, err := t.rewrite(dir, base, e); done || err != nil {
			return err
		}
	}
	err = unix.Renameat2(t.stage, e.staged, dir, base, 0)
	switch {
	case errors.Is(err, unix.EISDIR), errors.Is(err, unix.ENOTDIR), errors.Is(err, unix.ENOTEMPTY), errors.Is(err, unix.EEXIST):
		// It is of another kind; that goes with the stage.
		err = unix.Renameat2(t.stage, e.staged, dir, base, unix.RENAME_EXCHANGE)
	}
	return err
}

// rewrite changes the target in place, where it is a single file: what a container
// has mounted is its inode. All the memory that takes is there before the first byte
// changes.
func (t *tree) rewrite(dir int, base string, e *entry) (done bool, err error) {
	from, err := beneath.Open(t.stage, e.staged, unix.O_RDONLY)
	if err != nil {
		return false, err
	}
	staged := os.NewFile(uintptr(from), e.staged)
	defer staged.Close()
	info, err := staged.Stat()
	if err != nil {
		return false, err
	}
	to, err := beneath.Open(dir, base, unix.O_WRONLY)
	if errors.Is(err, unix.ENOENT) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	f := os.NewFile(uintptr(to), base)
	defer f.Close()
	if info.Size() > 0 {
		if err := unix.Fallocate(to, unix.FALLOC_FL_KEEP_SIZE, 0, info.Size()); err != nil && !errors.Is(err, unix.EOPNOTSUPP) {
			return false, err
		}
	}
	if _, err := io.Copy(f, staged); err != nil {
		return false, err
	}
	if err := f.Truncate(info.Size()); err != nil {
		return false, err
	}
	return true, e.Set(to, nil)
}

// fix gives what stays its owner, mode and time; a directory its time later.
func (t *tree) fix(name string) error {
	e := t.entries[name]
	return t.atKept(name, func(fd int) error {
		m := e.Meta
		if e.dir {
			var st unix.Stat_t
			if err := unix.Fstat(fd, &st); err != nil {
				return err
			}
			m.MTime = st.Mtim
		}
		return m.Set(fd, nil)
	})
}

// atKept does something to what the copy has at name.
func (t *tree) atKept(name string, do func(fd int) error) error {
	dir, base, err := t.kept(name)
	if err != nil {
		return err
	}
	return archive.At(dir, base, do)
}

// remove removes what the archive no longer has, unless that went with a directory.
func (t *tree) remove(name string) error {
	if t.entries[name] != nil || name == self {
		return nil
	}
	above := t.entries[path.Dir(name)]
	if above == nil || !above.dir || above.staged != "" {
		return nil
	}
	dir, base, err := t.kept(name)
	if err != nil {
		return err
	}
	root, err := os.OpenRoot(archive.Proc(dir))
	if err != nil {
		return err
	}
	defer root.Close()
	return root.RemoveAll(base)
}
