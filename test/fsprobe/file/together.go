package file

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/husk-containers/husk/test/fsprobe/try"
)

// pair starts two processes and has both open the same new file.
func pair(t *try.T, data string) (a, b *try.Peer, err error) {
	if _, err := t.File("file", data); err != nil {
		return nil, nil, err
	}
	for _, p := range []**try.Peer{&a, &b} {
		if *p, err = t.Peer(nil); err != nil {
			return nil, nil, err
		}
		if answer := (*p).Do("open", "file", "rw"); answer != "ok" {
			return nil, nil, fmt.Errorf("open: %s", answer)
		}
	}
	return a, b, nil
}

// mmap is memory that two processes share by a file, and memory that they do not.
func mmap(t *try.T) error {
	a, b, err := pair(t, strings.Repeat(".", 10000))
	if err != nil {
		return err
	}
	mapped := a.Do("mmap", "12288", "shared") + ", " + b.Do("mmap", "12288", "shared")
	t.Say("shared", mapped)
	if mapped != "ok, ok" {
		return errors.Join(a.End(), b.End())
	}
	t.Say("write by one", a.Do("poke", "100", "memory"))
	t.Say("seen by the other", b.Do("peek", "100", "6"))
	t.Say("read by the other", b.Do("pread", "100", "6"))
	t.Say("read by name", try.Contents(t.Path("file")))
	t.Say("msync", a.Do("msync"))
	t.Say("write past the end", a.Do("poke", "10100", "beyond"))
	t.Say("size then", try.Size(t.Path("file")))
	t.Say("write", b.Do("write", "written"))
	t.Say("seen in memory", a.Do("peek", "0", "8")+", "+b.Do("peek", "0", "8"))
	t.Say("private", b.Do("mmap", "10000", "private"))
	t.Say("write to it", b.Do("poke", "0", "private"))
	t.Say("seen by itself", b.Do("peek", "0", "8"))
	t.Say("seen by the other", a.Do("peek", "0", "8")+", "+a.Do("pread", "0", "8"))
	t.Say("truncate", try.Result(os.Truncate(t.Path("file"), 4096)))
	t.Say("within", a.Do("peek", "100", "6"))
	t.Say("longer again", try.Result(os.Truncate(t.Path("file"), 8192))+", "+a.Do("peek", "5000", "4"))
	t.Say("one past the end", a.Do("peek", "8192", "1"))
	t.Say("end", try.Result(b.End()))
	t.Say("contents", try.Contents(t.Path("file")))
	t.Say("end of the other", try.Result(a.End()))
	fd, err := unix.Open(t.Path("file"), unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd) //nolint:errcheck // read-only
	_, err = unix.Mmap(fd, 0, 4096, unix.PROT_WRITE, unix.MAP_SHARED)
	t.Say("shared and writable of a read-only descriptor", try.Result(err))
	m, err := unix.Mmap(fd, 0, 4096, unix.PROT_READ|unix.PROT_EXEC, unix.MAP_PRIVATE)
	t.Say("executable", try.Result(err))
	if err == nil {
		return unix.Munmap(m)
	}
	return nil
}

func flock(t *try.T) error {
	a, b, err := pair(t, "")
	if err != nil {
		return err
	}
	t.Say("shared by both", a.Do("flock", "try-shared")+", "+b.Do("flock", "try-shared"))
	t.Say("upgrade", a.Do("flock", "try-exclusive"))
	t.Say("after that", b.Do("flock", "unlock")+", "+a.Do("flock", "try-exclusive"))
	t.Say("by the other", b.Do("flock", "try-exclusive")+", "+b.Do("flock", "try-shared"))
	b.Begin("flock", "exclusive")
	t.Say("the other waits", try.Yes(waits("FLOCK")))
	t.Say("unlock", a.Do("flock", "unlock"))
	t.Say("the other, which waited", b.Answer())
	t.Say("again", a.Do("flock", "try-shared"))
	a.Begin("flock", "shared")
	t.Say("waits for it", try.Yes(waits("FLOCK")))
	t.Say("end of the holder", try.Result(b.End()))
	t.Say("the one that waited", a.Answer())
	return a.End()
}

func posixLock(t *try.T) error {
	a, b, err := pair(t, "some text to lock")
	if err != nil {
		return err
	}
	ranges(t, a, b, "")
	t.Say("close of another descriptor", a.Do("lock", "try", "write", "0", "0")+", "+a.Do("open", "file", "rw")+", "+a.Do("close")+", "+
		b.Do("lock", "get", "write", "0", "0")+", "+a.Do("open", "file", "rw"))
	return endOfHolder(t, a, b, "")
}

func ofdLock(t *try.T) error {
	a, b, err := pair(t, "some text to lock")
	if err != nil {
		return err
	}
	ranges(t, a, b, "ofd-")
	return endOfHolder(t, a, b, "ofd-")
}

// ranges locks parts of a file.
func ranges(t *try.T, a, b *try.Peer, kind string) {
	t.Say("write 0+10", a.Do("lock", kind+"try", "write", "0", "10"))
	t.Say("what the other gets", b.Do("lock", kind+"get", "read", "5", "10"))
	t.Say("overlap by the other", b.Do("lock", kind+"try", "write", "9", "5")+", "+b.Do("lock", kind+"try", "read", "9", "1"))
	t.Say("beside it", b.Do("lock", kind+"try", "write", "10", "0"))
	t.Say("downgrade of a part", a.Do("lock", kind+"try", "read", "2", "3")+", "+b.Do("lock", kind+"try", "read", "2", "3")+", "+b.Do("lock", kind+"try", "read", "1", "2"))
	t.Say("past the end", a.Do("lock", kind+"get", "write", "100000", "1"))
	b.Begin("lock", kind+"wait", "write", "0", "10")
	t.Say("the other waits", try.Yes(waits(listed[kind])))
	t.Say("unlock", a.Do("lock", kind+"try", "unlock", "0", "0"))
	t.Say("the other, which waited", b.Answer())
	t.Say("what is held", a.Do("lock", kind+"get", "write", "0", "1"))
	t.Say("unlock by the other", b.Do("lock", kind+"try", "unlock", "0", "0"))
	t.Say("what is held then", a.Do("lock", kind+"get", "write", "0", "0"))
}

// endOfHolder is that a lock goes with the process that holds it.
func endOfHolder(t *try.T, a, b *try.Peer, kind string) error {
	t.Say("held", b.Do("lock", kind+"try", "write", "0", "0"))
	a.Begin("lock", kind+"wait", "write", "0", "0")
	t.Say("waits for it", try.Yes(waits(listed[kind])))
	t.Say("end of the holder", try.Result(b.End()))
	t.Say("the one that waited", a.Answer())
	return a.End()
}

// listed is how /proc/locks calls a kind of lock.
var listed = map[string]string{"": "POSIX", "ofd-": "OFDLCK"}

// waits tells whether a process waits for a lock of a kind, once it does. It looks
// again and again: the kernel tells nobody.
func waits(kind string) bool {
	for deadline := time.Now().Add(30 * time.Second); time.Now().Before(deadline); time.Sleep(time.Millisecond) {
		locks, err := os.ReadFile("/proc/locks")
		if err != nil {
			return false
		}
		for line := range strings.Lines(string(locks)) {
			if f := strings.Fields(line); len(f) > 2 && f[1] == "->" && f[2] == kind {
				return true
			}
		}
	}
	return false
}

func lease(t *try.T) error {
	path, err := t.File("file", "text")
	if err != nil {
		return err
	}
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = unix.FcntlInt(f.Fd(), unix.F_SETLEASE, unix.F_RDLCK)
	t.Say("read", try.Result(err))
	got, err := unix.FcntlInt(f.Fd(), unix.F_GETLEASE, 0)
	t.Say("get", try.Result(err)+", "+fmt.Sprint(got))
	return nil
}

func fifo(t *try.T) error {
	path := t.Path("fifo")
	t.Say("make", try.Result(unix.Mkfifo(path, 0o640))+", "+try.Mode(path))
	p, err := t.Peer(nil)
	if err != nil {
		return err
	}
	t.Say("writer without a reader", p.Do("open", "fifo", "w-nonblock"))
	p.Begin("open", "fifo", "w")
	f, err := os.Open(path) // waits for the writer
	if err != nil {
		return err
	}
	defer f.Close()
	t.Say("writer with a reader", p.Answer())
	t.Say("write", p.Do("write", "through"))
	buf := make([]byte, 100)
	n, err := f.Read(buf)
	t.Say("read", try.Text(buf[:n])+", "+try.Result(err))
	if err := p.End(); err != nil {
		return err
	}
	n, err = f.Read(buf)
	t.Say("after the writer's end", fmt.Sprint(n, " ", err))
	return nil
}

func socket(t *try.T) error {
	// A name that fits a socket's address, however long the directory's is.
	if err := os.Chdir(t.Dir); err != nil {
		return err
	}
	defer os.Chdir("/") //nolint:errcheck // all other names are absolute
	listen := func() (int, error) {
		fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return -1, err
		}
		if err := unix.Bind(fd, &unix.SockaddrUnix{Name: "socket"}); err != nil {
			unix.Close(fd) //nolint:errcheck // unused
			return -1, err
		}
		return fd, unix.Listen(fd, 5)
	}
	fd, err := listen()
	t.Say("bind", try.Result(err)+", "+try.Mode("socket"))
	if err != nil {
		return nil
	}
	_, err = listen()
	t.Say("bind again", try.Result(err))
	t.Say("open", try.Contents("socket"))
	p, err := t.Peer(nil)
	if err != nil {
		return err
	}
	t.Say("connect", p.Do("connect", "socket"))
	conn, _, err := unix.Accept(fd)
	t.Say("accept", try.Result(err))
	if err == nil {
		t.Say("write", p.Do("write", "through"))
		buf := make([]byte, 100)
		n, err := unix.Read(conn, buf)
		t.Say("read", try.Text(buf[:max(n, 0)])+", "+try.Result(err))
		unix.Close(conn) //nolint:errcheck // a socket
	}
	t.Say("rename", try.Result(os.Rename("socket", "renamed")))
	t.Say("connect by the new name", p.Do("connect", "renamed"))
	t.Say("close", try.Result(unix.Close(fd)))
	t.Say("connect to what nobody serves", p.Do("connect", "renamed"))
	t.Say("unlink", try.Result(os.Remove("renamed")))
	return p.End()
}
