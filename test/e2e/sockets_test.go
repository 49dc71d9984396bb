package e2e

import (
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/opencontainers/runtime-spec/specs-go"
)

// echo listens on a socket of the host in dir, and answers each connection with what
// it was sent.
func (e *env) echo(dir string) (path string) {
	e.Helper()
	path = filepath.Join(dir, "echo")
	ln, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		e.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			conn, err := ln.Accept()
			if err != nil {
				return
			}
			said, err := io.ReadAll(conn)
			if err == nil {
				conn.Write(append([]byte("host heard "), said...))
			}
			conn.Close()
		}
	}()
	e.Cleanup(func() { ln.Close(); <-done })
	return path
}

// The mount type uds, which runc does not have, and a bind are the same.
func TestSocketsOfTheHost(t *testing.T) {
	eachHusk(t, func(e *env) {
		dir, err := os.MkdirTemp("/tmp", "hk-uds") // a socket's path is short
		if err != nil {
			e.Fatal(err)
		}
		e.Cleanup(func() { os.RemoveAll(dir) })
		path := e.echo(dir)
		e.writeFile(filepath.Join(dir, "file"), nil)
		program := e.goBuild("build", "./test/e2e/testdata/unixask")
		r := e.runSpec("for s in /mnt/uds /mnt/bind /mnt/dir/echo; do /mnt/program $s $s; echo; done", func(s *specs.Spec) {
			s.Mounts = append(s.Mounts, program,
				specs.Mount{Destination: "/mnt/uds", Type: "uds", Source: path},
				specs.Mount{Destination: "/mnt/bind", Type: "bind", Source: path, Options: []string{"bind"}},
				specs.Mount{Destination: "/mnt/dir", Type: "bind", Source: dir, Options: []string{"rbind", "ro"}})
		})
		if want := "host heard /mnt/uds\nhost heard /mnt/bind\nhost heard /mnt/dir/echo\n"; r.stdout != want {
			e.Errorf("%v, want stdout %q", r, want)
		}
		r = e.runSpec("true", func(s *specs.Spec) {
			s.Mounts = append(s.Mounts, specs.Mount{Destination: "/mnt/uds", Type: "uds", Source: filepath.Join(dir, "file")})
		})
		if r.code == 0 || !strings.Contains(r.stderr, "is not a unix socket") || !strings.Contains(r.stderr, "(/mnt/uds)") {
			e.Errorf("uds of a file: %v", r)
		}
	})
}
