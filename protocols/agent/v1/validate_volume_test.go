package agentv1

import (
	"strings"
	"testing"
)

func TestVolumeMessages(t *testing.T) {
	tmpfs := func(change func(*Storage)) *MountStorageRequest {
		s := &Storage{Kind: Storage_KIND_TMPFS, Target: VolumesDir + "/1", Mode: 0o777, SizeBytes: 1 << 20}
		change(s)
		return &MountStorageRequest{Storage: s}
	}
	socket := func(change func(*ListenSocketRequest)) *ListenSocketRequest {
		m := &ListenSocketRequest{SocketId: "1", Target: SocketsDir + "/1", Mode: 0o777}
		change(m)
		return m
	}
	dirs := func(paths ...string) *MountStorageRequest {
		m := tmpfs(func(*Storage) {})
		for _, p := range paths {
			m.Directories = append(m.Directories, &Directory{Path: p})
		}
		return m
	}
	for name, tt := range map[string]struct {
		message interface{ Validate() error }
		want    string // of the error; empty: valid
	}{
		"tmpfs":              {tmpfs(func(*Storage) {}), ""},
		"no storage":         {&MountStorageRequest{}, "storage is missing"},
		"kind":               {tmpfs(func(s *Storage) { s.Kind = 9 }), "kind 9 is not known"},
		"target":             {tmpfs(func(s *Storage) { s.Target = "/etc" }), `target "/etc"`},
		"tmpfs with a tag":   {tmpfs(func(s *Storage) { s.Source = "husk" }), `has the source "husk"`},
		"tmpfs with pages":   {tmpfs(func(s *Storage) { s.PageBytes = 1 }), "tmpfs has a page size"},
		"mode":               {tmpfs(func(s *Storage) { s.Mode = 0o10000 }), "mode 010000"},
		"size":               {tmpfs(func(s *Storage) { s.SizeBytes = 1 << 51 }), "at most"},
		"virtio-fs":          {tmpfs(func(s *Storage) { *s = Storage{Kind: Storage_KIND_VIRTIOFS, Source: "t", Target: s.Target} }), ""},
		"virtio-fs, no tag":  {tmpfs(func(s *Storage) { *s = Storage{Kind: Storage_KIND_VIRTIOFS, Target: s.Target} }), "no source"},
		"virtio-fs, sized":   {tmpfs(func(s *Storage) { s.Kind, s.Source = Storage_KIND_VIRTIOFS, "t" }), "has a size, mode"},
		"huge pages":         {tmpfs(func(s *Storage) { s.Kind, s.PageBytes = Storage_KIND_HUGETLBFS, 2<<20 }), ""},
		"huge pages, odd":    {tmpfs(func(s *Storage) { s.Kind, s.PageBytes = Storage_KIND_HUGETLBFS, 3<<20 }), "not a power of two"},
		"huge pages, none":   {tmpfs(func(s *Storage) { s.Kind = Storage_KIND_HUGETLBFS }), "page_bytes 0"},
		"directories":        {dirs("a", "a/b"), ""},
		"directory itself":   {dirs("."), "directories[0]"},
		"directory above":    {dirs("a", "a/../../b"), "directories[1]"},
		"directory absolute": {dirs("/a"), `path "/a"`},
		"directory empty":    {dirs(""), `path ""`},
		"unmount":            {&UnmountStorageRequest{Target: VolumesDir + "/1"}, ""},
		"unmount the root":   {&UnmountStorageRequest{Target: GuestDir}, "not a clean path below"},
		"socket":             {socket(func(*ListenSocketRequest) {}), ""},
		"socket over":        {socket(func(m *ListenSocketRequest) { m.Over = GuestDir + "/share/.volumes/1/s" }), ""},
		"socket over etc":    {socket(func(m *ListenSocketRequest) { m.Over = "/etc/s" }), `over "/etc/s"`},
		"socket elsewhere":   {socket(func(m *ListenSocketRequest) { m.Target = SocketsDir + "/2" }), "is not " + SocketsDir + "/1"},
		"socket id":          {socket(func(m *ListenSocketRequest) { m.SocketId = ".." }), "socket_id"},
		"socket mode":        {socket(func(m *ListenSocketRequest) { m.Mode = 1 << 20 }), "mode"},
		"close":              {&CloseSocketRequest{}, "socket_id is empty"},
		"event":              {&Event{Event: &Event_Socket{Socket: &SocketEvent{SocketId: "a/b"}}}, "socket_id"},
		"event of whom":      {&Event{Event: &Event_Socket{Socket: &SocketEvent{SocketId: "a", ContainerId: "a/b"}}}, "container_id"},
		"hold":               {&HoldFileSystemsRequest{ContainerId: "c", FileSystems: []string{GuestDir + "/share/c"}}, ""},
		"hold elsewhere":     {&HoldFileSystemsRequest{ContainerId: "c", FileSystems: []string{"/"}}, "file_systems"},
		"hold of none":       {&HoldFileSystemsRequest{}, "container_id"},
	} {
		err := tt.message.Validate()
		if tt.want == "" && err != nil || tt.want != "" && (err == nil || !strings.Contains(err.Error(), tt.want)) {
			t.Errorf("%s: %v, want %q", name, err, tt.want)
		}
	}
}

func TestDeviceNode(t *testing.T) {
	for _, d := range []Device{{'c', 10, 229}, {'b', 7, 0}, {'c', maxMajor, maxMinor}} {
		if got, ok := DeviceOfNode(d.Node()); got != d || !ok {
			t.Errorf("DeviceOfNode(%s) = %v, %t", d.Node(), got, ok)
		}
	}
	for _, path := range []string{
		"", "/dev/null", devicesDir, devicesDir + "/", devicesDir + "/c1", devicesDir + "/c1:2/x", devicesDir + "/c01:2",
		devicesDir + "/p1:2", devicesDir + "/c-1:2", devicesDir + "/c4096:0", devicesDir + "/c1:1048576", devicesDir + "/c 1:2", devicesDir + "/c1:2x",
	} {
		if d, ok := DeviceOfNode(path); ok {
			t.Errorf("DeviceOfNode(%q) = %v", path, d)
		}
	}
}
