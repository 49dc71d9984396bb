package boot

import (
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func TestMountShm(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("mounting needs root")
	}
	runtime.LockOSThread() // for good: its mounts go with the thread
	if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
		t.Skip("no mount namespace can be made: ", err)
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		t.Fatal(err)
	}
	target := filepath.Join(t.TempDir(), "a", "shm")
	if err := (Machine{}).MountShm(target, 1<<20); err != nil {
		t.Fatal(err)
	}
	defer unix.Unmount(target, unix.MNT_DETACH)
	var st unix.Statfs_t
	if err := unix.Statfs(target, &st); err != nil {
		t.Fatal(err)
	}
	const flags = unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC
	if size := int64(st.Blocks) * st.Bsize; size != 1<<20 || st.Flags&flags != flags {
		t.Errorf("%d bytes, flags %#x", size, st.Flags)
	}
	if info, err := os.Stat(target); err != nil || info.Mode() != os.ModeDir|os.ModeSticky|0o777 {
		t.Errorf("mode %s, %v", info.Mode(), err)
	}
	file := filepath.Join(target, "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := (Machine{}).MountShm(file, 1<<20); err == nil || !strings.Contains(err.Error(), "mount shared memory of 1048576 bytes on "+file) {
		t.Errorf("on a file: %v", err)
	}
}

func TestSetSysctlNamesWhatItCannotSet(t *testing.T) {
	for key, want := range map[string]string{
		"net.ipv4.no_such": "set sysctl net.ipv4.no_such: this guest kernel has no such parameter",
		"kernel/osrelease": "set sysctl kernel/osrelease: ",
	} {
		if err := (Machine{}).SetSysctl(key, "1"); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", key, err, want)
		}
	}
}
