package initrd

import (
	"bufio"
	"fmt"
)

// The newc format, as the kernel's Documentation/driver-api/early-userspace/buffer-format.rst
// has it. Each entry is
//
//	header | name, NUL | padding to 4 | data | padding to 4
//
// and the header is the magic and thirteen fields of eight hexadecimal digits:
//
//	magic ino mode uid gid nlink mtime filesize maj min rmaj rmin namesize chksum
//
// An entry with the name TRAILER!!! ends the archive.
const (
	headerFormat = "070701" + "%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X"
	alignment    = 4
	trailerName  = "TRAILER!!!"
)

// A writer writes entries one after the other. bufio.Writer keeps the first
// error, which its Flush reports: nothing here needs to look.
type writer struct {
	w   *bufio.Writer
	ino uint32 // of the last entry: numbered from 1, in archive order
	pos int64
}

func (w *writer) entry(e Entry) {
	w.ino++
	w.record(w.ino, e)
}

func (w *writer) trailer() {
	w.record(0, Entry{path: trailerName, links: 1})
}

func (w *writer) record(ino uint32, e Entry) {
	const uid, gid, mtime, devMajor, devMinor, checksum = 0, 0, 0, 0, 0, 0
	w.write(fmt.Appendf(nil, headerFormat, ino, e.mode, uid, gid, e.links, mtime, len(e.data),
		devMajor, devMinor, e.major, e.minor, len(e.path)+1, checksum))
	w.write([]byte(e.path + "\x00"))
	w.align()
	w.write(e.data)
	w.align()
}

func (w *writer) align() {
	if rest := w.pos % alignment; rest != 0 {
		w.write(make([]byte, alignment-rest))
	}
}

func (w *writer) write(p []byte) {
	n, _ := w.w.Write(p)
	w.pos += int64(n)
}
