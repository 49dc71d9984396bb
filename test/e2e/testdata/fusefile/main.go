// Command fusefile mounts, by /dev/fuse, a file system that is one file, reads that
// file as anybody would, and prints what it holds.
package main

import (
	"encoding/binary"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

const content = "from a FUSE file system\n"

// The kernel's struct fuse_in_header and the replies, of <linux/fuse.h>.
const (
	inHeader = 40

	opGetattr = 3
	opOpen    = 14
	opRead    = 15
	opInit    = 26
	opForget  = 2
)

func main() {
	if err := run(); err != nil {
		fmt.Println("fusefile:", err)
		os.Exit(1)
	}
}

func run() error {
	const file = "/tmp/file"
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		return err
	}
	dev, err := unix.Open("/dev/fuse", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open /dev/fuse: %w", err)
	}
	options := fmt.Sprintf("fd=%d,rootmode=100000,user_id=0,group_id=0", dev)
	if err := unix.Mount("fusefile", file, "fuse", 0, options); err != nil {
		return fmt.Errorf("mount: %w", err)
	}
	go serve(dev) // ends with the program
	// Not by package os: that polls the file inside of Go's scheduler, where, on one
	// CPU, the goroutine which would answer gets no turn.
	fd, err := unix.Open(file, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	data := make([]byte, 100)
	n, err := unix.Read(fd, data)
	if err != nil {
		return err
	}
	if err := unix.Close(fd); err != nil { // at the exit nobody would answer
		return err
	}
	fmt.Print(string(data[:n]))
	return unix.Unmount(file, unix.MNT_DETACH)
}

func serve(dev int) {
	buf := make([]byte, 1<<17)
	for {
		n, err := unix.Read(dev, buf)
		if err == unix.EINTR {
			continue
		}
		if err != nil || n < inHeader {
			return // it has been unmounted
		}
		opcode, unique := binary.LittleEndian.Uint32(buf[4:]), binary.LittleEndian.Uint64(buf[8:])
		if opcode == opForget {
			continue
		}
		var errno int32
		body := reply(opcode, buf[inHeader:n])
		if body == nil {
			errno = -int32(unix.ENOSYS)
		}
		answer := binary.LittleEndian.AppendUint32(nil, uint32(16+len(body)))
		answer = binary.LittleEndian.AppendUint32(answer, uint32(errno))
		answer = binary.LittleEndian.AppendUint64(answer, unique)
		if _, err := unix.Write(dev, append(answer, body...)); err != nil {
			return
		}
	}
}

// reply is the body of an answer; nil: such requests are not known.
func reply(opcode uint32, arguments []byte) []byte {
	le := binary.LittleEndian
	switch opcode {
	case opInit:
		out := make([]byte, 64) // struct fuse_init_out
		le.PutUint32(out, 7)
		le.PutUint32(out[4:], 31)
		le.PutUint32(out[20:], 1<<16) // max_write
		return out
	case opGetattr:
		out := make([]byte, 16+88)                   // struct fuse_attr_out
		le.PutUint64(out[16:], 1)                    // ino
		le.PutUint64(out[24:], uint64(len(content))) // size
		le.PutUint32(out[76:], unix.S_IFREG|0o444)   // mode
		le.PutUint32(out[80:], 1)                    // nlink
		return out
	case opOpen:
		return make([]byte, 16)
	case opRead:
		offset := min(le.Uint64(arguments[8:]), uint64(len(content)))
		return []byte(content[offset:])
	}
	return nil
}
