package listen

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"runtime"
	"sync/atomic"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// A table is the BPF programs on a cgroup, the map of sockets that they keep, and
// the ring buffer by which they tell of changes. What they write there says
// nothing; that they wrote is the message.
type table struct {
	sockets int
	links   []int    // what holds the programs in place
	ring    *os.File // in the runtime's poller
	ringFD  int      // of ring, which owns it
	raw     syscall.RawConn
	// consumer and producer are the pages with the ring's positions.
	consumer, producer []byte

	keys   []uint64 // for read
	values []socket
}

func openTable(cgroup string) (_ *table, err error) {
	t := &table{sockets: -1, keys: make([]uint64, maxSockets), values: make([]socket, maxSockets)}
	defer func() {
		if err != nil {
			t.close()
		}
	}()
	dir, err := unix.Open(cgroup, unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: cgroup, Err: err}
	}
	defer unix.Close(dir)
	if t.sockets, err = createMap(unix.BPF_MAP_TYPE_HASH, 8, uint32(unsafe.Sizeof(socket{})), maxSockets); err != nil {
		return nil, fmt.Errorf("create map of sockets: %w", err)
	}
	if err := t.openRing(); err != nil {
		return nil, err
	}
	for _, p := range programs(t.sockets, t.ringFD) {
		link, err := p.link(dir)
		if err != nil {
			return nil, fmt.Errorf("attach program of type %d to %s: %w", p.kind, cgroup, err)
		}
		t.links = append(t.links, link)
	}
	return t, nil
}

func (t *table) openRing() error {
	page := os.Getpagesize()
	fd, err := createMap(unix.BPF_MAP_TYPE_RINGBUF, 0, 0, uint32(page))
	if err != nil {
		return fmt.Errorf("create ring buffer: %w", err)
	}
	if err := unix.SetNonblock(fd, true); err != nil { // so that the poller takes it
		unix.Close(fd)
		return err
	}
	t.ringFD = fd
	t.ring = os.NewFile(uintptr(fd), "ring buffer")
	if t.raw, err = t.ring.SyscallConn(); err != nil {
		return err
	}
	if t.consumer, err = unix.Mmap(fd, 0, page, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED); err != nil {
		return fmt.Errorf("map ring buffer: %w", err)
	}
	if t.producer, err = unix.Mmap(fd, int64(page), page, unix.PROT_READ, unix.MAP_SHARED); err != nil {
		return fmt.Errorf("map ring buffer: %w", err)
	}
	return nil
}

// wait returns when sockets have come or gone since it was last called.
func (t *table) wait() error {
	consumer := (*uint64)(unsafe.Pointer(&t.consumer[0]))
	producer := (*uint64)(unsafe.Pointer(&t.producer[0]))
	return t.raw.Read(func(uintptr) bool {
		position := atomic.LoadUint64(producer)
		return atomic.SwapUint64(consumer, position) != position
	})
}

// interrupt ends wait, now and later.
func (t *table) interrupt() { t.ring.SetReadDeadline(time.Unix(1, 0)) } //nolint:errcheck // it is in the poller

// read returns the sockets, valid until the next call.
func (t *table) read() ([]socket, error) {
	var pin runtime.Pinner
	defer pin.Unpin()
	var next uint64 // opaque, a position in the map
	attr := struct {
		in, out, keys, values uint64
		count, fd             uint32
		elementFlags, flags   uint64
	}{
		out: address(&pin, &next), keys: address(&pin, &t.keys[0]), values: address(&pin, &t.values[0]),
		count: maxSockets, fd: uint32(t.sockets),
	}
	// ENOENT: there is no more.
	if _, err := bpf(unix.BPF_MAP_LOOKUP_BATCH, unsafe.Pointer(&attr), unsafe.Sizeof(attr)); err != nil && !errors.Is(err, unix.ENOENT) {
		return nil, fmt.Errorf("read map of sockets: %w", err)
	}
	return t.values[:attr.count], nil
}

// close takes everything back; it is called once.
func (t *table) close() {
	for _, fd := range t.links {
		unix.Close(fd)
	}
	if t.consumer != nil {
		unix.Munmap(t.consumer) //nolint:errcheck // it is mapped
	}
	if t.producer != nil {
		unix.Munmap(t.producer) //nolint:errcheck // it is mapped
	}
	if t.ring != nil {
		t.ring.Close()
	}
	if t.sockets >= 0 {
		unix.Close(t.sockets)
	}
}

func createMap(kind, keySize, valueSize, entries uint32) (int, error) {
	attr := struct{ kind, keySize, valueSize, entries, flags uint32 }{kind, keySize, valueSize, entries, 0}
	return bpf(unix.BPF_MAP_CREATE, unsafe.Pointer(&attr), unsafe.Sizeof(attr))
}

// link loads p and attaches it to a cgroup for as long as the descriptor is open
// that it returns.
func (p program) link(cgroup int) (int, error) {
	var pin runtime.Pinner
	defer pin.Unpin()
	license := []byte("Apache-2.0\x00")
	log := make([]byte, 16<<10)
	load := struct {
		kind, count         uint32
		code, license       uint64
		logLevel, logSize   uint32
		log                 uint64
		kernVersion, flags  uint32
		name                [16]byte
		ifindex, attachType uint32
	}{
		kind: p.kind, count: uint32(len(p.code)), code: address(&pin, &p.code[0]), license: address(&pin, &license[0]),
		logLevel: 1, logSize: uint32(len(log)), log: address(&pin, &log[0]),
		name: [16]byte{'h', 'u', 's', 'k', '_', 'l', 'i', 's', 't', 'e', 'n'}, attachType: p.attach,
	}
	fd, err := bpf(unix.BPF_PROG_LOAD, unsafe.Pointer(&load), unsafe.Sizeof(load))
	if err != nil {
		said, _, _ := bytes.Cut(log, []byte{0})
		return -1, fmt.Errorf("load: %w: %s", err, bytes.TrimSpace(said))
	}
	defer unix.Close(fd) // the link holds it
	attr := struct{ program, target, attachType, flags uint32 }{uint32(fd), uint32(cgroup), p.attach, 0}
	return bpf(unix.BPF_LINK_CREATE, unsafe.Pointer(&attr), unsafe.Sizeof(attr))
}

// address returns that of v, which does not move until pin is undone.
func address[T any](pin *runtime.Pinner, v *T) uint64 {
	pin.Pin(v)
	return uint64(uintptr(unsafe.Pointer(v)))
}

// bpf calls bpf(2). Descriptors that it returns are close-on-exec.
func bpf(command uintptr, attr unsafe.Pointer, size uintptr) (int, error) {
	n, _, errno := unix.Syscall(unix.SYS_BPF, command, uintptr(attr), size)
	if errno != 0 {
		return -1, os.NewSyscallError("bpf", errno)
	}
	return int(n), nil
}
