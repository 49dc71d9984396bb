package sockets

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"strings"

	"golang.org/x/sys/unix"
)

const (
	// maxDepth is how deep below its directory a Watcher looks, maxLooked at how many
	// directories, and maxDirs how many of them it follows.
	maxDepth  = 3
	maxLooked = 1000
	maxDirs   = 128
	// atOnce is how many entries of a directory are read at a time.
	atOnce = 512
)

// find returns the directories below the root to be followed: first those that hold
// a socket or lead to one, then the others that are in the root itself.
func (w *Watcher) find() []string {
	todo := []string{"."}
	holding := map[string]bool{}
	for n := 0; n < len(todo); n++ {
		dir := todo[n]
		w.list(dir, func(e fs.DirEntry) {
			switch {
			case e.Type()&fs.ModeSocket != 0:
				for d := dir; d != "." && !holding[d]; d = path.Dir(d) {
					holding[d] = true
				}
			case e.IsDir() && depth(dir) < maxDepth && len(todo) <= maxLooked:
				todo = append(todo, path.Join(dir, e.Name()))
			}
		})
	}
	var first, then []string
	for _, dir := range todo[1:] {
		switch {
		case holding[dir]:
			first = append(first, dir)
		case depth(dir) == 1:
			then = append(then, dir)
		}
	}
	return append(first, then...)
}

// depth is how far below the root a directory is.
func depth(dir string) int {
	if dir == "." {
		return 0
	}
	return strings.Count(dir, "/") + 1
}

// list calls each with what is in a directory, some of it at a time: there may be
// very much.
func (w *Watcher) list(dir string, each func(fs.DirEntry)) {
	f := w.open(dir, unix.O_RDONLY|unix.O_DIRECTORY)
	if f == nil {
		return
	}
	defer f.Close() //nolint:errcheck // nothing was written
	for {
		entries, err := f.ReadDir(atOnce)
		for _, e := range entries {
			each(e)
		}
		if err != nil {
			return // the end, or it is gone
		}
	}
}

// open opens a path below the root; nil where that does not lead anywhere, or through
// a symbolic link, which a container may put there at any time.
func (w *Watcher) open(name string, flags uint64) *os.File {
	fd, err := unix.Openat2(int(w.root.Fd()), name, &unix.OpenHow{
		Flags: flags | unix.O_CLOEXEC | unix.O_NOFOLLOW, Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS,
	})
	if err != nil {
		return nil
	}
	return os.NewFile(uintptr(fd), proc(fd)) // ReadDir may have to look at an entry by this name
}

// kind tells whether there is a socket, and a process bound to it.
func (w *Watcher) kind(name string) (isSocket, isBound bool) {
	var st unix.Stat_t
	if !strings.Contains(name, "/") { // most files are done with here
		err := unix.Fstatat(int(w.root.Fd()), name, &st, unix.AT_SYMLINK_NOFOLLOW)
		if err != nil || st.Mode&unix.S_IFMT != unix.S_IFSOCK {
			return false, false
		}
	}
	f := w.open(name, unix.O_PATH)
	if f == nil {
		return false, false
	}
	defer f.Close() //nolint:errcheck // nothing was written
	if err := unix.Fstat(int(f.Fd()), &st); err != nil || st.Mode&unix.S_IFMT != unix.S_IFSOCK {
		return false, false
	}
	return true, w.bound(f)
}

// bound tells whether a process of the host, in whatever network namespace, is bound
// to a socket: a file that a guest has made leads to none. To find out does nothing
// to a server. One of streams refuses a datagram socket for its type, and one of
// datagrams does not hear of who connects.
func bound(f *os.File) bool {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return true // who connects will see
	}
	defer unix.Close(fd) //nolint:errcheck // nothing was sent
	err = unix.Connect(fd, &unix.SockaddrUnix{Name: proc(int(f.Fd()))})
	return !errors.Is(err, unix.ECONNREFUSED)
}

// proc leads to what a descriptor is of.
func proc(fd int) string { return fmt.Sprintf("/proc/self/fd/%d", fd) }
