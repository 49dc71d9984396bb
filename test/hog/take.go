package main

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"time"

	"golang.org/x/sys/unix"
)

func burn(where string) error {
	var work func()
	switch where {
	case "user":
		work = func() {
			for i := 0; i < 1<<24; i++ { // long enough that asking for the time is nothing
				Sink += i
			}
		}
	case "system":
		zero, err := os.Open("/dev/zero")
		if err != nil {
			return err
		}
		buf := make([]byte, 1<<20)
		work = func() {
			for range 16 {
				zero.Read(buf) // it never fails
			}
		}
	default:
		return fmt.Errorf("%q is neither user nor system", where)
	}
	fmt.Println("ready")
	for {
		work()
	}
}

// Sink keeps the compiler from leaving the work out.
var Sink int

// step is what memory is taken in.
const step = 1 << 20

func memory(mib int) error {
	for taken := 0; mib == 0 || taken < mib; taken++ {
		block, err := unix.Mmap(-1, 0, step, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
		if err != nil {
			fmt.Printf("refused after %d MiB: %v\n", taken, err)
			break
		}
		for i := 0; i < step; i += os.Getpagesize() {
			block[i] = 1
		}
	}
	fmt.Println("ready")
	return forever()
}

// forever is until a signal ends the process.
func forever() error {
	for {
		if err := unix.Pause(); err != nil && !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

// cache touches each page of a file once: more makes the kernel keep it as it does what is
// worked with.
func cache(name string, mib int) error {
	f, err := os.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	block := bytes.Repeat([]byte{1}, step)
	for range mib {
		if _, err := f.Write(block); err != nil {
			return err
		}
	}
	fmt.Println("ready")
	return forever()
}

func disk(dir string) error {
	block := bytes.Repeat([]byte{1}, step)
	for round := 0; ; round++ {
		name := filepath.Join(dir, "hog")
		f, err := os.Create(name)
		if err != nil {
			return err
		}
		written := 0
		for err == nil {
			var n int
			n, err = f.Write(block)
			written += n
		}
		if round == 0 {
			fmt.Printf("ready: full after %d MiB: %v\n", written/step, err)
		}
		if err := errors.Join(f.Close(), os.Remove(name)); err != nil {
			return err
		}
	}
}

// fds opens as many files and sockets as the process, or the kernel, may have.
func fds(dir string) error {
	limit := unix.Rlimit{}
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		return err
	}
	limit.Cur = limit.Max
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		return err
	}
	for told := false; ; told = true {
		var opened []int
		var err error
		for err == nil {
			var fd int
			if len(opened)%2 == 0 {
				fd, err = unix.Open(dir, unix.O_RDONLY|unix.O_CLOEXEC, 0)
			} else {
				fd, err = unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
			}
			if err == nil {
				opened = append(opened, fd)
			}
		}
		if !told {
			fmt.Printf("ready: %d files: %v\n", len(opened), err)
		}
		time.Sleep(time.Second)
		for _, fd := range opened {
			unix.Close(fd)
		}
	}
}

func fork() error {
	fmt.Println("ready")
	runtime.LockOSThread()
	for {
		// A child has this thread alone, without Go's runtime behind it: it may do no
		// more than this very loop.
		unix.RawSyscall(unix.SYS_FORK, 0, 0, 0)
	}
}

func flood() error {
	line := append(bytes.Repeat([]byte("flood "), 20), '\n')
	block := bytes.Repeat(line, 500)
	for {
		if _, err := os.Stdout.Write(block); err != nil {
			return err
		}
	}
}

func threads(n int) error {
	for range n {
		go func() { // ends with the process
			runtime.LockOSThread()
			forever()
		}()
	}
	fmt.Println("ready")
	return forever()
}
