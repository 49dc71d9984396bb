package agent_test

import (
	"archive/tar"
	"bytes"
	"net"
	"os"
	"path/filepath"
	"testing"

	"github.com/containerd/errdefs"

	"github.com/husk-containers/husk/agent"
	agentv1 "github.com/husk-containers/husk/protocols/agent/v1"
	"github.com/husk-containers/husk/protocols/files"
)

// Of a container only what runs is put into.
func TestFilesOfARunningContainer(t *testing.T) {
	path := filepath.Join(t.TempDir(), "files")
	g := newGuestWith(t, func(o *agent.Options) {
		var err error
		if o.Files, err = net.Listen("unix", path); err != nil {
			t.Fatal(err)
		}
	})
	var archive bytes.Buffer
	w := tar.NewWriter(&archive)
	if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: "name", Mode: 0o600, Uid: os.Getuid(), Gid: os.Getgid()}); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	put := func() error {
		conn, err := net.Dial("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		return files.Put(g.ctx, conn, "c", dir, bytes.NewReader(archive.Bytes()))
	}
	if err := put(); !errdefs.IsNotFound(err) {
		t.Errorf("no such container: %v", err)
	}
	s := &stdio{streams: &agentv1.Streams{}}
	if err := g.create("c", s, "sleep", "1000"); err != nil {
		t.Fatal(err)
	}
	if err := put(); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("created: %v", err)
	}
	if _, err := g.StartContainer(g.ctx, &agentv1.StartContainerRequest{ContainerId: "c"}); err != nil {
		t.Fatal(err)
	}
	if err := put(); err != nil {
		t.Errorf("running: %v", err)
	}
	if _, err := os.Stat(filepath.Join(dir, "name")); err != nil {
		t.Error(err)
	}
	if err := g.signal("c", 9, false); err != nil {
		t.Fatal(err)
	}
	g.wait("c", "")
	if err := put(); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("ended: %v", err)
	}
}
