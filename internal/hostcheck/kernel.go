package hostcheck

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
)

// Offsets in the header of a bzImage: Documentation/arch/x86/boot.rst.
const (
	offSetupSects = 0x1f1 // uint8: 512-byte sectors after the first
	offSysSize    = 0x1f4 // uint32: the rest, in units of 16 bytes
	offBootFlag   = 0x1fe // uint16: 0xAA55
	offMagic      = 0x202 // "HdrS"
	headerSize    = 0x206

	defaultSetupSects = 4 // what 0 stands for
)

// CheckKernel returns nil where path is a whole x86-64 kernel as far as its
// header tells: a bzImage or an ELF vmlinux. It reads the header only.
func CheckKernel(path string) error {
	f, size, err := openImage(path)
	if err == nil {
		defer f.Close()
		err = checkKernel(f, size)
	}
	if err != nil {
		return fmt.Errorf("kernel %q: %w; install Husk again, or set guest.kernel to a bzImage or vmlinux", path, err)
	}
	return nil
}

func checkKernel(f *os.File, size int64) error {
	h := make([]byte, headerSize)
	n, err := f.ReadAt(h, 0)
	if err != nil && !errors.Is(err, io.EOF) {
		return cause(err)
	}
	if bytes.HasPrefix(h[:n], []byte(elf.ELFMAG)) {
		return checkVmlinux(f, size)
	}
	if n < headerSize {
		return fmt.Errorf("is no kernel, or truncated: %d bytes are less than a header", size)
	}
	if binary.LittleEndian.Uint16(h[offBootFlag:]) != 0xAA55 || string(h[offMagic:headerSize]) != "HdrS" {
		return errors.New("is no kernel: neither a bzImage nor an ELF vmlinux")
	}
	setup := int64(h[offSetupSects])
	if setup == 0 {
		setup = defaultSetupSects
	}
	want := (setup+1)*512 + int64(binary.LittleEndian.Uint32(h[offSysSize:]))*16
	if size < want {
		return fmt.Errorf("is truncated: %d bytes where its header says %d", size, want)
	}
	return nil
}

func checkVmlinux(f *os.File, size int64) error {
	e, err := elf.NewFile(f)
	if err != nil {
		return fmt.Errorf("is damaged or truncated: %w", err)
	}
	if e.Class != elf.ELFCLASS64 || e.Machine != elf.EM_X86_64 {
		return fmt.Errorf("is for another machine: %v %v", e.Class, e.Machine)
	}
	loads := 0
	for _, p := range e.Progs {
		if p.Type != elf.PT_LOAD {
			continue
		}
		loads++
		if p.Off > uint64(size) || p.Filesz > uint64(size)-p.Off {
			return fmt.Errorf("is truncated: %d bytes, and a segment of %d starts at %d", size, p.Filesz, p.Off)
		}
	}
	if loads == 0 {
		return errors.New("is no kernel: an ELF file without a segment to load")
	}
	return nil
}
