package main

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// tree prints a line for each entry, without the directory's own name. Sizes of
// directories and times are left out: they differ between file systems.
func tree(dir string) error {
	return filepath.WalkDir(dir, func(path string, entry fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		var st unix.Stat_t
		if err := unix.Lstat(path, &st); err != nil {
			return &fs.PathError{Op: "lstat", Path: path, Err: err}
		}
		name, _ := filepath.Rel(dir, path) // it is below
		what := ""
		switch st.Mode & unix.S_IFMT {
		case unix.S_IFLNK:
			target, err := os.Readlink(path)
			if err != nil {
				return err
			}
			what = "-> " + target
		case unix.S_IFREG:
			f, err := os.Open(path)
			if err != nil {
				return err
			}
			defer f.Close()
			sum := sha256.New()
			n, err := io.Copy(sum, f)
			if err != nil {
				return err
			}
			what = fmt.Sprintf("%d %x", n, sum.Sum(nil)[:8])
		}
		_, err = fmt.Printf("%s %o %d:%d %s\n", name, st.Mode, st.Uid, st.Gid, what)
		return err
	})
}

// A watcher has the events of directories.
type watcher struct {
	fd   int
	dirs map[int32]string // by watch descriptor
	rest []byte
}

func newWatcher(dirs ...string) (*watcher, error) {
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC)
	if err != nil {
		return nil, os.NewSyscallError("inotify_init1", err)
	}
	w := &watcher{fd: fd, dirs: map[int32]string{}}
	for _, dir := range dirs {
		wd, err := unix.InotifyAddWatch(fd, dir, unix.IN_CREATE|unix.IN_MOVED_TO|unix.IN_DELETE)
		if err != nil {
			return nil, fmt.Errorf("watch %s: %w", dir, err)
		}
		w.dirs[int32(wd)] = dir
	}
	return w, nil
}

// next waits for an event, and tells where it was and what name came or went.
func (w *watcher) next() (dir, name string, err error) {
	for len(w.rest) < unix.SizeofInotifyEvent {
		buf := make([]byte, 64<<10)
		n, err := unix.Read(w.fd, buf)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return "", "", os.NewSyscallError("read inotify", err)
		}
		w.rest = buf[:n]
	}
	e := (*unix.InotifyEvent)(unsafe.Pointer(&w.rest[0]))
	end := unix.SizeofInotifyEvent + int(e.Len)
	name = string(bytes.TrimRight(w.rest[unix.SizeofInotifyEvent:end], "\x00"))
	w.rest = w.rest[end:]
	return w.dirs[e.Wd], name, nil
}

// watch prints "DIR VALUE" each time that a volume's ..data is replaced, as those who
// reload their configuration do.
func watch(key string, dirs []string) error {
	w, err := newWatcher(dirs...)
	if err != nil {
		return err
	}
	fmt.Println("watching")
	for {
		dir, name, err := w.next()
		if err != nil {
			return err
		}
		if name != "..data" {
			continue
		}
		value, err := os.ReadFile(filepath.Join(dir, key))
		if errors.Is(err, fs.ErrNotExist) {
			continue // replaced again: another event is to come
		}
		if err != nil {
			return err
		}
		fmt.Println(dir, firstLine(value))
	}
}

func firstLine(data []byte) string {
	line, _, _ := strings.Cut(string(data), "\n")
	return line
}

// read reads all keys of one version again and again. Each value consists of lines
// that are all the same, and the same as the other keys'. It ends with SIGTERM.
func read(keys, dirs []string) error {
	end := make(chan os.Signal, 1)
	signal.Notify(end, syscall.SIGTERM)
	last := map[string]string{}
	rounds, versions := 0, 0
	for {
		for _, dir := range dirs {
			version, err := readVersion(dir, keys)
			if err != nil {
				fmt.Printf("wrong: %s: %v\n", dir, err)
			}
			if version != "" && version != last[dir] {
				last[dir] = version
				versions++
			}
		}
		if rounds++; rounds == 1 {
			fmt.Println("reading")
		}
		select {
		case <-end:
			for _, dir := range dirs {
				fmt.Println("last", dir, last[dir])
			}
			fmt.Println("versions", versions)
			return nil
		default:
		}
	}
}

// readVersion returns no version where it was replaced meanwhile.
func readVersion(dir string, keys []string) (string, error) {
	link := filepath.Join(dir, "..data")
	before, err := os.Readlink(link)
	if err != nil {
		return "", err
	}
	root, err := unix.Open(filepath.Join(dir, before), unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err == nil {
		defer unix.Close(root)
	}
	version := ""
	for _, key := range keys {
		var value string
		if err == nil {
			value, err = readKey(root, key)
		}
		if errors.Is(err, fs.ErrNotExist) {
			if after, linkErr := os.Readlink(link); linkErr != nil || after == before {
				return "", fmt.Errorf("key %s is missing from %s: %w", key, before, errors.Join(err, linkErr))
			}
			return "", nil
		}
		if err != nil {
			return "", err
		}
		if version == "" {
			version = value
		}
		if value != version {
			return "", fmt.Errorf("key %s is of version %s, another of %s", key, value, version)
		}
	}
	return version, nil
}

func readKey(root int, key string) (string, error) {
	fd, err := unix.Openat(root, key, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return "", err
	}
	f := os.NewFile(uintptr(fd), key)
	defer f.Close()
	data, err := io.ReadAll(f)
	if err != nil {
		return "", err
	}
	version := firstLine(data)
	if version == "" || len(data)%(len(version)+1) != 0 || strings.Repeat(version+"\n", len(data)/(len(version)+1)) != string(data) {
		return "", fmt.Errorf("key %s is %d bytes, not all of version %q", key, len(data), version)
	}
	return version, nil
}
