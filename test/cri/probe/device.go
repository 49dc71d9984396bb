package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// fuseInit is the operation by which the kernel greets a file system.
const fuseInit = 26

// fuse mounts a file system whose server is this process, and wants to be greeted.
func fuse(device, dir string) (err error) {
	fd, err := unix.Open(device, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open %s: %w", device, err)
	}
	defer unix.Close(fd)
	options := fmt.Sprintf("fd=%d,rootmode=40000,user_id=0,group_id=0", fd)
	if err := unix.Mount("probe", dir, "fuse", unix.MS_NOSUID|unix.MS_NODEV, options); err != nil {
		return fmt.Errorf("mount: %w", err)
	}
	defer func() { err = errors.Join(err, unix.Unmount(dir, unix.MNT_DETACH)) }()
	request := make([]byte, 64<<10)
	n, err := unix.Read(fd, request)
	if err != nil || n < 8 {
		return fmt.Errorf("read request: %d bytes, %w", n, err)
	}
	// length and operation, in the machine's order
	if op := binary.NativeEndian.Uint32(request[4:]); op != fuseInit {
		return fmt.Errorf("first request is %d", op)
	}
	fmt.Println("greeted")
	return nil
}

func huge(name string, size int) error {
	f, err := os.OpenFile(name, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := f.Truncate(int64(size)); err != nil {
		return err
	}
	memory, err := unix.Mmap(int(f.Fd()), 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return fmt.Errorf("map %d bytes of %s: %w", size, name, err)
	}
	for i := 0; i < size; i += os.Getpagesize() {
		memory[i] = 1
	}
	fmt.Println("filled")
	return nil
}
