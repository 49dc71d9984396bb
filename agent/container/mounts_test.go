package container

import (
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// mountPoints lists the mounts of this process at and below dir.
func mountPoints(t *testing.T, dir string) []string {
	t.Helper()
	table, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	var points []string
	for line := range strings.Lines(string(table)) {
		if p := strings.Fields(line)[4]; p == dir || strings.HasPrefix(p, dir+"/") {
			points = append(points, strings.TrimPrefix(p, dir))
		}
	}
	slices.Sort(points)
	return points
}

// copyTree copies a directory of regular files, links and directories.
func copyTree(t *testing.T, to, from string) {
	t.Helper()
	if err := os.CopyFS(to, os.DirFS(from)); err != nil {
		t.Fatal(err)
	}
}

// testPropagation has containers mount something while what they are made of is on
// shared mounts, as the share of a guest is. With rshared, and only then, what is
// mounted below a bind of theirs comes to be in the guest too, and nothing else of
// theirs. With rslave what is mounted in the guest comes to them.
func testPropagation(t *testing.T, c *inside) {
	share := t.TempDir()
	if err := unix.Mount("share", share, "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	defer unix.Unmount(share, unix.MNT_DETACH) //nolint:errcheck // the namespace ends
	if err := unix.Mount("", share, "", unix.MS_SHARED, ""); err != nil {
		t.Fatal(err)
	}
	vol := filepath.Join(share, "vol")
	for _, dir := range []string{vol, vol + "/inner", vol + "/outer", share + "/own"} {
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		if dir == vol { // a submount
			if err := unix.Mount("vol", vol, "tmpfs", 0, ""); err != nil {
				t.Fatal(err)
			}
		}
	}
	copyTree(t, share+"/plain", c.rootfs)
	if err := unix.Mount(c.rootfs, share+"/own", "", unix.MS_BIND, ""); err != nil {
		t.Fatal(err)
	}
	for _, root := range []string{"plain", "own"} {
		for _, propagation := range []string{"", "rprivate", "rslave", "rshared"} {
			t.Run(root+" "+propagation, func(t *testing.T) {
				before := mountPoints(t, share)
				spec := c.spec("p", false, "sh", "-c", "busybox mount -t tmpfs none /vol/inner && busybox mkdir -p /t && busybox mount -t tmpfs none /t && echo up; read x; busybox grep -c ' /vol/outer ' /proc/self/mountinfo; read x")
				spec.Root.Path = filepath.Join(share, root)
				spec.Process.Capabilities = &specs.LinuxCapabilities{}
				for _, set := range []*[]string{&spec.Process.Capabilities.Bounding, &spec.Process.Capabilities.Effective, &spec.Process.Capabilities.Permitted} {
					*set = []string{"CAP_SYS_ADMIN"}
				}
				options := []string{"rbind"}
				if propagation != "" {
					options = append(options, propagation)
					spec.Linux.RootfsPropagation = propagation
				}
				spec.Mounts = append(spec.Mounts, specs.Mount{Destination: "/vol", Type: "bind", Source: vol, Options: options})
				in, out := pipe(t), pipe(t)
				p, err := c.Create(t.Context(), "p", spec, nil, Stdio{Stdin: in.r, Stdout: out.w})
				if err != nil {
					t.Fatal(err)
				}
				defer c.delete(t, "p")
				if err := c.Start(t.Context(), "p"); err != nil {
					t.Fatal(err)
				}
				out.w.Close()
				out.expect(t, "up\n")
				want := slices.Clone(before)
				if propagation == "rshared" {
					want = append(want, "/vol/inner")
					slices.Sort(want)
				}
				if got := mountPoints(t, share); !slices.Equal(got, want) {
					t.Errorf("the guest has the mounts %q, want %q", got, want)
				}
				if err := unix.Mount("none", vol+"/outer", "tmpfs", 0, ""); err != nil {
					t.Fatal(err)
				}
				in.say(t)
				seen := "0\n"
				if propagation == "rslave" || propagation == "rshared" {
					seen = "1\n"
				}
				out.expect(t, seen)
				if err := unix.Unmount(vol+"/outer", unix.MNT_DETACH); err != nil {
					t.Error(err)
				}
				in.say(t)
				exitOf(t, p)
				if propagation == "rshared" {
					unix.Unmount(vol+"/inner", unix.MNT_DETACH) //nolint:errcheck // it may have gone with its container
				}
			})
		}
	}
}

type pipeEnds struct{ r, w *os.File }

func pipe(t *testing.T) pipeEnds {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close(); w.Close() })
	return pipeEnds{r, w}
}

// expect reads exactly text.
func (p pipeEnds) expect(t *testing.T, text string) {
	t.Helper()
	b := make([]byte, len(text))
	if n, err := io.ReadFull(p.r, b); string(b[:n]) != text {
		t.Fatalf("it says %q (%v), want %q", b[:n], err, text)
	}
}

// say lets a script's read go on.
func (p pipeEnds) say(t *testing.T) {
	t.Helper()
	if _, err := p.w.WriteString("\n"); err != nil {
		t.Fatal(err)
	}
}
