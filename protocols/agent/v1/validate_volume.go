package agentv1

import (
	"fmt"
	"math/bits"
	"path"
	"path/filepath"
	"strings"
)

const (
	// devicesDir is the directory of DeviceNode's paths.
	devicesDir = GuestDir + "/dev"

	maxMode        = 0o7777
	maxVolumeBytes = 1 << 50
	maxDirectories = 4096
	maxMajor       = 1<<12 - 1 // MINORBITS is 20 of the 32 bits of a dev_t
	maxMinor       = 1<<20 - 1
)

// A Device is a device node: 'c' or 'b' with its numbers.
type Device struct {
	Kind         byte
	Major, Minor uint32
}

// Node is the guest path that a spec gives as the source of a bind mount for the
// device. The agent makes the node when it makes the container.
func (d Device) Node() string { return fmt.Sprintf("%s/%c%d:%d", devicesDir, d.Kind, d.Major, d.Minor) }

// DeviceOfNode returns the device that Node has made path of; ok is false where it
// has not.
func DeviceOfNode(path string) (d Device, ok bool) {
	name, ok := strings.CutPrefix(path, devicesDir+"/")
	if !ok {
		return Device{}, false
	}
	if _, err := fmt.Sscanf(name, "%c%d:%d", &d.Kind, &d.Major, &d.Minor); err != nil {
		return Device{}, false
	}
	known := (d.Kind == 'c' || d.Kind == 'b') && d.Major <= maxMajor && d.Minor <= maxMinor
	return d, known && d.Node() == path
}

// Validate implements the rules of the protocol.
func (m *Storage) Validate() error {
	if !Below(m.GetTarget(), GuestDir) {
		return invalid("storage target %q is not a clean path below %s", m.GetTarget(), GuestDir)
	}
	switch m.GetKind() {
	case Storage_KIND_VIRTIOFS:
		if m.GetSource() == "" {
			return invalid("storage has no source: name a virtio-fs tag")
		}
		if m.GetSizeBytes() != 0 || m.GetMode() != 0 || m.GetUid() != 0 || m.GetGid() != 0 || m.GetPageBytes() != 0 {
			return invalid("storage of virtio-fs has a size, mode, owner or page size")
		}
		return validText("storage source", m.GetSource(), maxTag)
	case Storage_KIND_TMPFS:
		if m.GetPageBytes() != 0 {
			return invalid("storage of tmpfs has a page size")
		}
	case Storage_KIND_HUGETLBFS:
		if bits.OnesCount64(m.GetPageBytes()) != 1 {
			return invalid("storage page_bytes %d is not a power of two", m.GetPageBytes())
		}
	default:
		return invalid("storage kind %d is not known", m.GetKind())
	}
	if m.GetSource() != "" {
		return invalid("storage of the guest's own memory has the source %q", m.GetSource())
	}
	if n := m.GetSizeBytes(); n > maxVolumeBytes {
		return invalid("storage size_bytes %d, at most %d", n, int64(maxVolumeBytes))
	}
	return validMode(m.GetMode())
}

func validMode(mode uint32) error {
	if mode > maxMode {
		return invalid("mode %#o, at most %#o", mode, maxMode)
	}
	return nil
}

// Validate implements the rules of the protocol.
func (m *MountStorageRequest) Validate() error {
	if m.GetStorage() == nil {
		return invalid("storage is missing")
	}
	if n := len(m.GetDirectories()); n > maxDirectories {
		return invalid("%d directories, at most %d", n, maxDirectories)
	}
	for i, d := range m.GetDirectories() {
		if err := d.Validate(); err != nil {
			return fmt.Errorf("directories[%d]: %w", i, err)
		}
	}
	return m.GetStorage().Validate()
}

// Validate implements the rules of the protocol.
func (*MountStorageResponse) Validate() error { return nil }

// Validate implements the rules of the protocol.
func (m *Directory) Validate() error {
	p := m.GetPath()
	if p == "." || len(p) > maxPathLen || path.Clean(p) != p || !filepath.IsLocal(p) || strings.ContainsRune(p, 0) {
		return invalid("path %q is not a clean path below the storage's target", p)
	}
	return validMode(m.GetMode())
}

// Validate implements the rules of the protocol.
func (m *UnmountStorageRequest) Validate() error {
	if !Below(m.GetTarget(), GuestDir) {
		return invalid("storage target %q is not a clean path below %s", m.GetTarget(), GuestDir)
	}
	return nil
}

// Validate implements the rules of the protocol.
func (*UnmountStorageResponse) Validate() error { return nil }

// Validate implements the rules of the protocol.
func (m *ListenSocketRequest) Validate() error {
	if err := validID("socket_id", m.GetSocketId()); err != nil {
		return err
	}
	if want := SocketsDir + "/" + m.GetSocketId(); m.GetTarget() != want {
		return invalid("socket target %q is not %s", m.GetTarget(), want)
	}
	if over := m.GetOver(); over != "" && !Below(over, GuestDir+"/share") {
		return invalid("socket over %q is not a clean path below %s", over, GuestDir+"/share")
	}
	return validMode(m.GetMode())
}

// Validate implements the rules of the protocol.
func (*ListenSocketResponse) Validate() error { return nil }

// Validate implements the rules of the protocol.
func (m *CloseSocketRequest) Validate() error { return validID("socket_id", m.GetSocketId()) }

// Validate implements the rules of the protocol.
func (*CloseSocketResponse) Validate() error { return nil }

// Validate implements the rules of the protocol.
func (m *SocketEvent) Validate() error {
	if err := validID("socket_id", m.GetSocketId()); err != nil {
		return err
	}
	return validOptionalID("container_id", m.GetContainerId())
}

// Validate implements the rules of the protocol.
func (m *HoldFileSystemsRequest) Validate() error {
	if err := validID("container_id", m.GetContainerId()); err != nil {
		return err
	}
	return validFileSystems(m.GetFileSystems())
}

func validFileSystems(paths []string) error {
	if n := len(paths); n > maxFileSystems {
		return invalid("%d file_systems, at most %d", n, maxFileSystems)
	}
	for _, p := range paths {
		if !Below(p, GuestDir) {
			return invalid("file_systems: %q is not a clean path below %s", p, GuestDir)
		}
	}
	return nil
}

// Validate implements the rules of the protocol.
func (*HoldFileSystemsResponse) Validate() error { return nil }
