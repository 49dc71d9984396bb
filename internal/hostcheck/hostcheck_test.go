package hostcheck

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// bzImage makes a kernel whose header says setup sectors and 16-byte units.
func bzImage(setup byte, units uint32) []byte {
	sectors := int(setup)
	if sectors == 0 {
		sectors = defaultSetupSects
	}
	b := make([]byte, (sectors+1)*512+int(units)*16)
	b[offSetupSects] = setup
	binary.LittleEndian.PutUint32(b[offSysSize:], units)
	binary.LittleEndian.PutUint16(b[offBootFlag:], 0xAA55)
	copy(b[offMagic:], "HdrS")
	return b
}

// vmlinux makes an ELF file with one segment of 64 bytes to load.
func vmlinux(machine uint16) []byte {
	b := make([]byte, 64+56+64)
	copy(b, "\x7fELF\x02\x01\x01")
	le := binary.LittleEndian
	le.PutUint16(b[16:], 2) // executable
	le.PutUint16(b[18:], machine)
	le.PutUint32(b[20:], 1)
	le.PutUint64(b[32:], 64) // program headers
	le.PutUint16(b[52:], 64)
	le.PutUint16(b[54:], 56)
	le.PutUint16(b[56:], 1)
	le.PutUint16(b[58:], 64)
	le.PutUint32(b[64:], 1)      // PT_LOAD
	le.PutUint64(b[64+8:], 120)  // offset
	le.PutUint64(b[64+32:], 64)  // size in the file
	le.PutUint64(b[64+40:], 128) // size in memory
	return b
}

func newc(entries ...string) []byte {
	var b bytes.Buffer
	for i := 0; i < len(entries); i += 2 {
		name, data := entries[i]+"\x00", entries[i+1]
		fields := [13]uint32{6: uint32(len(data)), 11: uint32(len(name))}
		b.WriteString(newcMagic)
		for _, f := range fields {
			b.WriteString(hex8(f))
		}
		for _, part := range []string{name, data} {
			b.WriteString(part)
			for b.Len()%4 != 0 {
				b.WriteByte(0)
			}
		}
	}
	return b.Bytes()
}

func hex8(n uint32) string {
	const digits = "0123456789ABCDEF"
	var s [8]byte
	for i := range s {
		s[7-i] = digits[n>>(4*i)&15]
	}
	return string(s[:])
}

type fileTest struct {
	name    string
	content []byte
	want    string // part of the error, empty where the file is good
}

func testFiles(t *testing.T, check func(string) error, remedy string, tests []fileTest) {
	t.Helper()
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "image")
			if err := os.WriteFile(path, tt.content, 0o644); err != nil {
				t.Fatal(err)
			}
			wantError(t, check(path), tt.want, path, remedy)
		})
	}
	t.Run("missing", func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "none")
		err := check(path)
		wantError(t, err, "no such file", path, remedy)
		if !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%v is no fs.ErrNotExist", err)
		}
	})
	t.Run("directory", func(t *testing.T) {
		path := t.TempDir()
		wantError(t, check(path), "is a directory", path, remedy)
	})
	t.Run("fifo", func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "fifo")
		if err := unix.Mkfifo(path, 0o600); err != nil {
			t.Fatal(err)
		}
		wantError(t, check(path), "is not a regular file", path, remedy)
	})
	t.Run("unreadable", func(t *testing.T) {
		if os.Geteuid() == 0 {
			t.Skip("root reads every file")
		}
		path := filepath.Join(t.TempDir(), "secret")
		if err := os.WriteFile(path, []byte("x"), 0o000); err != nil {
			t.Fatal(err)
		}
		wantError(t, check(path), "permission denied", path, remedy)
	})
}

// wantError wants one line that holds all parts, or nil where the first is empty.
func wantError(t *testing.T, err error, parts ...string) {
	t.Helper()
	if parts[0] == "" {
		if err != nil {
			t.Errorf("got %v, want no error", err)
		}
		return
	}
	if err == nil {
		t.Fatalf("got no error, want %q", parts[0])
	}
	if strings.Contains(err.Error(), "\n") {
		t.Errorf("%q is more than one line", err)
	}
	for _, p := range parts {
		if !strings.Contains(err.Error(), p) {
			t.Errorf("%q does not hold %q", err, p)
		}
	}
}

func TestCheckKernel(t *testing.T) {
	whole, signed := bzImage(2, 64), append(bzImage(3, 8), "signature"...)
	noFlag := bzImage(2, 64)
	noFlag[offBootFlag] = 0
	testFiles(t, CheckKernel, "guest.kernel", []fileTest{
		{"bzImage", whole, ""},
		{"bzImage with default set-up", bzImage(0, 1), ""},
		{"bzImage with a signature", signed, ""},
		{"one byte short", whole[:len(whole)-1], "is truncated: 2559 bytes where its header says 2560"},
		{"cut in the header", whole[:300], "truncated"},
		{"no boot flag", noFlag, "is no kernel"},
		{"empty", nil, "is empty"},
		{"text", bytes.Repeat([]byte("text"), 1000), "is no kernel"},
		{"vmlinux", vmlinux(62), ""},
		{"vmlinux cut in a segment", vmlinux(62)[:150], "is truncated"},
		{"vmlinux cut in the header", vmlinux(62)[:30], "is damaged or truncated"},
		{"vmlinux of arm64", vmlinux(183), "is for another machine"},
	})
}

func TestCheckInitrd(t *testing.T) {
	whole := newc("init", "an agent", "lib", "", "TRAILER!!!", "")
	padded := append(bytes.Clone(whole), make([]byte, 300)...)
	damaged := bytes.Clone(whole)
	damaged[align4(align4(newcHeaderSize+5)+8)] = 'x'
	testFiles(t, CheckInitrd, "guest.initrd", []fileTest{
		{"newc", whole, ""},
		{"newc padded to a block", padded, ""},
		{"name as long as the trailer's", newc("0123456789", "data", "TRAILER!!!", ""), ""},
		{"gzip", []byte("\x1f\x8b\x08rest"), ""},
		{"zstd", []byte("\x28\xb5\x2f\xfdrest"), ""},
		{"no trailer", newc("init", "an agent"), "is truncated"},
		{"cut in data", whole[:118], "is truncated"},
		{"cut in a header", whole[:50], "is truncated"},
		{"cut in the trailer", whole[:len(whole)-8], "is truncated"},
		{"damaged", damaged, "is damaged: no archive header at byte 124"},
		{"empty", nil, "is empty"},
		{"three bytes", []byte("070"), "is no initial RAM disk"},
		{"text", []byte("this is not an archive"), "is no initial RAM disk"},
	})
}

func TestKVMUsable(t *testing.T) {
	const intel, amd, none = "flags\t\t: fpu vmx sse\n", "processor\t: 0\nflags\t\t: fpu svm\n", "flags\t\t: fpu svm_lock vmxx\nbugs\t\t: vmx\n"
	dev := filepath.Join(t.TempDir(), "kvm")
	if err := os.WriteFile(dev, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	works := func(*os.File) error { return nil }
	busy := func(*os.File) error { return unix.EBUSY }
	for _, tt := range []struct {
		name, cpuinfo, dev string
		create             func(*os.File) error
		want               string
	}{
		{"intel", intel, dev, works, ""},
		{"amd", amd, dev, works, ""},
		{"software back end", none, dev, works, "is a software KVM back end"},
		{"no virtualisation", none, dev + "none", works, "neither vmx nor svm; switch"},
		{"no module", intel, dev + "none", works, "load the kernel module"},
		{"no VM", amd, dev, busy, "device or resource busy"},
		{"no flags", "", dev, works, "software KVM back end"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			wantError(t, kvmUsable([]byte(tt.cpuinfo), tt.dev, tt.create), tt.want, ";")
		})
	}
}

// program writes an executable script.
func program(t *testing.T, script string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "program")
	if err := os.WriteFile(path, []byte("#!/bin/sh\n"+script+"\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestQEMUVersion(t *testing.T) {
	for _, tt := range []struct{ name, script, version, want string }{
		{"7.2", "echo 'QEMU emulator version 7.2.22 (Debian 1:7.2)'; echo Copyright", "7.2.22", ""},
		{"10", "echo 'QEMU emulator version 10.0'", "10.0", ""},
		{"too old", "echo 'QEMU emulator version 7.1.0'", "", "version 7.1.0 is not supported"},
		{"older", "echo 'QEMU emulator version 5.2.0'", "", "version 5.2.0 is not supported"},
		{"another program", "echo 'GNU hello 1.0'", "", `is no QEMU, its version reads "GNU hello 1.0"`},
		{"silent", "true", "", "is no QEMU"},
		{"broken", "echo missing library >&2; exit 127", "", `exit status 127: "missing library"`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			path := program(t, tt.script)
			got, err := QEMUVersion(t.Context(), path)
			wantError(t, err, tt.want, path, "set hypervisor.path")
			if got != tt.version {
				t.Errorf("version %q, want %q", got, tt.version)
			}
		})
	}
	t.Run("missing", func(t *testing.T) {
		_, err := QEMUVersion(t.Context(), "/nonexistent/qemu")
		wantError(t, err, "no such file", "/nonexistent/qemu", "install qemu-system-x86")
	})
	t.Run("hangs", func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		_, err := QEMUVersion(ctx, program(t, "exec cat"))
		wantError(t, err, "context canceled")
	})
}

func TestCheckReadable(t *testing.T) {
	f, err := os.Create(filepath.Join(t.TempDir(), "kernel"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	own, ownGroup := uint32(os.Geteuid()), uint32(os.Getegid())
	const other = 1<<31 - 2
	for _, tt := range []struct {
		mode     os.FileMode
		uid, gid uint32
		want     string
	}{
		{0o644, other, other, ""},
		{0o600, other, other, "has mode 0600"},
		{0o640, other, other, "chmod a+r " + f.Name()},
		{0o640, other, ownGroup, ""},
		{0o604, other, ownGroup, "has mode 0604"},
		{0o400, own, other, ""},
		{0o044, own, ownGroup, "has mode 044"},
	} {
		if err := f.Chmod(tt.mode); err != nil {
			t.Fatal(err)
		}
		wantError(t, CheckReadable(f, tt.uid, tt.gid), tt.want)
	}
}

func TestLookupUser(t *testing.T) {
	for _, tt := range []struct {
		name, want string
		uid, gid   uint32
	}{
		{"nobody", "", 65534, 65534},
		{"65534", "", 65534, 65534},
		{"4294000001", "", 4294000001, 4294000001},
		{"root", "never runs as root", 0, 0},
		{"0", "never runs as root", 0, 0},
		{"no-such-account", "no such account", 0, 0},
		{"-1", "no such account", 0, 0},
		{"", "no such account", 0, 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			uid, gid, err := LookupUser(tt.name)
			wantError(t, err, tt.want, "hypervisor.user")
			if uid != tt.uid || gid != tt.gid {
				t.Errorf("got %d:%d, want %d:%d", uid, gid, tt.uid, tt.gid)
			}
		})
	}
}
