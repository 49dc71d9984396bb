package main

import (
	"bytes"
	"compress/gzip"
	"debug/elf"
	"encoding/binary"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/cavaliergopher/cpio"
	"github.com/google/go-cmp/cmp"
)

const release = "6.1.0-1-cloud-amd64"

// executable returns an ELF file of one segment.
func executable(t *testing.T, segment elf.ProgType) []byte {
	t.Helper()
	header := elf.Header64{
		Type: uint16(elf.ET_EXEC), Machine: uint16(elf.EM_X86_64), Version: uint32(elf.EV_CURRENT),
		Phoff: 64, Ehsize: 64, Phentsize: 56, Phnum: 1, Shentsize: 64,
	}
	copy(header.Ident[:], elf.ELFMAG)
	header.Ident[elf.EI_CLASS] = byte(elf.ELFCLASS64)
	header.Ident[elf.EI_DATA] = byte(elf.ELFDATA2LSB)
	header.Ident[elf.EI_VERSION] = byte(elf.EV_CURRENT)
	var b bytes.Buffer
	for _, part := range []any{header, elf.Prog64{Type: uint32(segment)}} {
		if err := binary.Write(&b, binary.LittleEndian, part); err != nil {
			t.Fatal(err)
		}
	}
	return b.Bytes()
}

// inputs makes a directory with static binaries agent and crun, a dynamic one, a
// text file, and the modules of a kernel.
func inputs(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	files := map[string][]byte{
		"agent":   executable(t, elf.PT_LOAD),
		"crun":    executable(t, elf.PT_LOAD),
		"dynamic": executable(t, elf.PT_INTERP),
		"text":    []byte("#!/bin/sh\n"),
		"modules/" + release + "/modules.builtin": []byte("kernel/virtio_console.ko\n"),
	}
	var index strings.Builder
	for _, m := range []string{
		"virtio.ko:", "virtio_pci.ko: virtio.ko", "vmw_vsock_virtio_transport.ko: virtio.ko", "virtiofs.ko: virtio.ko", "virtio_net.ko: virtio.ko", "virtio-rng.ko: virtio.ko", "virtio_balloon.ko: virtio.ko", "virtio_mem.ko: virtio.ko",
		"vxlan.ko: udp_tunnel.ko virtio_net.ko", "udp_tunnel.ko:", "tun.ko:", "wifi.ko:",
	} {
		file, _, _ := strings.Cut(m, ":")
		files["modules/"+release+"/"+file] = []byte("module " + file)
		fmt.Fprintln(&index, m)
	}
	files["modules/"+release+"/modules.dep"] = []byte(index.String())
	files["modules/"+release+"/modules.alias"] = []byte("# Aliases\nalias rtnl-link-vxlan vxlan\nalias char-major-10-200 tun\nalias devname:net/tun tun\nalias pci:* wifi\n")
	for name, content := range files {
		file := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file, content, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func TestRunLayout(t *testing.T) {
	var images [2][]byte
	for i := range images {
		dir := inputs(t)
		out := filepath.Join(dir, "initrd.img")
		if err := run(filepath.Join(dir, "agent"), filepath.Join(dir, "crun"), filepath.Join(dir, "modules"), "", out); err != nil {
			t.Fatal(err)
		}
		var err error
		if images[i], err = os.ReadFile(out); err != nil {
			t.Fatal(err)
		}
	}
	if !bytes.Equal(images[0], images[1]) {
		t.Error("the same inputs give different images")
	}

	var names []string
	contents := map[string]string{}
	for r := cpio.NewReader(bytes.NewReader(images[0])); ; {
		h, err := r.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		data, err := io.ReadAll(r)
		if err != nil {
			t.Fatal(err)
		}
		names = append(names, fmt.Sprintf("%06o %s", int(h.Mode), h.Name))
		contents[h.Name] = string(data)
	}
	want := []string{
		"040755 bin", "100755 bin/crun",
		"040755 dev", "020600 dev/console", "020666 dev/null",
		"100755 init",
		"040755 lib", "040755 lib/modules", "100644 lib/modules/load",
		"100644 lib/modules/virtio.ko", "100644 lib/modules/virtio_balloon.ko", "100644 lib/modules/virtio_mem.ko", "100644 lib/modules/virtio_net.ko", "100644 lib/modules/virtio_pci.ko", "100644 lib/modules/virtio_rng.ko",
		"100644 lib/modules/virtiofs.ko", "100644 lib/modules/vmw_vsock_virtio_transport.ko",
		"040755 modules", "100644 modules/index",
		"100644 modules/tun.ko.gz", "100644 modules/udp_tunnel.ko.gz", "100644 modules/vxlan.ko.gz",
		"040755 proc", "040755 run", "040755 sys", "041777 tmp",
	}
	if diff := cmp.Diff(want, names); diff != "" {
		t.Errorf("archive (-want +got):\n%s", diff)
	}
	wantLoad := `/lib/modules/virtio.ko
/lib/modules/virtio_pci.ko
/lib/modules/vmw_vsock_virtio_transport.ko
/lib/modules/virtiofs.ko
/lib/modules/virtio_net.ko
/lib/modules/virtio_rng.ko
/lib/modules/virtio_balloon.ko
/lib/modules/virtio_mem.ko
`
	if diff := cmp.Diff(wantLoad, contents["lib/modules/load"]); diff != "" {
		t.Errorf("load order (-want +got):\n%s", diff)
	}
	// What is loaded before is no need of what is loaded on demand.
	if diff := cmp.Diff("tun , char-major-10-200 devname:net/tun\nudp_tunnel , \nvxlan udp_tunnel, rtnl-link-vxlan\n", contents["modules/index"]); diff != "" {
		t.Errorf("index (-want +got):\n%s", diff)
	}
	z, err := gzip.NewReader(strings.NewReader(contents["modules/vxlan.ko.gz"]))
	if err != nil {
		t.Fatal(err)
	}
	if got, err := io.ReadAll(z); err != nil || string(got) != "module vxlan.ko" {
		t.Errorf("vxlan.ko = %q, %v", got, err)
	}
	if got, want := contents["lib/modules/virtio_rng.ko"], "module virtio-rng.ko"; got != want {
		t.Errorf("virtio_rng.ko = %q, want %q", got, want)
	}
}

func TestRunRejects(t *testing.T) {
	for _, tt := range []struct {
		name, agent, crun, release, want string
	}{
		{"no agent", "none", "crun", release, "read agent: open"},
		{"agent not executable", "text", "crun", release, "text is not an executable"},
		{"dynamic crun", "agent", "dynamic", release, "link it statically"},
		{"no such kernel", "agent", "crun", "6.2.0", "6.2.0/modules.dep: no such file"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir := inputs(t)
			out := filepath.Join(dir, "initrd.img")
			err := run(filepath.Join(dir, tt.agent), filepath.Join(dir, tt.crun), filepath.Join(dir, "modules"), tt.release, out)
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("run = %v, want an error with %q", err, tt.want)
			}
			if _, err := os.Stat(out); !os.IsNotExist(err) {
				t.Errorf("stat of the image = %v, want none", err)
			}
		})
	}
}
