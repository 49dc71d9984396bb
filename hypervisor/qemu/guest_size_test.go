package qemu

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// obeySize carries out one line about the guest's size:
//
//	online N             take N vCPUs into use, once they are there, and all others out
//	memory LEAST MOST    wait until there is so much memory, in MiB, but for a tenth
//	touch N              use N MiB and free them; "ok MILLISECONDS"
//	copy FROM TO         by the share, through the page cache
//	spin                 use the CPU until the end
func obeySize(words []string) string {
	var numbers []int
	for _, w := range words[1:] {
		n, err := strconv.Atoi(w)
		if err != nil {
			break
		}
		numbers = append(numbers, n)
	}
	answer, err := "", fmt.Errorf("no such command: %q", words)
	switch {
	case words[0] == "online" && len(numbers) == 1:
		err = onUevent(func() (bool, error) { return online(numbers[0]) })
	case words[0] == "memory" && len(numbers) == 2:
		err = onUevent(func() (bool, error) {
			total, err := memTotal()
			return total >= numbers[0]*9/10-32 && total <= numbers[1], err
		})
	case words[0] == "touch" && len(numbers) == 1:
		start := time.Now()
		err = touch(numbers[0])
		answer = strconv.FormatInt(time.Since(start).Milliseconds(), 10)
	case words[0] == "copy" && len(words) == 3:
		err = copyShared(words[1], words[2])
	case words[0] == "spin":
		go func() {
			for i := 0; ; i++ {
				runtime.KeepAlive(i)
			}
		}()
		err = nil
	}
	if err != nil {
		return strings.ReplaceAll(err.Error(), "\n", "; ")
	}
	return "ok " + answer
}

// onUevent waits until there is what is wanted, looking when the kernel tells of a
// device.
func onUevent(there func() (bool, error)) error {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_KOBJECT_UEVENT)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: 1}); err != nil {
		return err
	}
	for {
		if ok, err := there(); ok || err != nil {
			return err
		}
		if _, err := unix.Read(fd, make([]byte, 8192)); err != nil && !errors.Is(err, unix.ENOBUFS) {
			return err
		}
	}
}

// online takes the first n vCPUs into use and others out of it, and tells whether
// there are so many.
func online(n int) (bool, error) {
	dirs, err := filepath.Glob("/sys/devices/system/cpu/cpu[0-9]*")
	if err != nil {
		return false, err
	}
	for _, dir := range dirs {
		number, err := strconv.Atoi(strings.TrimPrefix(filepath.Base(dir), "cpu"))
		if err != nil || number == 0 {
			continue
		}
		value := []byte("1")
		if number >= n {
			value = []byte("0")
		}
		if now, err := os.ReadFile(dir + "/online"); err == nil && bytes.Equal(bytes.TrimSpace(now), value) {
			continue
		}
		// It may be about to come or go.
		if err := os.WriteFile(dir+"/online", value, 0); err != nil && !errors.Is(err, os.ErrNotExist) {
			return false, err
		}
	}
	info, err := os.ReadFile("/proc/cpuinfo")
	return bytes.Count(info, []byte("processor\t:")) == n, err
}

// memTotal is how much memory the guest's kernel has, in MiB.
func memTotal() (int, error) {
	info, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		return 0, err
	}
	var kib int
	_, err = fmt.Sscanf(string(info), "MemTotal: %d kB", &kib)
	return kib >> 10, err
}

// touch writes to so many MiB of fresh memory and gives them back to the kernel.
func touch(mib int) error {
	b, err := unix.Mmap(-1, 0, mib<<20, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return err
	}
	for i := 0; i < len(b); i += os.Getpagesize() {
		b[i] = 1
	}
	return unix.Munmap(b)
}

// copyShared copies a file of the share.
func copyShared(from, to string) error {
	const dir = "/share"
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	if _, err := os.Stat(filepath.Join(dir, from)); err != nil {
		if err := unix.Mount("husk", dir, "virtiofs", 0, ""); err != nil {
			return fmt.Errorf("mount the share: %w", err)
		}
	}
	src, err := os.Open(filepath.Join(dir, from))
	if err != nil {
		return err
	}
	defer src.Close()
	dst, err := os.Create(filepath.Join(dir, to))
	if err != nil {
		return err
	}
	_, err = io.CopyBuffer(struct{ io.Writer }{dst}, struct{ io.Reader }{src}, make([]byte, 1<<20))
	return errors.Join(err, dst.Close())
}
