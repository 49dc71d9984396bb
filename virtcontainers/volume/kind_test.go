package volume

import (
	"io/fs"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/husk-containers/husk/virtcontainers/spec"
)

func TestKindOf(t *testing.T) {
	dir := fs.ModeDir | 0o755
	for name, tt := range map[string]struct {
		bind  spec.Bind
		facts facts
		want  Kind
		err   string
		class func(error) bool
	}{
		"directory":           {facts: facts{mode: dir}, want: Shared},
		"file":                {facts: facts{mode: 0o644}, want: Shared},
		"hosts":               {bind: spec.Bind{Role: spec.SystemFile}, facts: facts{mode: 0o644}, want: Copied},
		"hosts, a directory":  {bind: spec.Bind{Role: spec.SystemFile}, facts: facts{mode: dir}, want: Shared},
		"termination log":     {bind: spec.Bind{Role: spec.TerminationLog}, facts: facts{mode: 0o666}, want: Copied},
		"configMap":           {bind: spec.Bind{ReadOnly: true}, facts: facts{mode: dir, atomic: true}, want: Copied},
		"configMap, writable": {facts: facts{mode: dir, atomic: true}, want: Shared},
		"secret":              {bind: spec.Bind{ReadOnly: true}, facts: facts{mode: dir | 0o1777, atomic: true, fstype: unix.TMPFS_MAGIC}, want: Copied},
		"emptyDir in memory":  {facts: facts{mode: fs.ModeDir | fs.ModeSticky | 0o777, fresh: true, fstype: unix.TMPFS_MAGIC}, want: Memory},
		"read-only":           {bind: spec.Bind{ReadOnly: true}, facts: facts{mode: fs.ModeDir | 0o777, fresh: true, fstype: unix.TMPFS_MAGIC}, want: Memory},
		"another tmpfs":       {facts: facts{mode: fs.ModeDir | fs.ModeSticky | 0o777, fstype: unix.TMPFS_MAGIC}, want: Shared},
		"/dev":                {facts: facts{mode: dir, devtmpfs: true, fstype: unix.TMPFS_MAGIC}, want: Devices},
		"huge pages":          {facts: facts{mode: dir, fstype: unix.HUGETLBFS_MAGIC}, want: HugePages},
		"/proc":               {facts: facts{mode: dir, fstype: unix.PROC_SUPER_MAGIC}, err: "is a proc file system of the host", class: errdefs.IsNotImplemented},
		"socket":              {facts: facts{mode: fs.ModeSocket | 0o777}, want: Socket},
		"uds":                 {bind: spec.Bind{Socket: true}, facts: facts{mode: fs.ModeSocket | 0o777}, want: Socket},
		"uds of a file":       {bind: spec.Bind{Socket: true}, facts: facts{mode: 0o644}, err: "is not a unix socket", class: errdefs.IsInvalidArgument},
		"fifo":                {facts: facts{mode: fs.ModeNamedPipe | 0o644}, err: "is a fifo", class: errdefs.IsNotImplemented},
		"/dev/fuse":           {facts: facts{mode: fs.ModeDevice | fs.ModeCharDevice | 0o666, major: 10, minor: 229}, want: Device},
		"a GPU":               {facts: facts{mode: fs.ModeDevice | fs.ModeCharDevice | 0o666, major: 195}, err: "character device 195:0", class: errdefs.IsNotImplemented},
		"a disk":              {facts: facts{mode: fs.ModeDevice | 0o660, major: 8, minor: 1}, err: "block device 8:1", class: errdefs.IsNotImplemented},
		"something else":      {facts: facts{mode: fs.ModeIrregular}, err: "is neither", class: errdefs.IsInvalidArgument},
	} {
		got, err := kindOf(&tt.bind, tt.facts)
		if tt.err == "" && (got != tt.want || err != nil) {
			t.Errorf("%s: %d, %v, want %d", name, got, err, tt.want)
		}
		if tt.err != "" && (err == nil || !strings.Contains(err.Error(), tt.err) || !tt.class(err)) {
			t.Errorf("%s: %v, want %q", name, err, tt.err)
		}
	}
}
