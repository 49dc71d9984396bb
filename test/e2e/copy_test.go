package e2e

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	transferapi "github.com/containerd/containerd/api/services/transfer/v1"
	"github.com/containerd/containerd/api/types/transfer"
	"github.com/containerd/containerd/v2/core/streaming/proxy"
	"github.com/containerd/containerd/v2/core/transfer/streaming"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/ttrpc"
	"github.com/containerd/typeurl/v2"

	"github.com/husk-containers/husk/internal/statedir"
)

// cp runs husk cp, with stdin where there is one.
func (e *env) cp(stdin []byte, args ...string) result {
	e.Helper()
	ctx, cancel := context.WithTimeout(e.Context(), commandTimeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, filepath.Join(e.root, "build", "bin", "husk"),
		append([]string{"cp", "-config", filepath.Join(e.d.Dir, "configuration.toml"), "-n", e.d.Token}, args...)...)
	var stdout, stderr bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = bytes.NewReader(stdin), &stdout, &stderr
	err := cmd.Run()
	if exit := (*exec.ExitError)(nil); err != nil && !errors.As(err, &exit) || cmd.ProcessState.ExitCode() < 0 {
		e.Fatalf("husk cp %q: %v (limit %v): %s", args, err, commandTimeout, &stderr)
	}
	return result{stdout.String(), stderr.String(), cmd.ProcessState.ExitCode()}
}

// copies is cp of what has to succeed.
func (e *env) copies(args ...string) {
	e.Helper()
	if r := e.cp(nil, args...); r.code != 0 || r.stdout != "" || r.stderr != "" {
		e.Fatalf("husk cp %q: %v", args, r)
	}
}

// says wants what a shell says in a container.
func (e *env) says(id, execID, script, want string) {
	e.Helper()
	if r := e.exec(id, execID, "sh", "-c", script); r.stdout != want {
		e.Errorf("%s: %v, want stdout %q", script, r, want)
	}
}

func (e *env) made(errs ...error) {
	e.Helper()
	if err := errors.Join(errs...); err != nil {
		e.Fatal(err)
	}
}

// What was copied in and out again is what it was, whatever file system it was on.
func TestCopyInAndOut(t *testing.T) {
	eachHusk(t, func(e *env) {
		bound, dir := e.TempDir(), e.TempDir()
		e.made(os.Chmod(bound, 0o755))
		id := e.detached("cp", "sleep 1000",
			"--mount", "type=tmpfs,src=tmpfs,dst=/mnt/tmpfs,options=size=64m", "--mount", "type=bind,src="+bound+",dst=/mnt/bind,options=rbind:rw")
		large := make([]byte, 9<<20+1)
		rand.Read(large) // never fails
		tree := filepath.Join(dir, "tree")
		e.made(
			os.MkdirAll(tree+"/deep/er", 0o750),
			os.WriteFile(tree+"/large", large, 0o640),
			os.WriteFile(tree+"/deep/small", []byte("small\n"), 0o600),
			os.WriteFile(tree+"/deep/er/\xff\n odd", nil, 0o644),
			os.Symlink("../large", tree+"/deep/link"),
			os.Symlink("/nowhere", tree+"/dangling"),
			os.Link(tree+"/large", tree+"/again"),
			os.Chown(tree+"/deep/small", 1234, 4321),
			os.Chtimes(tree+"/deep/small", time.Time{}, time.Unix(1_000_000_000, 0)),
			os.Chmod(tree+"/deep", 0o755|fs.ModeSetgid),
		)
		sum := fmt.Sprintf("%x", sha256.Sum256(large))
		for n, at := range []string{"/srv", "/mnt/tmpfs", "/mnt/bind"} {
			e.exec(id, fmt.Sprint("mkdir", n), "mkdir", "-p", at)
			e.copies(tree, id+":"+at)
			e.says(id, fmt.Sprint("look", n), "cd "+at+"/tree && sha256sum < large && stat -c '%a %u:%g %Y' deep/small deep && readlink deep/link && readlink dangling && test large -ef again && echo linked",
				fmt.Sprintf("%s  -\n600 1234:4321 1000000000\n2755 0:0 %d\n../large\n/nowhere\nlinked\n", sum, mtime(e, tree+"/deep")))
			out := filepath.Join(dir, fmt.Sprint("out", n))
			e.copies(id+":"+at+"/tree", out)
			if diff, err := exec.CommandContext(e.Context(), "diff", "-r", "--no-dereference", tree, out).CombinedOutput(); err != nil {
				e.Errorf("%s: %v: %s", at, err, diff)
			}
			if st := e.host("stat", "-c", "%a %u:%g %Y", out+"/deep/small", out+"/large"); !strings.HasPrefix(st, "600 1234:4321 1000000000\n640 0:0 ") {
				e.Errorf("%s: out came %q", at, st)
			}
			if st := e.host("stat", "-c", "%a", out+"/deep"); st != "755\n" { // without the set-group-ID bit
				e.Errorf("%s: out came a directory of mode %q", at, st)
			}
		}
		e.copies(tree+"/deep/small", id+":/new")
		e.says(id, "new", "cat /new", "small\n")
		r := e.cp(nil, id+":/srv/tree", "-")
		if r.code != 0 || r.stderr != "" {
			e.Fatalf("to standard output: exit code %d, %s", r.code, r.stderr)
		}
		e.exec(id, "piped", "mkdir", "/piped")
		if r := e.cp([]byte(r.stdout), "-", id+":/piped"); r.code != 0 {
			e.Errorf("from standard input: %v", r)
		}
		e.says(id, "compare", "diff -r /srv/tree/deep /piped/tree/deep && sha256sum < /piped/tree/large", sum+"  -\n")
	})
}

func mtime(e *env, path string) int64 {
	e.Helper()
	info, err := os.Stat(path)
	e.made(err)
	return info.ModTime().Unix()
}

// host runs a program of the host.
func (e *env) host(name string, args ...string) string {
	e.Helper()
	out, err := exec.CommandContext(e.Context(), name, args...).CombinedOutput()
	if err != nil {
		e.Fatalf("%s %q: %v: %s", name, args, err, out)
	}
	return string(out)
}

func TestCopyErrors(t *testing.T) {
	eachHusk(t, func(e *env) {
		id := e.detached("cp", "ln -s ../../../../../../etc /out; echo x > /file; sleep 1000")
		file := filepath.Join(e.TempDir(), "f")
		e.made(os.WriteFile(file, []byte("text"), 0o644))
		e.says(id, "await", "until [ -s /file ]; do sleep 0.1; done; echo up", "up\n")
		for _, tt := range []struct{ from, to, text string }{
			{id + ":/none", ".", "/none"},
			{file, id + ":/none/f", "directory /none does not exist in the container"},
			{file, id + ":/file/", "not a directory"},
			{file, id + ":/file/f", "not a directory"},
			{filepath.Dir(file), id + ":/file", "not a directory"},
			{file, e.d.ID("other") + ":/", "no container"},
			{file, file, "CONTAINER:PATH"},
		} {
			if r := e.cp(nil, tt.from, tt.to); r.code != 1 || !strings.HasPrefix(r.stderr, "husk: ") || !strings.Contains(r.stderr, tt.text) {
				e.Errorf("%s to %s: %v, want %q", tt.from, tt.to, r, tt.text)
			}
		}
		// A link that would lead out leads to the container's own.
		e.copies(file, id+":/out/copied")
		e.says(id, "within", "cat /etc/copied", "text")
		if _, err := os.Stat("/etc/copied"); err == nil {
			e.Error("the copy reached the host's /etc")
		}
		e.must("task", "delete", "--force", id)
		if r := e.cp(nil, file, id+":/"); r.code != 1 || !strings.Contains(r.stderr, "no container") {
			e.Errorf("to a container that has ended: %v", r)
		}
	})
}

// A tar that would write beside the directory it is for is refused, and the container
// goes on.
func TestCopyAttacks(t *testing.T) {
	eachHusk(t, func(e *env) {
		id := e.detached("cp", "mkdir /d /secret; ln -s /secret /d/there; echo x > /ready; sleep 1000")
		e.says(id, "await", "until [ -s /ready ]; do sleep 0.1; done; echo up", "up\n")
		reg := func(name string) tar.Header {
			return tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644}
		}
		for _, tt := range []struct {
			name    string
			entries []tar.Header
		}{
			{"parent", []tar.Header{reg("../secret/x")}},
			{"through a link of the container's", []tar.Header{reg("there/x")}},
			{"through a link of its own", []tar.Header{{Typeflag: tar.TypeSymlink, Name: "l", Linkname: "../secret"}, reg("l/x")}},
			{"through an absolute link of its own", []tar.Header{{Typeflag: tar.TypeSymlink, Name: "m", Linkname: "/secret"}, reg("m/x")}},
			{"a hard link out", []tar.Header{{Typeflag: tar.TypeLink, Name: "h", Linkname: "../ready"}}},
		} {
			var raw bytes.Buffer
			tw := tar.NewWriter(&raw)
			for _, h := range tt.entries {
				e.made(tw.WriteHeader(&h))
			}
			e.made(tw.Close())
			if r := e.cp(raw.Bytes(), "-", id+":/d"); r.code != 1 || !strings.HasPrefix(r.stderr, "husk: ") {
				e.Errorf("%s: %v", tt.name, r)
			}
		}
		if r := e.cp([]byte("this is no tar"), "-", id+":/d"); r.code != 1 {
			e.Errorf("no tar: %v", r)
		}
		e.says(id, "look", "ls -A /secret; cat /ready", "x\n")
	})
}

// containerd's own client of the services, on the shim's socket.
func TestTransferServices(t *testing.T) {
	eachHusk(t, func(e *env) {
		id := e.detached("transfer", "echo x > /ready; sleep 1000")
		e.says(id, "await", "until [ -s /ready ]; do sleep 0.1; done; mkdir -p /d/sub; echo f > /d/sub/f; echo up", "up\n")
		shims, err := statedir.Shims(filepath.Join(e.d.Dir, "husk"), e.d.Token)
		if err != nil || len(shims) != 1 {
			e.Fatalf("the shims are %v, %v", shims, err)
		}
		conn, err := net.Dial("unix", shims[0].Address)
		e.made(err)
		client := ttrpc.NewClient(conn)
		defer client.Close()
		ctx, cancel := context.WithTimeout(e.Context(), commandTimeout)
		defer cancel()
		call := func(from, to any) error {
			source, err := typeurl.MarshalAnyToProto(from)
			e.made(err)
			destination, err := typeurl.MarshalAnyToProto(to)
			e.made(err)
			_, err = transferapi.NewTTRPCTransferClient(client).Transfer(ctx, &transferapi.TransferRequest{Source: source, Destination: destination})
			return errgrpc.ToNative(err)
		}
		creator := proxy.NewStreamCreator(client)
		out := func(stream string, from *transfer.ContainerPath) ([]string, error) {
			s, err := creator.Create(ctx, stream)
			e.made(err)
			done := make(chan error, 1)
			go func() { done <- call(from, &transfer.WriteStream{Stream: stream, MediaType: "application/x-tar"}) }()
			var names []string
			for tr := tar.NewReader(streaming.ReceiveStream(ctx, s)); ; {
				h, err := tr.Next()
				if err != nil {
					return names, errors.Join(<-done)
				}
				names = append(names, h.Name)
			}
		}
		if names, err := out("whole", &transfer.ContainerPath{ContainerID: id, Path: "/d"}); err != nil || strings.Join(names, " ") != "d/ d/sub/ d/sub/f" {
			e.Errorf("out came %q, %v", names, err)
		}
		if names, err := out("shallow", &transfer.ContainerPath{ContainerID: id, Path: "/d", NoWalk: true}); err != nil || strings.Join(names, " ") != "d/" {
			e.Errorf("of the directory alone came %q, %v", names, err)
		}
		if _, err := out("none", &transfer.ContainerPath{ContainerID: id, Path: "/none"}); !errdefs.IsNotFound(err) {
			e.Errorf("a path that is not there: %v", err)
		}
		if _, err := out("other", &transfer.ContainerPath{ContainerID: "other", Path: "/"}); !errdefs.IsNotFound(err) {
			e.Errorf("a container that is not there: %v", err)
		}
		for _, preserve := range []bool{true, false} {
			var raw bytes.Buffer
			tw := tar.NewWriter(&raw)
			e.made(tw.WriteHeader(&tar.Header{Name: "in", Typeflag: tar.TypeReg, Mode: 0o600, Size: 2, Uid: 7, Gid: 8}))
			_, err := io.WriteString(tw, "in")
			e.made(err, tw.Close())
			stream := fmt.Sprint("in", preserve)
			s, err := creator.Create(ctx, stream)
			e.made(err)
			streaming.SendStream(ctx, &raw, s)
			err = call(&transfer.ReadStream{Stream: stream, MediaType: "application/x-tar"},
				&transfer.ContainerPath{ContainerID: id, Path: "/d", PreserveOwnership: preserve})
			if err != nil {
				e.Errorf("in: %v", err)
			}
			want := "0:0 in\n"
			if preserve {
				want = "7:8 in\n"
			}
			e.says(id, "look"+stream, "echo $(stat -c %u:%g /d/in) $(cat /d/in)", want)
		}
	})
}

// Containers of a pod are found at their pod's shim.
func TestCopyToAMember(t *testing.T) {
	eachWithSandboxes(t, func(p *pod) {
		p.run("")
		c := p.member("echo ready; sleep 1000")
		file := filepath.Join(p.TempDir(), "f")
		p.made(os.WriteFile(file, []byte("text"), 0o644))
		id := p.d.ID("member")
		p.copies(file, id+":/tmp")
		p.copies(id+":/tmp/f", file+".out")
		if got, err := os.ReadFile(file + ".out"); err != nil || string(got) != "text" {
			p.Errorf("out came %q, %v", got, err)
		}
		p.must("task", "kill", "--signal", "SIGKILL", id)
		c.wait()
		p.stop()
		p.shutdown()
	})
}
