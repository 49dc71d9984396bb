package boot

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	agentv1 "github.com/husk-containers/husk/protocols/agent/v1"
)

func TestMakeDevice(t *testing.T) {
	null := agentv1.Device{Kind: 'c', Major: 1, Minor: 3}
	if name, err := deviceName(null); err != nil || name != "null" {
		t.Skipf("this machine's /sys has no devices: %q, %v", name, err)
	}
	var want, got unix.Stat_t
	if err := unix.Stat("/dev/null", &want); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "dev", "null")
	for _, mode := range []uint32{0, 0o100} { // made, and made again where somebody has changed it
		if mode != 0 {
			if err := os.Chmod(path, os.FileMode(mode)); err != nil {
				t.Fatal(err)
			}
		}
		if err := makeDevice(null, path); err != nil {
			if os.Geteuid() != 0 {
				t.Skip("making a device node needs root: ", err)
			}
			t.Fatal(err)
		}
		if err := unix.Stat(path, &got); err != nil {
			t.Fatal(err)
		}
		if got.Rdev != want.Rdev || got.Mode != want.Mode || got.Uid != want.Uid || got.Gid != want.Gid {
			t.Errorf("node %+v, want one as %+v", got, want)
		}
	}
	none := agentv1.Device{Kind: 'b', Major: 4000, Minor: 7}
	if err := (Machine{}).MakeDevice(none); !errdefs.IsNotFound(err) || !strings.Contains(err.Error(), "make device b 4000:7: the guest has no such device") {
		t.Errorf("a device that there is not: %v", err)
	}
}
