package qmp

import (
	"io"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"

	"github.com/husk-containers/husk/internal/child"
)

// TestQEMU speaks to the real one.
func TestQEMU(t *testing.T) {
	path, err := exec.LookPath("qemu-system-x86_64")
	if err != nil {
		t.Skip("no qemu-system-x86_64: apt-get install qemu-system-x86")
	}
	conn, server := socketpair(t)
	vm, err := child.Start(child.Spec{
		Path: path,
		Args: []string{
			"-M", "none", "-nodefaults", "-no-user-config", "-display", "none",
			"-chardev", "socket,id=qmp,fd=3", "-mon", "chardev=qmp,mode=control",
		},
		ExtraFiles: []*os.File{server},
		NoNewPrivs: true,
	})
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		vm.Kill()
		<-vm.Done()
	}()
	server.Close()
	c, err := New(t.Context(), conn)
	if err != nil {
		t.Fatalf("%v; QEMU: %s", err, vm.Cause())
	}
	defer c.Close()

	var version struct {
		QEMU struct{ Major int }
	}
	if err := c.Execute(t.Context(), "query-version", nil, &version); err != nil || version.QEMU.Major < 5 {
		t.Errorf("query-version = %+v, %v", version, err)
	}
	if !strings.Contains(c.Version(), ".") {
		t.Errorf("Version = %q", c.Version())
	}
	var status struct {
		Running bool
		Status  string
	}
	if err := c.Execute(t.Context(), "query-status", nil, &status); err != nil || !status.Running {
		t.Errorf("query-status = %+v, %v", status, err)
	}
	var schema []any
	if err := c.Execute(t.Context(), "query-qmp-schema", nil, &schema); err != nil || len(schema) < 100 {
		t.Errorf("query-qmp-schema has %d entries, %v", len(schema), err)
	}
	if err := c.Execute(t.Context(), "no-such-command", nil, nil); !errdefs.IsNotImplemented(err) {
		t.Errorf("no-such-command: %v", err)
	}
	if err := c.Execute(t.Context(), "device_del", map[string]string{"id": "nothing"}, nil); !errdefs.IsNotFound(err) {
		t.Errorf("device_del of nothing: %v", err)
	}

	// QEMU holds the write end when ours is closed, until closefd.
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	name := map[string]string{"fdname": "pipe"}
	err = c.ExecuteFile(t.Context(), "getfd", name, nil, w)
	w.Close()
	if err != nil {
		t.Fatal(err)
	}
	_ = r.SetReadDeadline(time.Now().Add(10 * time.Millisecond))
	if _, err := r.Read(make([]byte, 1)); err == io.EOF {
		t.Error("QEMU has not kept the descriptor")
	}
	if err := c.Execute(t.Context(), "closefd", name, nil); err != nil {
		t.Fatal(err)
	}
	_ = r.SetReadDeadline(time.Now().Add(timeout))
	if _, err := r.Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("read after closefd: %v, want the end", err)
	}

	if err := c.Execute(t.Context(), "quit", nil, nil); err != nil {
		t.Error(err)
	}
	var last Event
	for last = range c.Events() {
		t.Log("event", last.Name, string(last.Data))
	}
	if last.Name != "SHUTDOWN" {
		t.Errorf("last event = %q, want SHUTDOWN", last.Name)
	}
	wait(t, c.Done())
	wait(t, vm.Done())
	if got := vm.Status(); got != "exit status 0" {
		t.Errorf("QEMU: %s", vm.Cause())
	}
}
