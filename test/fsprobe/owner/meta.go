package owner

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"os"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/husk-containers/husk/test/fsprobe/try"
)

func times(t *try.T) error {
	path, err := t.File("file", "text")
	if err != nil {
		return err
	}
	stamp := func() (st unix.Stat_t) {
		_ = unix.Lstat(path, &st) // zeros tell
		return st
	}
	for _, at := range []unix.Timespec{{Sec: 1700000000, Nsec: 123456789}, {Sec: 0, Nsec: 1}, {Sec: -1, Nsec: 999999999}, {Sec: 4102444800}, {Sec: 1 << 33}} {
		later := unix.Timespec{Sec: at.Sec + 1, Nsec: at.Nsec}
		err := unix.UtimesNanoAt(unix.AT_FDCWD, path, []unix.Timespec{at, later}, 0)
		st := stamp()
		t.Say(fmt.Sprintf("set %d.%09d", at.Sec, at.Nsec), try.Result(err)+fmt.Sprintf(", %d.%09d %d.%09d", st.Atim.Sec, st.Atim.Nsec, st.Mtim.Sec, st.Mtim.Nsec))
	}
	set := func(atime, mtime unix.Timespec) string {
		return try.Result(unix.UtimesNanoAt(unix.AT_FDCWD, path, []unix.Timespec{atime, mtime}, 0))
	}
	omit, now := unix.Timespec{Nsec: unix.UTIME_OMIT}, unix.Timespec{Nsec: unix.UTIME_NOW}
	t.Say("both", set(unix.Timespec{Sec: 10}, unix.Timespec{Sec: 20}))
	t.Say("omit one", set(omit, unix.Timespec{Sec: 30})+fmt.Sprintf(", %d %d", stamp().Atim.Sec, stamp().Mtim.Sec))
	t.Say("omit the other", set(unix.Timespec{Sec: 40}, omit)+fmt.Sprintf(", %d %d", stamp().Atim.Sec, stamp().Mtim.Sec))
	t.Say("now", set(omit, now)+fmt.Sprintf(", %d, not as it was: %s", stamp().Atim.Sec, try.Yes(stamp().Mtim.Sec > 1000)))
	t.Say("both, again", set(unix.Timespec{Sec: 10}, unix.Timespec{Sec: 20}))
	if err := os.WriteFile(path, []byte("more"), 0); err != nil {
		return err
	}
	t.Say("mtime after a write is new", try.Yes(stamp().Mtim.Sec > 1000))
	before := stamp()
	if err := os.Chmod(path, 0o600); err != nil {
		return err
	}
	t.Say("mtime after chmod is as it was", try.Yes(stamp().Mtim == before.Mtim))
	t.Say("of a symbolic link", try.Result(os.Symlink("file", t.Path("link")))+", "+
		try.Result(unix.UtimesNanoAt(unix.AT_FDCWD, t.Path("link"), []unix.Timespec{{Sec: 5}, {Sec: 6}}, unix.AT_SYMLINK_NOFOLLOW)))
	dir := t.Path("dir")
	if err := os.Mkdir(dir, 0o755); err != nil {
		return err
	}
	if err := unix.UtimesNanoAt(unix.AT_FDCWD, dir, []unix.Timespec{{Sec: 5}, {Sec: 6}}, 0); err != nil {
		return err
	}
	if _, err := t.File("dir/new", ""); err != nil {
		return err
	}
	var st unix.Stat_t
	t.Say("mtime of a directory after a new name is new", try.Result(unix.Stat(dir, &st))+", "+try.Yes(st.Mtim.Sec > 1000))
	var x unix.Statx_t
	t.Say("statx", try.Result(unix.Statx(unix.AT_FDCWD, path, 0, unix.STATX_BASIC_STATS, &x))+fmt.Sprintf(", %o, %d bytes", x.Mode, x.Size))
	return nil
}

func statfs(t *try.T) error {
	var st unix.Statfs_t
	if err := unix.Statfs(t.Dir, &st); err != nil {
		return err
	}
	types := map[int64]string{unix.EXT4_SUPER_MAGIC: "ext4", unix.OVERLAYFS_SUPER_MAGIC: "overlay", unix.TMPFS_MAGIC: "tmpfs", unix.FUSE_SUPER_MAGIC: "fuse"}
	t.Say("type", types[st.Type])
	t.Say("longest name", fmt.Sprint(st.Namelen))
	t.Say("block", fmt.Sprint(st.Bsize, st.Frsize))
	t.Say("room", try.Yes(st.Blocks > 0 && st.Bavail > 0 && st.Bfree >= st.Bavail))
	return nil
}

// inotify is what one process sees of what another one does.
func inotify(t *try.T) error {
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return err
	}
	events := os.NewFile(uintptr(fd), "inotify")
	defer events.Close()
	_, err = unix.InotifyAddWatch(fd, t.Dir, unix.IN_ALL_EVENTS&^(unix.IN_ACCESS|unix.IN_OPEN))
	t.Say("watch", try.Result(err))
	p, err := t.Peer(nil)
	if err != nil {
		return err
	}
	for _, command := range [][]string{
		{"open", "file", "create"},
		{"write", "text"},
		{"close"},
		{"chmod", "file", "600"},
		{"rename", "file", "renamed"},
		{"link", "renamed", "link"},
		{"truncate", "link", "2"},
		{"unlink", "link"},
		{"mkdir", "dir"},
	} {
		did := p.Do(command...)
		t.Say(strings.Join(command, " "), did+seen(fd))
	}
	return p.End()
}

// seen are the events that there are now: what a local process has done is told
// before its call returns.
func seen(fd int) string {
	buf := make([]byte, 4096)
	n, err := unix.Read(fd, buf)
	if err != nil {
		return ", " + try.Result(err)
	}
	var list strings.Builder
	for rest := buf[:n]; len(rest) >= unix.SizeofInotifyEvent; {
		mask, length := binary.NativeEndian.Uint32(rest[4:]), binary.NativeEndian.Uint32(rest[12:])
		name := rest[unix.SizeofInotifyEvent:][:length]
		fmt.Fprintf(&list, ", %#x %s", mask, bytes.TrimRight(name, "\x00"))
		rest = rest[unix.SizeofInotifyEvent+length:]
	}
	return list.String()
}

func mknod(t *try.T) error {
	for _, c := range []struct {
		name         string
		kind         uint32
		major, minor uint32
	}{
		{"null", unix.S_IFCHR, 1, 3},
		{"kmem", unix.S_IFCHR, 1, 2},
		{"tun", unix.S_IFCHR, 10, 200},
		{"loop", unix.S_IFBLK, 7, 99},
		{"whiteout", unix.S_IFCHR, 0, 0},
		{"fifo", unix.S_IFIFO, 0, 0},
		{"socket", unix.S_IFSOCK, 0, 0},
		{"file", unix.S_IFREG, 0, 0},
	} {
		path := t.Path(c.name)
		err := unix.Mknod(path, c.kind|0o640, int(unix.Mkdev(c.major, c.minor)))
		var st unix.Stat_t
		statErr := unix.Lstat(path, &st)
		t.Say(c.name, try.Result(err)+", "+try.Result(statErr)+", "+try.Mode(path)+fmt.Sprintf(", %d:%d", unix.Major(st.Rdev), unix.Minor(st.Rdev)))
	}
	f, err := os.OpenFile(t.Path("null"), os.O_RDWR|syscall.O_NONBLOCK, 0)
	if err != nil {
		t.Say("open null", try.Result(err))
		return nil
	}
	defer f.Close()
	n, err := f.Read(make([]byte, 1))
	t.Say("read null", fmt.Sprint(n, " ", err == io.EOF))
	return nil
}
