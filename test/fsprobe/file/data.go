package file

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/husk-containers/husk/test/fsprobe/try"
)

// pattern is data that differs at every place.
func pattern(n int) []byte {
	data := make([]byte, n)
	for i := range data {
		data[i] = byte(i ^ i>>8 ^ i>>16)
	}
	return data
}

// unlinked is a file without a name.
func unlinked(t *try.T) error {
	f, err := os.OpenFile(t.Path("file"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	fd := int(f.Fd())
	_, err = f.WriteString("before")
	t.Say("write", try.Result(err))
	t.Say("unlink", try.Result(os.Remove(f.Name()))+", "+tree(t.Dir))
	_, err = f.WriteString(", after")
	t.Say("write after that", try.Result(err))
	buf := make([]byte, 100)
	n, err := f.ReadAt(buf, 0)
	t.Say("read", try.Text(buf[:n])+", "+try.Yes(errors.Is(err, io.EOF)))
	var st unix.Stat_t
	t.Say("stat", try.Result(unix.Fstat(fd, &st))+fmt.Sprintf(", %o, %d bytes, %d links", st.Mode, st.Size, st.Nlink))
	t.Say("truncate", try.Result(f.Truncate(3)))
	t.Say("chmod", try.Result(f.Chmod(0o640)))
	t.Say("chgrp", try.Result(f.Chown(-1, os.Getgid())))
	t.Say("times", try.Result(unix.Futimes(fd, []unix.Timeval{{Sec: 1}, {Sec: 2}})))
	t.Say("stat then", try.Result(unix.Fstat(fd, &st))+fmt.Sprintf(", %o, %d bytes, mtime %d", st.Mode, st.Size, st.Mtim.Sec))
	t.Say("sync", try.Result(f.Sync()))
	again, err := os.Open(fmt.Sprintf("/proc/self/fd/%d", fd))
	t.Say("open by its descriptor", try.Result(err))
	if err == nil {
		again.Close()
	}
	t.Say("link again", try.Result(unix.Linkat(unix.AT_FDCWD, fmt.Sprintf("/proc/self/fd/%d", fd), unix.AT_FDCWD, t.Path("linked"), unix.AT_SYMLINK_FOLLOW)))
	t.Say("create of the same name", try.Result(os.WriteFile(t.Path("file"), []byte("another"), 0o600))+", "+try.Contents(t.Path("file")))
	n, _ = f.ReadAt(buf, 0)
	t.Say("the first one then", try.Text(buf[:n]))
	return nil
}

func tmpfile(t *try.T) error {
	fd, err := unix.Open(t.Dir, unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC, 0o640)
	t.Say("open", try.Result(err))
	if err != nil {
		return nil
	}
	defer unix.Close(fd) //nolint:errcheck // its data are read by name
	_, err = unix.Write(fd, []byte("text"))
	t.Say("write", try.Result(err))
	t.Say("link", try.Result(unix.Linkat(unix.AT_FDCWD, fmt.Sprintf("/proc/self/fd/%d", fd), unix.AT_FDCWD, t.Path("file"), unix.AT_SYMLINK_FOLLOW)))
	t.Say("file", try.Contents(t.Path("file"))+", "+try.Mode(t.Path("file")))
	return nil
}

func truncate(t *try.T) error {
	path, err := t.File("file", "text")
	if err != nil {
		return err
	}
	t.Say("longer", try.Result(os.Truncate(path, 100))+", "+try.Contents(path))
	t.Say("shorter", try.Result(os.Truncate(path, 2))+", "+try.Contents(path))
	t.Say("negative", try.Result(unix.Truncate(path, -1)))
	t.Say("2^62", try.Result(unix.Truncate(path, 1<<62)))
	t.Say("of a directory", try.Result(unix.Truncate(t.Dir, 0)))
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	t.Say("of a read-only descriptor", try.Result(f.Truncate(1)))
	w, err := os.OpenFile(path, os.O_WRONLY|os.O_TRUNC, 0)
	if err != nil {
		return err
	}
	defer w.Close()
	t.Say("by open", try.Size(path))
	_, err = w.WriteAt([]byte("end"), 5000)
	t.Say("write past the end", try.Result(err)+", "+try.Contents(path))
	_, err = unix.Pwrite(int(w.Fd()), []byte("x"), 1<<62)
	t.Say("write at 2^62", try.Result(err))
	_, err = unix.Pread(int(f.Fd()), make([]byte, 1), 1<<62)
	t.Say("read at 2^62", try.Result(err))
	return nil
}

// sparse is a file of 8 GiB that holds next to nothing.
func sparse(t *try.T) error {
	const length = 8 << 30
	f, err := os.OpenFile(t.Path("file"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	t.Say("truncate", try.Result(f.Truncate(length)))
	for _, at := range []int64{0, 1 << 31, 1<<32 + 5, length - 4} {
		_, err := f.WriteAt([]byte("data"), at)
		t.Say(fmt.Sprintf("write at %d", at), try.Result(err))
	}
	buf := make([]byte, 12)
	for _, at := range []int64{1<<31 - 4, 1<<32 + 1, 6 << 30, length - 8} {
		n, err := f.ReadAt(buf, at)
		t.Say(fmt.Sprintf("read at %d", at), try.Text(buf[:n])+", "+try.Yes(err == nil))
	}
	t.Say("sync", try.Result(f.Sync()))
	var st unix.Stat_t
	t.Say("stat", try.Result(unix.Fstat(int(f.Fd()), &st))+fmt.Sprintf(", %d bytes, next to no blocks: %s", st.Size, try.Yes(st.Blocks > 0 && st.Blocks < 1024)))
	t.Say("map", extents(f))
	return nil
}

// extents is where a file has data, as SEEK_DATA and SEEK_HOLE tell.
func extents(f *os.File) string {
	var list []string
	for at := int64(0); ; {
		data, err := unix.Seek(int(f.Fd()), at, unix.SEEK_DATA)
		if err != nil {
			return strings.Join(append(list, try.Result(err)), ", ")
		}
		hole, err := unix.Seek(int(f.Fd()), data, unix.SEEK_HOLE)
		if err != nil {
			return strings.Join(append(list, try.Result(err)), ", ")
		}
		list = append(list, fmt.Sprintf("%d-%d", data, hole))
		at = hole
	}
}

func fallocate(t *try.T) error {
	for _, c := range []struct {
		name     string
		mode     uint32
		off, len int64
	}{
		{"more", 0, 0, 128 << 10},
		{"KEEP_SIZE", unix.FALLOC_FL_KEEP_SIZE, 64 << 10, 128 << 10},
		{"PUNCH_HOLE", unix.FALLOC_FL_PUNCH_HOLE | unix.FALLOC_FL_KEEP_SIZE, 8 << 10, 16 << 10},
		{"PUNCH_HOLE of odd bytes", unix.FALLOC_FL_PUNCH_HOLE | unix.FALLOC_FL_KEEP_SIZE, 5, 10000},
		{"PUNCH_HOLE alone", unix.FALLOC_FL_PUNCH_HOLE, 0, 4096},
		{"ZERO_RANGE", unix.FALLOC_FL_ZERO_RANGE, 8 << 10, 16 << 10},
		{"COLLAPSE_RANGE", unix.FALLOC_FL_COLLAPSE_RANGE, 8 << 10, 16 << 10},
		{"INSERT_RANGE", unix.FALLOC_FL_INSERT_RANGE, 8 << 10, 16 << 10},
		{"nothing", 0, 0, 0},
	} {
		path := t.Path("file")
		if err := os.WriteFile(path, pattern(64<<10), 0o600); err != nil {
			return err
		}
		f, err := os.OpenFile(path, os.O_RDWR, 0)
		if err != nil {
			return err
		}
		before := ""
		if c.mode&unix.FALLOC_FL_PUNCH_HOLE != 0 {
			before = extents(f) + " -> "
		}
		t.Say(c.name, try.Result(unix.Fallocate(int(f.Fd()), c.mode, c.off, c.len))+", "+try.Contents(path))
		if before != "" {
			t.Say("map after "+c.name, before+extents(f))
		}
		if err := f.Close(); err != nil {
			return err
		}
	}
	f, err := os.Open(t.Path("file"))
	if err != nil {
		return err
	}
	defer f.Close()
	t.Say("of a read-only descriptor", try.Result(unix.Fallocate(int(f.Fd()), 0, 0, 4096)))
	return nil
}

// copyRange is data that go from file to file within the kernel.
func copyRange(t *try.T) error {
	const length = 3<<20 + 17
	if err := os.WriteFile(t.Path("from"), pattern(length), 0o600); err != nil {
		return err
	}
	from, err := os.Open(t.Path("from"))
	if err != nil {
		return err
	}
	defer from.Close()
	for _, c := range []struct {
		name string
		copy func(to int, at *int64) (int, error)
	}{
		{"copy_file_range", func(to int, at *int64) (int, error) {
			return unix.CopyFileRange(int(from.Fd()), at, to, nil, length, 0)
		}},
		{"sendfile", func(to int, at *int64) (int, error) { return unix.Sendfile(to, int(from.Fd()), at, length) }},
	} {
		to, err := os.Create(t.Path(c.name))
		if err != nil {
			return err
		}
		var at int64
		for n := 1; err == nil && n > 0; {
			n, err = c.copy(int(to.Fd()), &at)
		}
		t.Say(c.name, try.Result(errors.Join(err, to.Close()))+", "+fmt.Sprint(at)+", "+try.Contents(t.Path(c.name)))
	}
	both, err := os.OpenFile(t.Path("from"), os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer both.Close()
	a, b := int64(0), int64(100)
	_, err = unix.CopyFileRange(int(both.Fd()), &a, int(both.Fd()), &b, 1000, 0)
	t.Say("overlapping", try.Result(err))
	_, err = unix.CopyFileRange(int(from.Fd()), nil, int(from.Fd()), nil, 10, 0)
	t.Say("to a read-only descriptor", try.Result(err))
	return nil
}

// appending is two processes that append to one file at once.
func appending(t *try.T) error {
	const n = 300
	path, err := t.File("file", "")
	if err != nil {
		return err
	}
	var peers []*try.Peer
	for _, name := range []string{"one", "two"} {
		p, err := t.Peer(nil)
		if err != nil {
			return err
		}
		t.Say("open by "+name, p.Do("open", "file", "append"))
		peers = append(peers, p)
	}
	for i, p := range peers {
		p.Begin("lines", fmt.Sprint(i), fmt.Sprint(n))
	}
	for _, p := range peers {
		t.Say("append", p.Answer())
		if err := p.End(); err != nil {
			return err
		}
	}
	data, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	lines := strings.Split(strings.TrimSuffix(string(data), "\n"), "\n")
	slices.Sort(lines)
	t.Say("lines", fmt.Sprintf("%d, %s", len(lines), try.Digest([]byte(strings.Join(lines, "\n")))))
	return os.Remove(path) // in which order they are differs
}

// direct is O_DIRECT, aligned to pages and not.
func direct(t *try.T) error {
	if err := os.WriteFile(t.Path("file"), pattern(1<<20), 0o600); err != nil {
		return err
	}
	fd, err := unix.Open(t.Path("file"), unix.O_RDWR|unix.O_DIRECT|unix.O_CLOEXEC, 0)
	t.Say("open", try.Result(err))
	if err != nil {
		return nil
	}
	defer unix.Close(fd) //nolint:errcheck // its data are read by name
	buf := make([]byte, 3<<20)
	buf = buf[-int(uintptr(unsafe.Pointer(&buf[0])))&4095:]
	for _, c := range []struct {
		what        string
		from, n, at int
	}{
		{"a page", 0, 4096, 8192}, {"much", 0, 2 << 20, 0}, {"an odd buffer", 3, 4096, 8192}, {"an odd length", 0, 1000, 8192}, {"an odd place", 0, 4096, 1},
	} {
		n, err := unix.Pread(fd, buf[c.from:c.from+c.n], int64(c.at))
		t.Say("read "+c.what, try.Result(err)+", "+try.Text(buf[c.from:c.from+max(n, 0)]))
		n, err = unix.Pwrite(fd, bytes.Repeat([]byte("w"), 8192)[:0:0], int64(c.at))
		t.Say("write nothing to "+c.what, try.Result(err)+", "+fmt.Sprint(n))
		for i := range c.n {
			buf[c.from+i] = byte(c.n + i>>8)
		}
		n, err = unix.Pwrite(fd, buf[c.from:c.from+c.n], int64(c.at))
		t.Say("write "+c.what, try.Result(err)+", "+fmt.Sprint(n)+", "+try.Contents(t.Path("file")))
	}
	return nil
}

func syncing(t *try.T) error {
	f, err := os.Create(t.Path("file"))
	if err != nil {
		return err
	}
	defer f.Close()
	dir, err := os.Open(t.Dir)
	if err != nil {
		return err
	}
	defer dir.Close()
	_, err = f.WriteString("text")
	t.Say("write", try.Result(err))
	t.Say("fsync", try.Result(f.Sync()))
	t.Say("fdatasync", try.Result(unix.Fdatasync(int(f.Fd()))))
	t.Say("fsync of a directory", try.Result(dir.Sync()))
	t.Say("syncfs", try.Result(unix.Syncfs(int(f.Fd()))))
	t.Say("sync_file_range", try.Result(unix.SyncFileRange(int(f.Fd()), 0, 0, unix.SYNC_FILE_RANGE_WRITE)))
	t.Say("fadvise", try.Result(unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED)))
	return nil
}
